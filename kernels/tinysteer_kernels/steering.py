"""The op `steer`: x += the moves of its row, in order, in one pass over the residual stream.

B  batch    T  positions    D  model width    R  rows of the tables    K  moves of one
N  directions in the bank

tables.py says what a move is, and why K dot products, a recurrence of K scalars and one weighted
sum do. Here are, downwards, that formula in PyTorch, the kernel, and the op with its launcher.

The kernel reads and writes x once and reads each row's directions: in 16 bits 4 B T D + 2 B K D
bytes at least, where one hook a move takes 4 B T D each. Decoding, it mostly waits for two reads,
one after the other: of a table, and of the direction that it names.
"""

import torch
from torch import Tensor

from .checks import check_steering, check_stream
from .devices import as_is, op, serves, tl, traced, triton
from .tables import PADDING, MoveTables

MAX_D = 16384  # a program holds whole positions in registers
NOWHERE = tl.constexpr(PADDING)


def steer_reference(
    x: Tensor, bank: Tensor, tables: MoveTables, position: Tensor | None, slot: Tensor | None
) -> Tensor:
    """What `steer` computes, in PyTorch and in place."""
    tables = tables if slot is None else tables.of_rows(slot)
    h, u = x.float(), directions_of(bank, tables)
    d = moves_of(h, u, tables, position)
    moved = (d != 0).any(-1, keepdim=True)
    return x.copy_(torch.where(moved, (h + d @ u).to(x.dtype), x))


def directions_of(bank: Tensor, tables: MoveTables) -> Tensor:
    """The direction of every move, (B, K, D) float32, zeros where a row has none."""
    index = tables.index
    u = bank.detach()[index.long().clamp(min=0)].float()
    return torch.where((index >= 0)[..., None], u, 0.0)  # another row's NaN stays with it


def moves_of(h: Tensor, u: Tensor, tables: MoveTables, position: Tensor | None) -> Tensor:
    """d of every move at every position, (B, T, K), 0 where it does not act.

    h (B, T, D) and u (B, K, D) float32, position (B, T) int32 or None: all 0.
    """
    p = h @ u.mT  # (B, T, K)
    d = torch.zeros_like(p)
    at = p.new_zeros(1, 1, 1) if position is None else position[..., None]
    bias, slope, low, high = tables.bias, tables.slope, tables.low, tables.high
    acts = (tables.first[:, None] <= at) & (at <= tables.last[:, None])
    acts &= (tables.index >= 0)[:, None]
    for k in range(u.shape[1]):
        seen = p[..., k] + (d * tables.gram[:, None, k]).sum(-1)  # (B, T)
        move = bias[:, k, None] - torch.where(slope[:, k, None] != 0, slope[:, k, None] * seen, 0.0)
        move = move.clamp(low[:, k, None], high[:, k, None])
        d[..., k] = move.where(acts[..., k], 0.0)
    return d


