"""One token beside a window and a state: C against plain torch, plain torch against softmax written out."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from ssmorph.errors import UserError
from ssmorph.kernels.common.rope import turned
from ssmorph.kernels.window_step import BACKENDS, Far, Held, window_step

CPU = torch.device("cpu")
NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif("native" in BACKENDS.refusals(CPU), reason=f"{BACKENDS.refusals(CPU)}")
)
# batch, heads, groups, width, window, sinks, prototypes, turned channels
SIZES = {
    "grouped": (2, 6, 2, 16, 7, 2, 5, 16),
    "no sinks": (1, 2, 2, 8, 3, 0, 4, 8),
    "window of one": (3, 3, 1, 5, 1, 1, 1, 4),
    "half turned": (2, 4, 4, 12, 9, 4, 33, 6),
    "as in SmolLM2": (1, 9, 3, 64, 60, 4, 64, 64),
}


class Text:
    """A random text of keys, values and queries, and a state's parameters."""

    def __init__(self, size: tuple[int, ...], length: int, far: bool) -> None:
        batch, heads, groups, width, self.window, self.sinks, states, self.turned = size
        g = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g)

        self.q, self.k = normal(batch, heads, length, width), normal(batch, groups, length, width)
        self.v = normal(batch, groups, length, width)
        self.angle = torch.rand(length, self.turned // 2, generator=g).repeat(1, 2) * 6
        self.valid = torch.rand(batch, length, generator=g) > 0.2
        self.state = torch.zeros(batch, groups, width + 1, states) if far else None
        self.maps = (
            0.3 * normal(groups, states, width), normal(groups, states), 0.3 * normal(heads, states, width),
            normal(heads, states), 0.3 * normal(groups, width), normal(groups), normal(groups) - 3, normal(heads),
        )  # fmt: skip

    def tables(self, at: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """RoPE's at a position, which a factor as YaRN's must not change."""
        return scale * self.angle[at].cos().expand(1, 1, -1), scale * self.angle[at].sin().expand(1, 1, -1)

    def empty(self) -> Held:
        batch, groups, _, width = self.k.shape
        ring, sink = torch.zeros(batch, groups, self.window, width), torch.zeros(batch, groups, self.sinks, width)
        flags = torch.zeros(batch, self.window + self.sinks, dtype=torch.bool)
        seen = torch.zeros(batch, dtype=torch.long)
        return Held(ring, ring.clone(), flags[:, : self.window], sink, sink.clone(), flags[:, self.window :], seen)

    def read(self, backend: str, softcap: float | None = None, headroom: float = 30.0) -> tuple[Tensor, list[Tensor]]:
        """All answers [B, H, L, P], and what is held and remembered at the end."""
        held, state, answers = self.empty(), self.state, []
        for at in range(self.q.shape[2]):
            far = None if state is None else Far(state, *self.maps, headroom, self.tables(at, 1.3))
            answer, held, state = window_step(
                held, self.q[:, :, at], self.k[:, :, at], self.v[:, :, at], valid_B=self.valid[:, at], scale=0.4,
                softcap=softcap, far=far, backend=backend,
            )  # fmt: skip
            answers.append(answer)
        return torch.stack(answers, 2), [*held, *([] if state is None else [state])]


def close(own: Tensor, expected: Tensor, tolerance: float = 2e-6) -> bool:
    assert own.shape == expected.shape
    return own.numel() == 0 or bool((own - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize("backend", [NATIVE])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("far", [True, False])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_backends_agree(size: tuple[int, ...], far: bool, softcap: float | None, backend: str) -> None:
    text = Text(size, 40, far)
    answers, after = text.read(backend, softcap)
    expected, expected_after = text.read("chunked", softcap)
    assert close(answers, expected, 1e-5)
    for own, other in zip(after, expected_after, strict=True):
        assert own.dtype == other.dtype
        assert torch.equal(own, other) if own.dtype in (torch.bool, torch.long) else close(own, other)


@pytest.mark.parametrize("backend", [NATIVE, "chunked"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_window_is_softmax_over_its_tokens(size: tuple[int, ...], backend: str) -> None:
    text = Text(size, 25, far=False)
    answers, _ = text.read(backend)
    repeat = text.q.shape[1] // text.k.shape[1]
    k, v = (t.repeat_interleave(repeat, 1) for t in (text.k, text.v))
    for b in range(len(text.q)):
        real = [at for at in range(25) if text.valid[b, at]]
        for at in real:
            near = [t for t in real if t <= at and (t > at - text.window or t in real[: text.sinks])]
            weights = (0.4 * text.q[b, :, at, None] * k[b][:, near]).sum(-1).softmax(-1)
            assert close(answers[b, :, at], (weights.unsqueeze(-1) * v[b][:, near]).sum(1), 1e-5)


@pytest.mark.parametrize("backend", [NATIVE, "chunked"])
@pytest.mark.parametrize("headroom", [30.0, 0.5])
def test_window_and_state_share_one_normaliser(backend: str, headroom: float) -> None:
    """The state is a sum over the tokens that left, whatever the headroom."""
    text = Text((1, 2, 1, 8, 4, 2, 3, 8), 12, far=True)
    text.valid[:] = True
    answers, after = text.read(backend, headroom=headroom)
    key_map, key_bias, query_map, query_bias, dt_map, dt_bias, A_log, gate = (t.double() for t in text.maps)
    S = torch.zeros(9, 3, dtype=torch.double)
    for at in range(12):
        cos, sin = (t.double()[:, 0] for t in text.tables(at))
        q, k, v = text.q[0, :, at].double(), text.k[0, 0].double(), text.v[0, 0].double()
        near = [t for t in range(at + 1) if t > at - 4 or t < 2]
        if at - 4 >= 2:
            left = turned(k[at - 4], cos[0], -sin[0])
            dt = torch.nn.functional.softplus(dt_map[0] @ left + dt_bias[0])
            B = (key_map[0] @ left + key_bias[0]).softmax(0)
            x = torch.cat([v[at - 4], torch.ones(1)])
            S = torch.exp(-dt * A_log[0].exp()) * S + dt * torch.outer(x, B)
        for h in range(2):
            weights = torch.exp(0.4 * k[near] @ q[h])
            C = gate[h].clamp_min(0) * torch.exp(query_map[h] @ turned(q[h], cos[0], -sin[0]) + query_bias[h])
            sums = torch.cat([weights @ v[near], weights.sum()[None]]) + S @ C
            assert close(answers[0, h, at].double(), sums[:-1] / sums[-1], 1e-5)
    assert close(after[-1][0, 0].double(), S, 1e-5)
    assert gate.max() > 0


@pytest.mark.parametrize("backend", [NATIVE, "chunked"])
def test_a_padded_token_is_not_counted_and_does_not_enter(backend: str) -> None:
    text = Text((2, 1, 1, 4, 3, 2, 1, 4), 6, far=True)
    text.valid[0], text.valid[1] = True, False
    _, after = text.read(backend)
    held, state = Held(*after[:7]), after[7]
    assert held.seen_B.tolist() == [6, 0]
    assert held.valid_BR.tolist() == [[True] * 3, [False] * 3]
    # the first two became sinks, the third entered the state
    assert held.filled_BS.tolist() == [[True, True], [False, False]]
    assert state[0].abs().sum() > 0
    assert state[1].abs().sum() == 0


@pytest.mark.parametrize("backend", [NATIVE])
def test_tensors_that_are_no_block_are_read_as_they_are(backend: str) -> None:
    text = Text(SIZES["grouped"], 20, far=True)
    expected, _ = text.read(backend)
    text.q, text.k, text.v = (t.transpose(0, 2).contiguous().transpose(0, 2) for t in (text.q, text.k, text.v))
    answers, _ = text.read(backend)
    assert torch.equal(answers, expected)


def test_half_types_and_gradients_take_plain_torch(caplog: pytest.LogCaptureFixture) -> None:
    text = Text(SIZES["grouped"], 3, far=False)
    held = text.empty()
    BACKENDS._logged.clear()

    def answered(held: Held, q_BHP: Tensor, backend: str | None = None) -> Tensor:
        k, v = (t[:, :, 0].to(held.k_BGRP.dtype) for t in (text.k, text.v))
        return window_step(held, q_BHP, k, v, scale=0.4, backend=backend)[0]

    q = text.q[:, :, 0]
    with caplog.at_level(logging.WARNING):
        half = answered(Held(*(t.bfloat16() if t.is_floating_point() else t for t in held)), q.bfloat16())
    assert close(half, answered(held, q), 2e-2)
    if "native" not in BACKENDS.refusals(CPU):
        assert any("float32" in line for line in caplog.messages)
    # the window holds this token and no other
    answer = answered(held, q.clone().requires_grad_(True), "chunked")
    assert answer.requires_grad
    assert answered(held, q.clone().requires_grad_(True)).requires_grad
    with pytest.raises(UserError, match="must name a backend"):
        answered(held, q, backend="natve")
