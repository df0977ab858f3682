"""The op `steer`: x += the edits of its row, in order, in one pass over the residual stream.

B  batch     T  positions     D  model width     K  edits per row     N  directions in the bank

tables.py says what an edit is, and why K dot products, a recurrence of K scalars and one weighted
sum do: with p = U h and G = U U^T the k-th edit sees p_k + sum_{j<k} d_j G_kj. Here are, downwards,
that formula in PyTorch, the kernel, and the op with its launcher.

The kernel reads and writes x once and reads each row's directions: in 16 bits 4 B T D + 2 B K D
bytes at least, where one hook an edit moves 4 B T D each. Past a few thousand positions that
decides; while decoding it is the two reads that wait for each other, of a table and of the
direction it names.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_edits, check_stream
from .devices import as_is, as_op, serves, tl, triton
from .tables import PADDING, Edits

MAX_D = 16384  # a program holds whole positions in registers


# The formula.


def formula(x: Tensor, bank: Tensor, edits: Edits, position: Tensor | None) -> Tensor:
    """What `steer` computes, in PyTorch and in place."""
    h, u = x.float(), directions(bank, edits)
    d = moves(h, u, edits, position)
    moved = (d != 0).any(-1, keepdim=True)
    return x.copy_(torch.where(moved, (h + d @ u).to(x.dtype), x))


def directions(bank: Tensor, edits: Edits) -> Tensor:
    """The direction of every edit, (B, K, D) float32, zeros where a row has none."""
    u = bank.detach()[edits.index.long().clamp(min=0)].float()
    return torch.where((edits.index >= 0)[..., None], u, 0.0)  # another row's NaN stays with it


def moves(h: Tensor, u: Tensor, edits: Edits, position: Tensor | None) -> Tensor:
    """d of every edit at every position, (B, T, K), 0 where it does not act.

    h (B, T, D) and u (B, K, D) float32, position (B, T) int32 or None: all 0.
    """
    p = h @ u.mT  # (B, T, K)
    d = torch.zeros_like(p)
    at = p.new_zeros(p.shape[:2], dtype=torch.int32) if position is None else position
    at = at[..., None]
    acts = (edits.first[:, None] <= at) & (at <= edits.last[:, None]) & (edits.index >= 0)[:, None]
    for k in range(u.shape[1]):
        seen = p[..., k] + (d * edits.gram[:, None, k]).sum(-1)  # (B, T)
        slope = edits.slope[:, k, None]
        move = edits.bias[:, k, None] - torch.where(slope != 0, slope * seen, 0.0)
        move = move.clamp(edits.low[:, k, None], edits.high[:, k, None])
        d[..., k] = move.where(acts[..., k], 0.0)
    return d


# The kernel.


@triton.jit
def place(T, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's row, positions t (BLOCK_T,), columns (BLOCK_D,), and which of those exist."""
    t_blocks = tl.cdiv(T, BLOCK_T)
    row = (tl.program_id(0) // t_blocks).to(tl.int64)
    t = (tl.program_id(0) % t_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_D)
    return row, t, column, (t < T)[:, None] & (column < D)[None, :]


@triton.jit
def positions(position_ptr, row, t, T, PADDING: tl.constexpr):
    """Where the program's tokens stand, (BLOCK_T,) int32."""
    if position_ptr is None:
        at = tl.where(t < T, 0, PADDING)
    else:
        at = tl.load(position_ptr + row * T + t, mask=t < T, other=PADDING)
    return at


@triton.jit
def acting(edits, at, row, k0, K, BLOCK_K: tl.constexpr):
    """Of the edits from k0 on: directions (BLOCK_K,), which act at `at`, and if any projects."""
    slot = k0 + tl.arange(0, BLOCK_K)
    k = row * K + slot
    index = tl.load(edits.index + k, mask=slot < K, other=-1)
    first = tl.load(edits.first + k, mask=slot < K, other=0)
    last = tl.load(edits.last + k, mask=slot < K, other=-1)
    slope = tl.load(edits.slope + k, mask=slot < K, other=0.0)
    acts = (index >= 0) & (first <= at) & (at <= last)
    return index, acts, tl.max((acts & (slope != 0)).to(tl.int32), axis=0)


@triton.jit
def edited(
    h,
    at,
    now,
    row,
    column,
    bank_ptr,
    edits,
    K,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h (BLOCK_T, BLOCK_D) float32, at (BLOCK_T,) -> h after the row's edits, and where it moved.

    While decoding, several edits of one position share a reduction over D, and the Gram matrix
    tells each what those before it did; in a prefill several positions share the load of one edit.
    So one of BLOCK_T and BLOCK_K is 1, for the sake of registers: a tile is (edits, width) or
    (positions, width). From block to block h itself carries the moves. `now` is `acting` of the
    first block, loaded beside h; `ahead` that of the next, loaded while this one is worked on.
    """
    tl.static_assert(BLOCK_T == 1 or BLOCK_K == 1)
    slot = tl.arange(0, BLOCK_K)
    moved = tl.full((BLOCK_T,), False, tl.int1)
    index, acts, projects = now
    for k0 in range(0, K, BLOCK_K):
        ahead = acting(edits, at, row, k0 + BLOCK_K, K, BLOCK_K)
        if tl.max(acts.to(tl.int32), axis=0) > 0:
            k = row * K + k0 + slot
            wanted = (acts if BLOCK_T == 1 else index >= 0)[:, None] & (column < D)[None, :]
            u_ptr = bank_ptr + index.to(tl.int64)[:, None] * D + column[None, :]
            bias, slope = tl.load(edits.bias + k), tl.load(edits.slope + k)
            low, high = tl.load(edits.low + k), tl.load(edits.high + k)
            gram = ()  # rows of the block, which are its columns: read before the reduction's wait
            for j in tl.static_range(BLOCK_K - 1):
                g_ptr = edits.gram + (row * K + k0 + j) * K + k0 + slot
                gram += (tl.load(g_ptr, mask=slot > j, other=0.0),)
            # Directions are read twice, which is cheap while they stay in the cache: kept for the
            # second use, they would crowd the registers.
            p = tl.zeros((BLOCK_T * BLOCK_K,), tl.float32)
            if projects > 0:
                u = tl.load(u_ptr, mask=wanted, other=0.0, eviction_policy="evict_last")
                p = tl.sum(u.to(tl.float32) * h, axis=1)
            d = tl.zeros_like(p)
            for j in tl.static_range(BLOCK_K):
                move = bias - tl.where(slope != 0, slope * p, 0.0)  # an add keeps clear of inf
                move = tl.maximum(move, low, tl.PropagateNan.ALL)
                move = tl.minimum(move, high, tl.PropagateNan.ALL)
                move = tl.where(acts & (slot == j), move, 0.0)
                d += move
                if j + 1 < BLOCK_K:
                    p += gram[j] * tl.sum(move, axis=0)
            u = tl.load(u_ptr, mask=wanted, other=0.0).to(tl.float32)
            touched, step = d != 0, d[:, None] * u
            if BLOCK_K > 1:  # (1,) and (1, BLOCK_D)
                touched = tl.max(touched.to(tl.int32), axis=0, keep_dims=True) > 0
                step = tl.sum(step, axis=0, keep_dims=True)
            h = tl.where(touched[:, None], h + step, h)  # else -0.0 would become 0.0
            moved |= touched
        index, acts, projects = ahead
    return h, moved


@triton.jit
def steer_kernel(
    x_ptr,
    bank_ptr,
    edits,
    position_ptr,
    stride_b,
    stride_t,
    T,
    k_blocks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PADDING: tl.constexpr,
):
    K = k_blocks * BLOCK_K  # visibly a multiple: a block of a table is one aligned load
    row, t, column, inside = place(T, D, BLOCK_T, BLOCK_D)
    at = positions(position_ptr, row, t, T, PADDING)
    now = acting(edits, at, row, 0, K, BLOCK_K)
    x_ptr += row * stride_b + t[:, None] * stride_t + column[None, :]
    h = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    h, moved = edited(h, at, now, row, column, bank_ptr, edits, K, D, BLOCK_T, BLOCK_K)
    tl.store(x_ptr, h, mask=inside & moved[:, None])  # the one rounding


# The op and its launcher.


def steer(x: Tensor, bank: Tensor, edits: Edits, position: Tensor | None = None) -> Tensor:
    """Edit x (B, T, D) in place and return it.

    bank (N, D) holds unit rows; position (B, T) int32 says where a token stands (see Edit); None
    stands for 0 everywhere, so that windows mean what they mean for the last prompt token. Sums in
    float32 and rounds once. Where no edit moves anything x keeps its bits. x is float32, float16 or
    bfloat16 and may be strided but for D; the bank's type is best x's own. Gradients pass to x,
    none to the bank. ValueError for sizes, types or devices that do not go together.

    On a GPU one launch, without host reads and, where position is contiguous, without allocation:
    fit for CUDA graphs, once it has run with the same shapes, strides, types and alignments. What
    the tables hold may then change between replays. Called eagerly, it is the host that takes
    time: checks and dispatch cost more than the kernel.
    """
    check_stream(x)
    if any(stride == 0 and n > 1 for stride, n in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(f"x has strides {x.stride()}: it cannot be written where rows overlap")
    check_edits(x, bank, edits, position)
    if edits.index.shape[1]:
        position = None if position is None else position.contiguous()
        if as_op(x):
            op(x, bank, list(edits), position)
        else:
            with as_is(x):
                formula(x, bank, edits, position)
    return x


# Named after the package, so that another copy of it can be loaded beside this one.
@torch.library.custom_op(f"{__package__}::steer", mutates_args=("x",))
def op(x: Tensor, bank: Tensor, edits: Sequence[Tensor], position: Tensor | None) -> None:
    with as_is(x):
        (launch if fits(x) else formula)(x, bank, Edits(*edits), position)


@op.register_fake
def _(x: Tensor, bank: Tensor, edits: Sequence[Tensor], position: Tensor | None) -> None:
    return None


def launch(x: Tensor, bank: Tensor, edits: Edits, position: Tensor | None) -> None:
    """Run the kernel: one program for BLOCK_T positions of a row."""
    (B, T, D), K = x.shape, edits.index.shape[1]
    tile, n_warps = tiling(T, D, K, max(x.itemsize, bank.itemsize))
    steer_kernel[(B * triton.cdiv(T, tile["BLOCK_T"]),)](
        x_ptr=x,
        bank_ptr=bank,
        edits=edits,
        position_ptr=position,
        stride_b=x.stride(0),
        stride_t=x.stride(1),
        T=T,
        k_blocks=K // tile["BLOCK_K"],
        D=D,
        **tile,
        PADDING=PADDING,
        num_warps=n_warps,
    )


def fits(x: Tensor) -> bool:
    """Whether the kernels can run on x, whose positions they hold whole."""
    return serves(x) and x.shape[-1] <= MAX_D


def tiling(T: int, D: int, K: int, itemsize: int) -> tuple[dict[str, int], int]:
    """Block sizes and warps for T positions of a row with K edits, elements of `itemsize` bytes.

    A thread holds 32 elements of x at most, and up to 16 of each of four directions: what compiles
    without spills and loads 128 bits at a time (tests/test_compiles.py). Not yet tuned on a GPU.
    """
    block_d = triton.next_power_of_2(D)
    n_warps = min(max(block_d // 256, 1), 8) if block_d <= 4096 else 16
    share = max(block_d // (32 * n_warps), 1)  # of a position, to a thread
    if T > 1:
        block_t, block_k = min(4, triton.next_power_of_2(T), 32 // share), 1
    else:
        block_t, block_k = 1, min(4, K & -K, 128 // (share * itemsize)) if share <= 16 else 1
    return {"BLOCK_D": block_d, "BLOCK_T": block_t, "BLOCK_K": max(block_k, 1)}, n_warps
