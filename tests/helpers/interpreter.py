"""Triton's interpreter with bfloat16 as a GPU has it.

Its own casts truncate, and lose subnormals; its products take the bits for integers. Its other
arithmetic on bfloat16 stays wrong. The kernels use none: they compute in float32.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

convert = interpreter._convert_float
dot = interpreter.InterpreterBuilder.create_dot


def rounding(x, source, target, mode):
    """x as an array of source's bits -> of target's, rounded to nearest even."""
    if (source, target) == (tl.float32, tl.bfloat16):
        values = torch.from_numpy(np.array(x, np.float32))
        return values.bfloat16().view(torch.uint16).numpy()
    if (source, target) == (tl.bfloat16, tl.float32):
        bits = torch.from_numpy(np.array(x).view(np.uint16))
        return bits.view(torch.bfloat16).float().numpy()
    return convert(x, source, target, mode)


def product(self, a, b, *rest):
    """a @ b of bfloat16 in float32, which holds each product of two exactly."""
    if a.dtype.scalar == tl.bfloat16:
        a, b = (
            interpreter.TensorHandle(rounding(x.data, tl.bfloat16, tl.float32, None), tl.float32)
            for x in (a, b)
        )
    return dot(self, a, b, *rest)


interpreter._convert_float = rounding
interpreter.InterpreterBuilder.create_dot = product
