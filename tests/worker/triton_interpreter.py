"""Triton's interpreter, which runs kernels on a CPU: what it needs here.

Tests that run kernels import DEVICE from here: on a machine with a GPU they run there, compiled.
tests/conftest.py chooses the interpreter, before anything imports Triton.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

DEVICE = torch.device("cpu" if knobs.runtime.interpret else "cuda")


def _allow_scalars_as_bounds():
    """Triton 3.6 makes a loop's bound an int by way of an array of one number, which numpy 2.4
    refuses; Triton 3.9 squeezes it."""
    patched = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patched(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def _prepare_once_a_launch():
    """The interpreter puts its own functions in place of Triton's at every call of one kernel's
    function by another, hundreds of times a program; once a launch is enough."""
    launch = interpreter.GridExecutor.__call__
    prepared = set()

    def launched(self, *args, **kwargs):
        prepared.clear()
        return launch(self, *args, **kwargs)

    def called(self, *args, **kwargs):
        modules = [v for v in self.fn.__globals__.values() if v is tl or v is tl.core]
        if (key := tuple(map(id, modules))) not in prepared:
            prepared.add(key)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launched
    interpreter.InterpretedFunction.__call__ = called


def _round_to_nearest():
    """The interpreter cuts bfloat16 off instead of rounding it, and multiplies the bits of such
    matrices as whole numbers."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def widened(bits):
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def converted(numbers, from_dtype, to_dtype, rounding_mode):
        if (from_dtype, to_dtype) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(numbers)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        if (from_dtype, to_dtype) == (tl.bfloat16, tl.float32):
            return widened(numbers)
        return convert(numbers, from_dtype, to_dtype, rounding_mode)

    def multiplied(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(widened(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, *rest)

    interpreter._convert_float = converted
    interpreter.InterpreterBuilder.create_dot = multiplied


_allow_scalars_as_bounds()
_round_to_nearest()
# Each sum of whole numbers is taken twice to see whether it overflows: half of all time.
object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
_prepare_once_a_launch()
