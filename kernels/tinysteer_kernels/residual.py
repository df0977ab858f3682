"""The op `add_steer_norm`: what lies between two products of a decoder, in one launch.

    delta <- rms_norm(delta)     Gemma's post-norm, if any
    x     <- x + delta
    x     <- the edits of its row, as `steer` makes them
    y     <- rms_norm(x)         for the next block, or for the head

B  batch     T  positions     D  model width

x and delta are read once, x and y written once: 8 B T D bytes in 16 bits, and the directions.
One after another the three steps move 6 + 4 + 4, Gemma's post-norm 4 more.

Every step rounds where Hugging Face's models round: the sum to x's type; the norm in float32, then
either rounded and multiplied by the weight (Llama, Mistral, Phi-3), or multiplied by offset +
weight and rounded (Gemma). So a row without edits comes out as from the unfused steps: x to the
bit, y but for sums of squares in another order.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import edits as editing
from .checks import check_edits, check_surroundings
from .devices import as_is, as_op, tl, triton
from .edits import acting, edited, fits, place, positions, tiling
from .tables import PADDING, Edits

# The formula.


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x (..., D), weight (D,) -> x / rms(x) * (offset + weight), rounded as its family does."""
    y = F.rms_norm(x.float(), x.shape[-1:], eps=eps)
    if offset:  # rounded after the weight, as Gemma was trained
        return (y * (offset + weight.float())).to(x.dtype)
    return y.to(x.dtype) * weight


def formula(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    post_weight: Tensor | None,
    bank: Tensor | None,
    edits: Edits | None,
    position: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What `add_steer_norm` computes, in PyTorch."""
    if post_weight is not None:
        delta = rms_norm(delta, post_weight, eps, offset)
    x = (x + delta).contiguous()
    if edits is not None:
        editing.formula(x, bank, edits, position)
    return x, rms_norm(x, weight, eps, offset)


# The kernel.


@triton.jit
def normed(h, weight, eps, D: tl.constexpr, OFFSET: tl.constexpr, dtype: tl.constexpr):
    """h (BLOCK_T, BLOCK_D) float32, 0 beyond D; weight (BLOCK_D,) -> rms_norm, not yet rounded."""
    y = h * tl.rsqrt(tl.sum(h * h, axis=1) / D + eps)[:, None]
    if OFFSET != 0:
        y *= (OFFSET + weight.to(tl.float32))[None, :]
    else:
        y = y.to(dtype).to(tl.float32) * weight.to(tl.float32)[None, :]
    return y


@triton.jit
def add_steer_norm_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    post_weight_ptr,
    bank_ptr,
    edits,
    position_ptr,
    x_out_ptr,
    y_out_ptr,
    x_stride_b,
    x_stride_t,
    delta_stride_b,
    delta_stride_t,
    T,
    k_blocks,
    eps,
    D: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PADDING: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    K = k_blocks * BLOCK_K
    row, t, column, inside = place(T, D, BLOCK_T, BLOCK_D)
    if edits is not None:
        at = positions(position_ptr, row, t, T, PADDING)
        now = acting(edits, at, row, 0, K, BLOCK_K)
    x_ptr += row * x_stride_b + t[:, None] * x_stride_t + column[None, :]
    delta_ptr += row * delta_stride_b + t[:, None] * delta_stride_t + column[None, :]
    h = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    delta = tl.load(delta_ptr, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0)
    if post_weight_ptr is not None:
        post_weight = tl.load(post_weight_ptr + column, mask=column < D, other=0.0)
        delta = normed(delta, post_weight, eps, D, OFFSET, dtype).to(dtype).to(tl.float32)
    h = (h + delta).to(dtype).to(tl.float32)
    if edits is not None:
        h, _ = edited(h, at, now, row, column, bank_ptr, edits, K, D, BLOCK_T, BLOCK_K)
        h = h.to(dtype).to(tl.float32)
    out = (row * T + t)[:, None] * D + column[None, :]
    tl.store(x_out_ptr + out, h, mask=inside)
    tl.store(y_out_ptr + out, normed(h, weight, eps, D, OFFSET, dtype), mask=inside)


# The op and its launcher.


def add_steer_norm(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    post_weight: Tensor | None = None,
    bank: Tensor | None = None,
    edits: Edits | None = None,
    position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x + delta, steered, and its RMSNorm: two new tensors (B, T, D).

    x and delta (B, T, D) of one type; weight, post_weight (D,) of the same. offset: 1 for Gemma's
    norms, whose weights are stored less 1. bank, edits and position are `steer`'s; without edits
    nothing is steered. ValueError for sizes, types or devices that do not go together.

    On a GPU one launch, as fit for CUDA graphs as `steer`.
    """
    check_surroundings(x, delta, weight, post_weight)
    if edits is not None:
        if bank is None:
            raise ValueError("edits need the bank of directions that they name")
        check_edits(x, bank, edits, position)
    if edits is None or not edits.index.shape[1]:
        bank = edits = position = None
    elif position is not None:
        position = position.contiguous()
    if as_op(x, delta, weight, *([] if post_weight is None else [post_weight])):
        tables = [] if edits is None else list(edits)
        return op(x, delta, weight, eps, offset, post_weight, bank, tables, position)
    with as_is(x):
        return formula(x, delta, weight, eps, offset, post_weight, bank, edits, position)


@torch.library.custom_op(f"{__package__}::add_steer_norm", mutates_args=())
def op(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    post_weight: Tensor | None,
    bank: Tensor | None,
    edits: Sequence[Tensor],
    position: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tables, run = Edits(*edits) if edits else None, launch if fits(x) else formula
    with as_is(x):
        return run(x, delta, weight, eps, offset, post_weight, bank, tables, position)


@op.register_fake
def _(x, delta, weight, eps, offset, post_weight, bank, edits, position):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def launch(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    post_weight: Tensor | None,
    bank: Tensor | None,
    edits: Edits | None,
    position: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel: one program for BLOCK_T positions of a row."""
    (B, T, D), K = x.shape, 0 if edits is None else edits.index.shape[1]
    sizes = [tensor.itemsize for tensor in (x, bank) if tensor is not None]
    tile, n_warps = tiling(T, D, K, max(sizes))
    x_out, y_out = x.new_empty(x.shape), x.new_empty(x.shape)
    add_steer_norm_kernel[(B * triton.cdiv(T, tile["BLOCK_T"]),)](
        x_ptr=x,
        delta_ptr=delta,
        weight_ptr=weight,
        post_weight_ptr=post_weight,
        bank_ptr=bank,
        edits=edits,
        position_ptr=position,
        x_out_ptr=x_out,
        y_out_ptr=y_out,
        x_stride_b=x.stride(0),
        x_stride_t=x.stride(1),
        delta_stride_b=delta.stride(0),
        delta_stride_t=delta.stride(1),
        T=T,
        k_blocks=K // tile["BLOCK_K"],
        eps=eps,
        D=D,
        OFFSET=offset,
        **tile,
        PADDING=PADDING,
        num_warps=n_warps,
    )
    return x_out, y_out
