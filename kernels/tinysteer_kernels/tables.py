"""Ordered moves of every row -> the tables that kernels read. In float64, on the host.

R  rows of the tables    K  moves per row    N  directions in the bank    D  model width

A move changes h along one unit direction u by a clipped affine function of its projection,

    d = clip(bias - slope <h, u>, low, high)        h <- h + d u

and the moves of a row act one after another, each on the result of those before it. Only
projections pass between them: with p = U h of the h that came in and the Gram matrix G = U U^T,
move k sees p_k + sum_{j<k} d_j G_kj. So a row's K dot products can all be taken at once, K scalars
follow one from the other, and h is written once, h + sum_k d_k u_k.

A row's table is 7 + K lines of K numbers, 32 bits each: the fields of its moves, then G. So a
kernel has four moves' biases in one load, and all tables are one tensor.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

PADDING = -(2**31)  # the position of a column that holds no token: no move reaches it
ALWAYS = (PADDING + 1, 2**31 - 1)  # first and last of a move that acts everywhere
AT_ONCE = 2**20  # numbers of directions multiplied at once: 16 MB


class Move(NamedTuple):
    """One move of one row. Position 0 is the last prompt token; `last` is included.

    add: bias=weight. To a target: bias=target, slope=1, and low=0 to go only up, high=0 only down.
    Ablation: slope=1.
    """

    index: int = -1  # type: ignore[assignment] # of the direction in the bank; -1: no move
    bias: float = 0.0
    slope: float = 0.0
    low: float = -inf
    high: float = inf
    first: int = ALWAYS[0]
    last: int = ALWAYS[1]


FIELDS = len(Move._fields)
WHOLE = [i for i, kind in enumerate(Move.__annotations__.values()) if kind is int]


def field_view(field: str) -> property:
    """A view of one field of all moves."""
    i = Move._fields.index(field)
    dtype = torch.int32 if i in WHOLE else torch.float32
    return property(lambda tables: tables.packed.view(dtype)[..., i, :])


@dataclass(frozen=True, eq=False)
class MoveTables:
    """The moves of R rows, or of R rows in each of several layers: `tables[layer]` is a view.

    Views by name: index (-1: no move), first and last (..., R, K) int32; bias, slope, low and high
    float32; gram (..., R, K, K) float32, <u_k, u_j>.
    """

    packed: Tensor  # (..., R, 7 + K, K) int32, which holds the bits of float32 too

    index, bias, slope, low, high, first, last = map(field_view, Move._fields)
    gram = property(lambda tables: tables.packed.view(torch.float32)[..., FIELDS:, :])

    def __getitem__(self, layer: int) -> "MoveTables":
        return MoveTables(self.packed[layer])

    @torch.no_grad()
    def copy_(self, other: "MoveTables") -> "MoveTables":
        """Take other's contents in place, as a captured CUDA graph needs it. Shapes must agree."""
        if self.packed.shape != other.packed.shape:
            old, new = tuple(self.index.shape), tuple(other.index.shape)
            raise ValueError(f"tables of {old} rows and moves, {new} new: the same `capacity`?")
        self.packed.copy_(other.packed, non_blocking=True)
        return self

    def of_rows(self, slot: Tensor) -> "MoveTables":
        """A copy for rows that are served by others, slot (B,): below 0 without moves."""
        packed = self.packed[slot.long().clamp(min=0)]
        packed[:, 0].masked_fill_((slot < 0)[:, None], -1)
        return MoveTables(packed)


# To torch.export and torch.func, tables are the tensor they hold; a saved export may hold some.
torch.serialization.add_safe_globals([MoveTables])
pytree.register_pytree_node(
    MoveTables,
    lambda tables: ([tables.packed], None),
    lambda leaves, _: MoveTables(*leaves),
    serialized_type_name=f"{__name__}.MoveTables",
    flatten_with_keys_fn=lambda tables: ([(pytree.GetAttrKey("packed"), tables.packed)], None),
)


