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


def mend() -> None:
    """Replaces the interpreter's binary, unary, dot and cast operations; once per process."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "mended", False):
        return
    binary, unary, dot, cast = builder.binary_op, builder.unary_op, builder.create_dot, builder.cast_impl

    def mended_binary(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not _is_bf16(left) or op not in ARITHMETIC | COMPARISON:
            return binary(self, left, right, op)
        result = op(widen(left.data), widen(right.data))
        return _bf16(result) if op in ARITHMETIC else interpreter.TensorHandle(result, tl.int1)

    def mended_unary(self: Any, value: Any, op: Any) -> Any:
        return _bf16(op(widen(value.data))) if _is_bf16(value) else unary(self, value, op)

    def mended_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _float32(a), _float32(b), *rest)

    def mended_cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            return _bf16(source.data)
        if _is_bf16(source) and target.scalar == tl.float32:
            return _float32(source)
        if _is_bf16(source) and target.scalar == tl.bfloat16:
            return source
        return cast(self, _float32(source), target)

    def mended_float_cast(self: Any, source: Any, target: Any, _rounding: Any) -> Any:
        return mended_cast(self, source, target)

    builder.binary_op, builder.unary_op, builder.create_dot = mended_binary, mended_unary, mended_dot
    builder.cast_impl, builder.create_fp_to_fp, builder.mended = mended_cast, mended_float_cast, True