@triton.jit
def tile_of(T, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's row, positions t (BLOCK_T,), columns (BLOCK_D,), and which of those exist."""
    t_blocks = tl.cdiv(T, BLOCK_T)
    row = (tl.program_id(0) // t_blocks).to(tl.int64)
    t = (tl.program_id(0) % t_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_D)
    return row, t, column, (t < T)[:, None] & (column < D)[None, :]


@triton.jit
def positions_of(position_ptr, slot_ptr, row, t, T):
    """Where the program's tokens stand, (BLOCK_T,) int32, and which row of the tables is theirs."""
    entry = row
    if slot_ptr is not None:
        entry = tl.load(slot_ptr + row).to(tl.int64)
    if position_ptr is None:
        at = tl.where(t < T, 0, NOWHERE)
    else:
        at = tl.load(position_ptr + row * T + t, mask=t < T, other=NOWHERE)
    return at, entry


@triton.jit
def line(tables_ptr, entry, i, K):
    """Line i of a row's table: 0 index, 1 bias, 2 slope, 3 low, 4 high, 5 first, 6 last, 7.. G."""
    return tables_ptr + (entry * (7 + K) + i) * K


@triton.jit
def acting(tables_ptr, at, entry, k0, K, BLOCK_K: tl.constexpr):
    """Of the moves from k0 on: directions (BLOCK_K,), which act at `at`, and if any projects."""
    k = k0 + tl.arange(0, BLOCK_K)
    some = tl.where(entry >= 0, k < K, False)
    index = tl.load(line(tables_ptr, entry, 0, K) + k, mask=some, other=-1)
    first = tl.load(line(tables_ptr, entry, 5, K) + k, mask=some, other=0)
    last = tl.load(line(tables_ptr, entry, 6, K) + k, mask=some, other=-1)
    slope = tl.load(line(tables_ptr, entry, 2, K) + k, mask=some, other=0)
    acts = (index >= 0) & (first <= at) & (at <= last)
    projects = acts & (slope.to(tl.float32, bitcast=True) != 0)
    return index, acts, tl.max(projects.to(tl.int32), axis=0)


@triton.jit
def moved_by(h, at, now, entry, column, bank_ptr, tables_ptr, K, D: tl.constexpr):
    """h (BLOCK_T, BLOCK_D) float32, at (BLOCK_T,) -> h after the row's moves, and where it moved.

    While decoding, several moves of one position share a reduction over D, and the Gram matrix
    tells each what those before it did; in a prefill several positions share the load of one move.
    So a tile is (moves, width) or (positions, width), for the sake of registers. From block to
    block h itself carries the moves. `now` is `acting` of the first block, loaded beside h; `ahead`
    that of the next, loaded while this one is worked on.
    """
    index, acts, projects = now
    BLOCK_T: tl.constexpr = h.shape[0]
    BLOCK_K: tl.constexpr = index.shape[0]
    tl.static_assert(BLOCK_T == 1 or BLOCK_K == 1)
    lane = tl.arange(0, BLOCK_K)
    moved = tl.full((BLOCK_T,), False, tl.int1)
    for k0 in range(0, K, BLOCK_K):
        ahead = acting(tables_ptr, at, entry, k0 + BLOCK_K, K, BLOCK_K)
        if tl.max(acts.to(tl.int32), axis=0) > 0:
            k = k0 + lane
            wanted = (acts if BLOCK_T == 1 else index >= 0)[:, None] & (column < D)[None, :]
            u_ptr = bank_ptr + index.to(tl.int64)[:, None] * D + column[None, :]
            bias = tl.load(line(tables_ptr, entry, 1, K) + k).to(tl.float32, bitcast=True)
            slope = tl.load(line(tables_ptr, entry, 2, K) + k).to(tl.float32, bitcast=True)
            low = tl.load(line(tables_ptr, entry, 3, K) + k).to(tl.float32, bitcast=True)
            high = tl.load(line(tables_ptr, entry, 4, K) + k).to(tl.float32, bitcast=True)
            gram = ()  # rows of the block, which are its columns: read before the reduction's wait
            for j in tl.static_range(BLOCK_K - 1):
                g = tl.load(line(tables_ptr, entry, 7 + k0 + j, K) + k)
                gram += (g.to(tl.float32, bitcast=True),)  # type: ignore[assignment]
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
                move = tl.where(acts & (lane == j), move, 0.0)
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
    tables_ptr,
    position_ptr,
    slot_ptr,
    stride_b,
    stride_t,
    T,
    k_blocks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K = k_blocks * BLOCK_K  # visibly a multiple: a block of a table is one aligned load
    row, t, column, inside = tile_of(T, D, BLOCK_T, BLOCK_D)
    at, entry = positions_of(position_ptr, slot_ptr, row, t, T)
    now = acting(tables_ptr, at, entry, 0, K, BLOCK_K)
    x_ptr += row * stride_b + t[:, None] * stride_t + column[None, :]
    h = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    h, moved = moved_by(h, at, now, entry, column, bank_ptr, tables_ptr, K, D)
    tl.store(x_ptr, h, mask=inside & moved[:, None])  # the one rounding


def steer(
    x: Tensor,
    bank: Tensor,
    tables: MoveTables,
    position: Tensor | None = None,
    slot: Tensor | None = None,
) -> Tensor:
    """Move x (B, T, D) in place and return it.

    bank (N, D) holds unit rows; position (B, T) int32 says where a token stands (see Move), None
    that all stand at 0, as the last prompt token does; slot (B,) int32 which of the tables' R rows
    serves a row of x, below 0 none, None that row b serves row b. Slots are below R and the tables'
    directions below N: on a GPU nobody looks. Sums in float32 and rounds once; where nothing moves
    x keeps its bits. x is float32, float16 or bfloat16 and may be strided but for D; the bank's
    type is best x's own. Gradients pass to x, none to the bank. ValueError for sizes, types or
    devices that do not go together.

    On a GPU one launch, without host reads and, where position is contiguous, without allocation:
    fit for CUDA graphs, once it has run with the same shapes, strides, types and alignments. What
    tables and slots hold may then change between replays.
    """
    check_stream(x)
    if any(stride == 0 and n > 1 for stride, n in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(f"x has strides {x.stride()}: it cannot be written where rows overlap")
    steering = prepared(x, bank, tables, position, slot)
    if steering[1] is not None:
        (steer_op if traced(x, *steering) else steer_run)(x, *steering)
    return x


def prepared(x: Tensor, bank: Tensor, tables: MoveTables, position, slot) -> tuple:
    """bank, tables, position, slot: checked, and as an op takes them; without moves all None."""
    check_steering(x, bank, tables, position, slot)
    if not tables.packed.numel() or not bank.shape[0]:
        return None, None, None, None
    position = None if position is None else position.contiguous()
    return bank.detach() if bank.requires_grad else bank, tables.packed, position, slot


def steer_run(
    x: Tensor, bank: Tensor, packed: Tensor, position: Tensor | None, slot: Tensor | None
) -> None:
    """By the kernel where one can run, else by the formula."""
    launched = fits(x)
    with as_is(x, launched):
        (steer_launch if launched else steer_reference)(x, bank, MoveTables(packed), position, slot)
    if launched:  # which autograd does not see
        torch.autograd.graph.increment_version(x)


steer_op = op("steer", lambda *_: None, mutates=("x",))(steer_run)


def steer_launch(x, bank, tables: MoveTables, position, slot) -> None:
    """Run the kernel: one program for BLOCK_T positions of a row."""
    (B, T, D), K = x.shape, tables.packed.shape[2]
    tile, n_warps = steer_tiling(T, D, K, max(x.itemsize, bank.itemsize))
    steer_kernel[(B * triton.cdiv(T, tile["BLOCK_T"]),)](
        *(x, bank, tables.packed, position, slot, *x.stride()[:2], T, K // tile["BLOCK_K"]),
        D=D,
        **tile,
        num_warps=n_warps,
    )


def fits(x: Tensor, *others) -> bool:
    """Whether the kernels can run on x, whose positions they hold whole."""
    return x.shape[2] <= MAX_D and serves(x, *others)


def steer_tiling(T: int, D: int, K: int, itemsize: int) -> tuple[dict[str, int], int]:
    """Block sizes and warps for T positions of a row with K moves, elements of `itemsize` bytes.

    A thread holds 64 bytes of a position where that is wide, and as many of each of four directions
    or of a second position: no spills, loads of 128 bits (tests/test_compiles.py). On an H200, four
    bfloat16 targets of add_steer_norm: 4 warps take 4.0 us for a row of width 4096, 8 take 6.4; for
    8192 positions 74 and 84 us; at 2048 2 take 40 and 8 take 50, but one row is as fast by 8.
    """
    block_d = triton.next_power_of_2(D)
    fewest = min(block_d // 256, 2 if T > 1 else 8 if block_d <= 2048 else 4)
    n_warps = min(max(block_d * itemsize // 2048, fewest, 1), 16)
    share = max(block_d // (32 * n_warps), 1)  # of a position, to a thread
    block_t, block_k = 1, 1
    if T > 1:
        block_t = min(4, triton.next_power_of_2(T), max(128 // (share * itemsize), 1))
    elif share <= (16 if n_warps == 16 else 32):  # 16 warps have 128 registers a thread
        block_k = min(4, K & -K, 512 // (share * itemsize**2))  # float32 takes more registers
    return {"BLOCK_D": block_d, "BLOCK_T": block_t, "BLOCK_K": max(block_k, 1)}, n_warps
