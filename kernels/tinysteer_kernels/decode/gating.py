"""The op `gated`: activation(gate) * up, the middle of a gated MLP, in one launch: in 16 bits it
reads 4 bytes and writes 2 for each of the MLP's hidden dimensions.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from ..devices import as_is, op, serves, tl, traced, triton

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
BLOCK = 1024


def gated_reference(gate_up: Tensor, activation: str) -> Tensor:
    """What `gated` computes, in PyTorch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up  # type: ignore[operator]


@triton.jit
def gated_kernel(x_ptr, y_ptr, N: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    x_ptr += row * 2 * N + column
    x = tl.load(x_ptr, mask=column < N, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + N, mask=column < N, other=0.0).to(tl.float32)
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:  # both are x / (1 + exp(-z))
        z = x if ACTIVATION == "silu" else 1.5957691216057308 * (x + 0.044715 * x * x * x)
        x = x / (1 + tl.exp(-z))
    tl.store(y_ptr + row * N + column, x.to(dtype).to(tl.float32) * up, mask=column < N)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """gate_up (B, T, 2N), gates before what they let through -> (B, T, N).

    activation: a key of ACTIVATIONS, rounded before the product. ValueError for others, odd widths.
    """
    if activation not in ACTIVATIONS or gate_up.shape[-1] % 2:
        seen = f"{activation!r:.40} and {tuple(gate_up.shape)}"
        raise ValueError(f"gated takes {', '.join(ACTIVATIONS)} and an even width, not {seen}")
    return (gated_op if traced(gate_up) else gated_run)(gate_up, activation)


def gated_run(gate_up: Tensor, activation: str) -> Tensor:
    """By the kernel where it can run, else by the formula."""
    if not serves(gate_up) or not gate_up.is_contiguous():
        return gated_reference(gate_up, activation)
    with as_is(gate_up, launched=True):
        return gated_launch(gate_up, activation)


gated_op = op("gated", lambda x, _: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))(gated_run)


def gated_launch(gate_up: Tensor, activation: str) -> Tensor:
    """Run the kernel: one program for BLOCK dimensions of a position."""
    N = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], N)
    grid = (y.numel() // N * triton.cdiv(N, BLOCK),)
    gated_kernel[grid](x_ptr=gate_up, y_ptr=y, N=N, ACTIVATION=activation, BLOCK=BLOCK, num_warps=4)
    return y
