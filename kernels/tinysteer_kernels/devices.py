"""Where the kernels run, and where PyTorch's formulas do their work instead.

A CPU build of torch launches no kernel, and Triton takes 0.2 s to import: there it is left alone,
unless TRITON_INTERPRET is set (1 interprets kernels, 0 is for compiling them without a GPU).
Without Triton enough of its name is here for the kernels' files to be read.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

try:
    if not (torch.version.cuda or torch.version.hip or "TRITON_INTERPRET" in os.environ):
        raise ImportError
    import triton
    import triton.language as tl
except ImportError:  # or macOS, or Windows

    class triton:  # noqa: N801
        jit = staticmethod(lambda function: function)

    class tl:  # noqa: N801
        constexpr = None


HAS_TRITON = hasattr(triton, "runtime")
FUSED: ContextVar[bool] = ContextVar("fused", default=True)


@contextmanager
def fusing(on: bool) -> Iterator[None]:
    """In it the kernels serve, or where `on` is False the formulas, on a GPU too."""
    token = FUSED.set(on)
    try:
        yield
    finally:
        FUSED.reset(token)


def serves(x: Tensor) -> bool:
    """Whether a kernel can run on x; the formulas always can."""
    wanted = x.is_cuda and FUSED.get()
    if wanted and not HAS_TRITON:
        tell_of_triton()
    return wanted and HAS_TRITON


@cache
def tell_of_triton() -> None:
    """Once in a process."""
    warnings.warn(
        "the kernels need Triton, which is not installed here, so PyTorch's formulas do their "
        'work, slower: on Linux, pip install "tinysteer[gpu]"',
        stacklevel=3,
    )


def as_op(*tensors: Tensor) -> bool:
    """Whether to go through PyTorch's dispatcher, for a GPU or a graph.

    On a CPU that costs half as much as the work. Where a gradient is wanted the formula serves,
    which autograd can follow, on any device.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return tensors[0].is_cuda or torch.compiler.is_compiling()


def as_is(x: Tensor) -> AbstractContextManager:
    """In it a launch goes to x's own device, and autocast keeps away from sums in float32."""
    stack = ExitStack()
    if x.is_cuda:
        stack.enter_context(torch.cuda.device_of(x))
    if torch.is_autocast_enabled(x.device.type):
        stack.enter_context(torch.autocast(x.device.type, enabled=False))
    return stack
