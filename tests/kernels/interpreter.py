"""Mends bfloat16 in Triton's interpreter, which keeps the bit patterns in uint16 and computes on those.

Values stay stored as bits; every operation that has a bfloat16 operand is done in float32 and rounded to nearest even,
as hardware does. Imported by conftest.py where kernels are interpreted, before any kernel runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

ARITHMETIC = {np.add, np.subtract, np.multiply, np.divide, np.minimum, np.maximum, np.fmin, np.fmax, np.fmod}
COMPARISON = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bits, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _float32(handle: Any) -> Any:
    return interpreter.TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _bf16(values: np.ndarray) -> Any:
    return interpreter.TensorHandle(narrow(values), tl.bfloat16)


_Builder = interpreter.InterpreterBuilder
_binary, _unary, _dot, _cast = _Builder.binary_op, _Builder.unary_op, _Builder.create_dot, _Builder.cast_impl


def _mended_binary(self: Any, left: Any, right: Any, op: Any) -> Any:
    if not _is_bf16(left) or op not in ARITHMETIC | COMPARISON:
        return _binary(self, left, right, op)
    result = op(widen(left.data), widen(right.data))
    return _bf16(result) if op in ARITHMETIC else interpreter.TensorHandle(result, tl.int1)


def _mended_unary(self: Any, value: Any, op: Any) -> Any:
    return _bf16(op(widen(value.data))) if _is_bf16(value) else _unary(self, value, op)


def _mended_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _dot(self, _float32(a), _float32(b), *rest)


def _mended_cast(self: Any, source: Any, target: Any, *_rounding: Any) -> Any:
    if target.scalar == tl.bfloat16:
        return source if _is_bf16(source) else _bf16(_cast(self, source, tl.float32).data)
    return (
        _float32(source) if _is_bf16(source) and target.scalar == tl.float32 else _cast(self, _float32(source), target)
    )


def mend() -> None:
    """Replaces the interpreter's binary, unary, dot and cast operations."""
    _Builder.binary_op, _Builder.unary_op, _Builder.create_dot = _mended_binary, _mended_unary, _mended_dot
    _Builder.cast_impl = _Builder.create_fp_to_fp = _mended_cast
