"""The op `add_steer_norm`: what lies between two products of a decoder, in one launch.

    delta <- rms_norm(delta)     Gemma's post-norm, if any
    x     <- x + delta
    x     <- the moves of its row, as `steer` makes them
    y     <- rms_norm(x)         for the next block, or for the head

B  batch     T  positions     D  model width

x and delta are read once, x and y written once: 8 B T D bytes in 16 bits, and the directions.
One after another the three steps move 6 + 4 + 4, Gemma's post-norm 4 more.

Every step rounds where Hugging Face's models round: the sum to x's type; the norm in float32, then
either rounded and multiplied by the weight (Llama, Mistral, Phi-3), or multiplied by offset +
weight and rounded (Gemma). So a row without moves comes out as from the unfused steps: x to the
bit, y but for sums of squares in another order.
"""

import torch.nn.functional as F
from torch import Tensor

from .checks import check_residual
from .devices import as_is, op, tl, traced, triton
from .steering import (
    acting,
    fits,
    moved_by,
    positions_of,
    prepared,
    steer_reference,
    steer_tiling,
    tile_of,
)
from .tables import MoveTables


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x (..., D), weight (D,) -> x / rms(x) * (offset + weight), rounded as its family does."""
    y = F.rms_norm(x.float(), x.shape[-1:], eps=eps)
    if offset:  # rounded after the weight, as Gemma was trained
        return (y * (offset + weight.float())).to(x.dtype)
    return y.to(x.dtype) * weight


def add_steer_norm_reference(
    x, delta, weight, eps, offset, post_weight, bank, tables: MoveTables | None, position, slot
) -> tuple[Tensor, Tensor]:
    """What `add_steer_norm` computes, in PyTorch."""
    if post_weight is not None:
        delta = rms_norm(delta, post_weight, eps, offset)
    x = (x + delta).contiguous()
    if tables is not None:
        steer_reference(x, bank, tables, position, slot)
    return x, rms_norm(x, weight, eps, offset)


@triton.jit
def normed(h, weight, eps, D: tl.constexpr, OFFSET: tl.constexpr, dtype: tl.constexpr):
    """h (BLOCK_T, BLOCK_D) float32, 0 beyond D; weight (BLOCK_D,) -> rms_norm, not yet rounded."""
    y = h * tl.rsqrt(tl.sum(h * h, axis=1) / D + eps)[:, None]
    return weighted(y, weight.to(tl.float32)[None, :], OFFSET, dtype)


@triton.jit
def weighted(y, weight, OFFSET: tl.constexpr, dtype: tl.constexpr):
    """The end of an RMSNorm, rounded in between where its family rounds, at the end not yet."""
    if OFFSET != 0:
        y *= OFFSET + weight
    else:
        y = y.to(dtype).to(tl.float32) * weight
    return y


@triton.jit
def add_steer_norm_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    post_weight_ptr,
    bank_ptr,
    tables_ptr,
    position_ptr,
    slot_ptr,
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
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    K = k_blocks * BLOCK_K
    row, t, column, inside = tile_of(T, D, BLOCK_T, BLOCK_D)
    if tables_ptr is not None:
        at, entry = positions_of(position_ptr, slot_ptr, row, t, T)
        now = acting(tables_ptr, at, entry, 0, K, BLOCK_K)
    x_ptr += row * x_stride_b + t[:, None] * x_stride_t + column[None, :]
    delta_ptr += row * delta_stride_b + t[:, None] * delta_stride_t + column[None, :]
    h = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    delta = tl.load(delta_ptr, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0)
    if post_weight_ptr is not None:
        post_weight = tl.load(post_weight_ptr + column, mask=column < D, other=0.0)
        delta = normed(delta, post_weight, eps, D, OFFSET, dtype).to(dtype).to(tl.float32)
    h = (h + delta).to(dtype).to(tl.float32)
    if tables_ptr is not None:
        h, _ = moved_by(h, at, now, entry, column, bank_ptr, tables_ptr, K, D)
        h = h.to(dtype).to(tl.float32)
    out = (row * T + t)[:, None] * D + column[None, :]
    tl.store(x_out_ptr + out, h, mask=inside)
    tl.store(y_out_ptr + out, normed(h, weight, eps, D, OFFSET, dtype), mask=inside)


def add_steer_norm(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    post_weight: Tensor | None = None,
    bank: Tensor | None = None,
    tables: MoveTables | None = None,
    position: Tensor | None = None,
    slot: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x + delta, steered, and its RMSNorm: two new tensors (B, T, D).

    x and delta (B, T, D) of one type; weight, post_weight (D,) of the same. offset: 1 for Gemma's
    norms, whose weights are stored less 1. bank, tables, position and slot are `steer`'s; without
    tables nothing is steered. ValueError for sizes, types or devices that do not go together.

    On a GPU one launch, as fit for CUDA graphs as `steer`.
    """
    check_residual(x, delta, weight, post_weight)
    if tables is not None and bank is None:
        raise ValueError("tables need the bank of directions that they name")
    given = x, bank, tables, position, slot
    steering = (None,) * 4 if tables is None else prepared(*given)  # type: ignore[arg-type]
    arguments = x, delta, weight, eps, offset, post_weight, *steering
    return (add_steer_norm_op if traced(*arguments) else add_steer_norm_run)(*arguments)


def add_steer_norm_run(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    post_weight: Tensor | None,
    bank: Tensor | None,
    packed: Tensor | None,
    position: Tensor | None,
    slot: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """By the kernel where one can run, else by the formula."""
    launched = fits(x, delta, weight, post_weight)
    run = add_steer_norm_launch if launched else add_steer_norm_reference
    steering = bank, None if packed is None else MoveTables(packed), position, slot
    with as_is(x, launched):
        return run(x, delta, weight, eps, offset, post_weight, *steering)


two_like = lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape))  # noqa: E731
add_steer_norm_op = op("add_steer_norm", two_like)(add_steer_norm_run)


def add_steer_norm_launch(
    x, delta, weight, eps, offset, post_weight, bank, tables: MoveTables | None, position, slot
) -> tuple[Tensor, Tensor]:
    """Run the kernel: one program for BLOCK_T positions of a row."""
    (B, T, D), packed = x.shape, None if tables is None else tables.packed
    K, widest = (0, 0) if packed is None else (packed.shape[2], bank.itemsize)
    tile, n_warps = steer_tiling(T, D, K, max(x.itemsize, widest))
    x_out, y_out = x.new_empty(x.shape), x.new_empty(x.shape)
    add_steer_norm_kernel[(B * triton.cdiv(T, tile["BLOCK_T"]),)](
        *(x, delta, weight, post_weight, bank, packed, position, slot, x_out, y_out),
        *(*x.stride()[:2], *delta.stride()[:2], T, K // tile["BLOCK_K"], eps),
        D=D,
        OFFSET=offset,
        **tile,
        num_warps=n_warps,
    )
    return x_out, y_out
