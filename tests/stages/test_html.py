"""The HTML report: nothing loaded from elsewhere, every section there, text escaped, what is missing said by name."""

from __future__ import annotations

import base64
import json
import shutil
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ssmorph import cli, verbs
from ssmorph.errors import UserError
from ssmorph.stages.html import read_run, render
from ssmorph.stages.html.page import SECTIONS
from ssmorph.stages.html.pictures import png
from ssmorph.stages.html.plots import line_plot, ticks
from ssmorph.stages.html.run_files import stage_seconds

from .tiny_run import run_tiny

VOID = {"meta", "img", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Tags, addresses and visible text; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: set[str] = set()
        self.tags: list[str] = []
        self.words = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.add(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished and evaluated tiny run, whose report was drawn. Tests only read it."""
    folder = run_tiny(tmp_path_factory.mktemp("html") / "run", "evaluate.suite=short", "evaluate.tokens=192")
    assert verbs.report(folder) == folder / "report.html"
    return folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def edit(folder: Path, change: Any) -> str:
    """The page of a run whose report.json was changed."""
    report = json.loads((folder / "report.json").read_text())
    change(report)
    (folder / "report.json").write_text(json.dumps(report))
    return render(read_run(folder))


def test_the_page_loads_nothing_and_runs_nothing(run: Path) -> None:
    html = (run / "report.html").read_text()
    page = Page(html)
    assert all(a.startswith(("#", "data:image/png;base64,")) for a in page.addresses)
    assert sum(a.startswith("data:") for a in page.addresses) == 6
    assert {"script", "link", "iframe", "base"} & set(page.tags) == set()
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style


def test_every_section_is_there_and_linked(run: Path) -> None:
    page = Page((run / "report.html").read_text())
    anchors = {anchor for anchor, _, _, _ in SECTIONS}
    assert anchors | {"verdict"} <= page.ids
    assert {f"#{a}" for a in anchors} <= set(page.addresses)
    for words in ("KL to the teacher", "attention removed", "states silenced", "needle", "repeated 4-grams", "Spearman",
                  "best: layer", "0-surgery", "run_dir:", "E: window of equal bytes"):  # fmt: skip
        assert words in page.words, words
    # of all that the short suite leaves out, only these
    assert page.words.count("Not measured") == 2


@pytest.mark.parametrize(
    ("key", "anchor"),
    [("work", "work"), ("added", "added"), ("alignment", "alignment"), ("matrices", "matrices"),
     ("generation", "generation"), ("decode", "decoding"), ("text", "controls")],
)  # fmt: skip
def test_what_is_missing_is_said_by_name(copied: Path, key: str, anchor: str) -> None:
    page = Page(edit(copied, lambda report: report.pop(key)))
    what = next(missing for a, _, _, missing in SECTIONS if a == anchor)
    assert f"Not measured: {what}." in page.words
    assert {a for a, _, _, _ in SECTIONS} <= page.ids


def test_a_run_without_trained_stages_or_controls_says_so(copied: Path) -> None:
    (copied / "metrics.jsonl").unlink()

    def change(report: dict[str, Any]) -> None:
        for entry in report["text"]:
            entry["models"] = {n: entry["models"][n] for n in ("teacher", "hybrid")}

    words = Page(edit(copied, change)).words
    assert "Not measured: losses" in words
    assert "Not measured: copy, untrained, attention removed, E: window of equal bytes, untrained." in words


def test_text_is_escaped(copied: Path) -> None:
    evil = '<script>alert("x")</script>&amp;'

    def change(report: dict[str, Any]) -> None:
        report["generation"]["texts"][0]["hybrid"] = evil
        report["text"][0]["set"] = evil

    html = edit(copied, change)
    assert "<script" not in html
    assert evil in Page(html).words


def test_numbers_that_are_none_are_drawn_and_called_out(copied: Path) -> None:
    def change(report: dict[str, Any]) -> None:
        report["text"][0]["models"]["hybrid"] |= {"kl": float("nan"), "perplexity": float("inf")}
        report["alignment"]["stages"][0]["stream"][1] = float("nan")

    words = Page(edit(copied, change)).words
    assert "not-finite" in words
    assert "not a number" in words
    assert "points cannot be drawn" in words


def test_the_verdict_is_on_the_page(copied: Path) -> None:
    def change(report: dict[str, Any]) -> None:
        report["final"] = {"tokenizer_differences": ["vocabulary"]}
        del report["alignment"]

    words = Page(edit(copied, change)).words
    assert "tokenizer-differs" in words
    assert (
        "Not checked, since their measurements are missing: dead-state, worse-than-trained-window, uniform-is-better."
        in words
    )


def test_the_full_suite_is_drawn_where_it_measured_the_same_artifact(copied: Path) -> None:
    report = json.loads((copied / "report.json").read_text())
    full = {**report, "converted": [1, 2, 3]}
    (copied / "report-full.json").write_text(json.dumps(full))
    assert read_run(copied).report["converted"] == [1, 2, 3]
    assert read_run(copied, "short").report["converted"] == [1, 3]
    full["stamp"] = {**full["stamp"], "artifact": "another"}
    (copied / "report-full.json").write_text(json.dumps(full))
    assert read_run(copied).report["converted"] == [1, 3]


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="must be a run directory"):
        verbs.report(tmp_path)
    (copied / "report.json").unlink()
    assert cli.run(["report", str(copied)]) == 2
    assert "must be an evaluated run" in capsys.readouterr().err
    with pytest.raises(UserError, match="--suite full"):
        verbs.report(copied, "full")


def test_a_plot_without_finite_points_and_round_ticks() -> None:
    assert "no finite number" in line_plot("t", "x", "y", [("a", [(0, float("nan"))])])
    assert "1 points cannot be drawn, being 0" in line_plot("t", "x", "y", [("a", [(0, 0.0), (1, 2.0)])], log=True)
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.1, 0.32) == [0.1, 0.15, 0.2, 0.25, 0.3]


def test_png_holds_the_pixels() -> None:
    pixels = bytes(range(16))
    file = png(2, 2, pixels)
    assert struct.unpack(">II", file[16:24]) == (2, 2)
    start = file.index(b"IDAT") + 4
    assert zlib.decompress(file[start:]) == b"\0" + pixels[:8] + b"\0" + pixels[8:]
    assert base64.b64encode(file).startswith(b"iVBOR")


def test_times_of_stages_leave_out_pauses() -> None:
    log = [
        "2026-01-01 00:00:00 0-surgery: starting", "2026-01-01 00:00:01 1-logits: starting",
        "2026-01-01 00:00:11 1-logits: step 1/2", "2026-01-01 05:00:00 1-logits: starting",
        "2026-01-01 05:00:07 1-logits: step 2/2", "2026-01-01 05:00:09 evaluate: text", "a torn line",
    ]  # fmt: skip
    assert stage_seconds(log, ["0-surgery", "1-logits"]) == {"0-surgery": 0.0, "1-logits": 17.0}