@torch.no_grad()
def compile_moves(
    bank: Tensor, rows: Sequence[Sequence], capacity: int = 0, n_layers: int | None = None
) -> MoveTables:
    """bank (N, D); one list of moves a row -> tables (R, 7 + K, K) on the bank's device.

    With n_layers a row is a list of (layer, move), and the tables (n_layers, R, 7 + K, K) are those
    of all layers, made in one pass. Rows that are one list are compiled once. K is the number of
    moves that a row has at most (in a layer), `capacity` at least, and beyond 2 a multiple of 4:
    the kernel takes 4 at a time. The tables hold the directions' dot products: a bank that changes
    asks for new ones. ValueError for a direction that the bank has not or that is not finite, for
    one that is not of unit length where its projection is read, for a layer that is not there and
    for positions beyond int32.
    """
    if bank.ndim != 2:
        raise ValueError(f"the bank is {tuple(bank.shape)}: give (directions, width)")
    rows = list(rows)
    distinct = {id(row): row for row in rows}
    if any(isinstance(row, Move) or not isinstance(row, Sequence) for row in distinct.values()):
        raise ValueError("rows is a list of lists: for each row of x its moves, in order")
    R, L = len(distinct), 1 if n_layers is None else n_layers
    moves, lines, columns, K = [], [], [], capacity  # a move, its row's table, its place there
    for r, row in enumerate(distinct.values()):
        count = [0] * L
        for layer, move in row if n_layers is not None else ((0, move) for move in row):
            if not 0 <= layer < L:
                raise ValueError(f"a move at layer {layer}: there are layers 0 to {L - 1}")
            moves.append(move)
            lines.append(layer * R + r)
            columns.append(count[layer])
            count[layer] += 1
        K = max(K, *count, 0)
    K += -K % 4 if K > 2 else 0
    table = checked(moves, len(bank))  # (n, 7) float64
    row, k = torch.tensor([lines, columns], dtype=torch.long, device="cpu")
    packed = bits(checked([Move()], 0)).view(FIELDS, 1).expand(FIELDS, K)
    packed = torch.cat((packed, packed.new_zeros(K, K))).repeat(L * R, 1, 1)
    packed[row, :FIELDS, k] = bits(table)
    check_lengths(bank, table[:, 0].long(), table[:, 2] != 0)
    fill_gram(packed, bank)
    packed = packed.view(L, R, FIELDS + K, K)
    if len(rows) > R:
        order = {key: r for r, key in enumerate(distinct)}
        packed = packed[:, [order[id(row)] for row in rows]]
    return MoveTables((packed[0] if n_layers is None else packed).to(bank.device))


def bits(table: Tensor) -> Tensor:
    """(..., 7) float64, the fields of moves -> int32: whole numbers, and the bits of float32."""
    result = table.float().view(torch.int32)
    result[..., WHOLE] = table[..., WHOLE].int()
    return result


def check_lengths(bank: Tensor, index: Tensor, projected: Tensor) -> None:
    """ValueError for a direction that is not finite, or not of length 1 where it is projected on.

    index (n,) of every move's direction; projected (n,) bool, whether the move reads it so.
    """
    names, reads = index[index >= 0].unique(), set(index[projected].tolist())
    lengths = torch.linalg.vector_norm(bank[names.to(bank.device)], dim=-1, dtype=torch.double)
    for i, length in zip(names.tolist(), lengths.tolist(), strict=True):
        if not length < inf:
            raise ValueError(f"direction {i} of the bank is not finite")
        if i in reads and abs(length - 1) > 0.01:
            raise ValueError(f"direction {i} of the bank has length {length:.4g}: make it 1")


def fill_gram(packed: Tensor, bank: Tensor) -> None:
    """Write the Gram matrix of every row: each pair of directions is multiplied once."""
    index, N = packed[:, 0].long(), max(len(bank), 1)
    several = ((index >= 0).sum(-1) > 1).nonzero()[:, 0]  # one move asks for no dot products
    i, j = index[several, :, None], index[several, None]
    pairs, of = (torch.minimum(i, j) * N + torch.maximum(i, j)).unique(return_inverse=True)
    parts = pairs.clamp(min=0).to(bank.device).split(max(AT_ONCE // max(bank.shape[1], 1), 1))
    dots = [torch.linalg.vecdot(bank[p // N].double(), bank[p % N].double()) for p in parts]
    gram = torch.cat(dots).float().cpu().where(pairs >= 0, 0.0)  # below 0: with a slot of no move
    packed.view(torch.float32)[several, FIELDS:] = gram[of]


def checked(moves: Sequence[Move], n_directions: int) -> Tensor:
    """(n, 7) float64, the fields of moves. ValueError for what is none in such a bank."""
    for move in moves if set(map(type, moves)) - {Move} else ():
        if not isinstance(move, Move):
            raise ValueError(f"{move!r:.60} is not a Move(index of a direction, bias, ...)")
    try:
        values = array("d", [*chain.from_iterable(moves), 0.0])
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"a move's fields are numbers of 32 bits: {error}") from error
    table = torch.frombuffer(values, dtype=torch.double)[:-1].view(-1, FIELDS)
    index, bias, slope, low, high, first, last = table.T
    named = (index >= -1) & (index < n_directions) & (index % 1 == 0)
    for fine, what in (
        (named, f"names no direction of a bank of {n_directions}"),
        ((first > PADDING) & (first <= last) & (last <= ALWAYS[1]), "acts at no int32 positions"),
        (bias.float().abs() + slope.float().abs() < inf, "has a bias or slope that is not finite"),
        (low <= high, "has low above high"),
        ((low.float() < inf) & (high.float() > -inf), "has an infinite move at a bound"),
    ):
        for n in fine.logical_not().nonzero()[:1, 0].tolist():
            raise ValueError(f"{moves[n]} {what}")
    return table
