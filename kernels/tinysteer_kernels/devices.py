"""Where the kernels run, where PyTorch's formulas do their work instead, and who must know of it.

A CPU build of torch launches no kernel, and Triton takes 0.2 s to import: there it is left alone,
unless TRITON_INTERPRET is set (1 interprets kernels, 0 is for compiling them without a GPU).
Without Triton enough of its name is here for the kernels' files to be read.
"""

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import Parameter

try:
    if not (torch.version.cuda or torch.version.hip or "TRITON_INTERPRET" in os.environ):
        raise ImportError
    import triton
    import triton.language as tl
except ImportError:  # or macOS, or Windows

    class triton:  # type: ignore[no-redef] # noqa: N801
        jit = staticmethod(lambda function: function)

    class tl:  # type: ignore[no-redef] # noqa: N801
        constexpr = int


HAS_TRITON = hasattr(triton, "runtime")
# Asked once: torch.compile does not always see through the question.
AUTOCAST = {kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)}
KERNELS: ContextVar[bool] = ContextVar("kernels", default=True)


@contextmanager
def use_kernels(on: bool) -> Iterator[None]:
    """In it the kernels serve, or where `on` is False the formulas, on a GPU too."""
    token = KERNELS.set(on)
    try:
        yield
    finally:
        KERNELS.reset(token)


def serves(x: Tensor, *others) -> bool:
    """Whether a kernel can run on x. The formulas always can, and are what autograd follows."""
    wanted = x.is_cuda and not wants_gradient(x, *others) and KERNELS.get()
    return wanted and capable(x.device.index)


def wants_gradient(*arguments) -> bool:
    """Backwards for one of the arguments, or forwards for any."""
    wanted = torch.is_grad_enabled() and any(getattr(t, "requires_grad", 0) for t in arguments)
    return wanted or torch.autograd.forward_ad._current_level >= 0


@functools.cache
def capable(device: int) -> bool:
    """Whether a GPU can run the kernels. Says once what is missing."""
    need = 'Triton, which is not installed here: on Linux, pip install "tinysteer[gpu]"'
    if HAS_TRITON:
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return True
        need = f"a compute capability of 8.0, which {torch.cuda.get_device_name(device)} has not"
    warnings.warn(f"the kernels need {need}. PyTorch's formulas serve, slower", stacklevel=3)
    return False


def as_is(x: Tensor, launched: bool) -> AbstractContextManager:
    """In it a launch goes to x's own GPU, or autocast keeps away from sums in float32."""
    kind = x.device.type
    if launched:
        return torch.cuda.device_of(x) if x.is_cuda else nullcontext()
    if kind in AUTOCAST and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def traced(*arguments) -> bool:
    """Whether something looks on that must see an op, and not what it does: torch.compile, fake
    tensors, another dispatch mode, torch.func, a subclass. The dispatcher costs more than a launch.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or any(isinstance(t, Tensor) and type(t) not in (Tensor, Parameter) for t in arguments)
    ) and not wants_gradient(*arguments)


def op(name: str, fake: Callable, mutates: Sequence[str] = ()) -> Callable[[Callable], Callable]:
    """A function as an op of PyTorch's, under its name and this package's.

    Another copy of the package has ops of its own, one below another package too.
    """

    def refuse(*_):
        raise RuntimeError(
            f"{name} has no rule for vmap: its first dimension is a batch already, so fold yours "
            "into it (x.flatten(0, 1), and a `slot` of the tables for each row)"
        )

    def register(function: Callable) -> Callable:
        full = f"{__package__.replace('.', '_')}::{name}"
        custom = torch.library.custom_op(full, mutates_args=mutates)(function)
        custom.register_fake(fake)
        custom.register_vmap(refuse)
        return custom

    return register
