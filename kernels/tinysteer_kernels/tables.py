"""Ordered edits of every row -> the tables that kernels read. In float64, on the host.

B  rows     K  edits per row     N  directions in the bank     D  model width

An edit moves h along one unit direction u by a clipped affine function of its projection,

    d = clip(bias - slope <h, u>, low, high)        h <- h + d u

and the edits of a row act one after another, each on the result of those before it. Only
projections pass between them: with p = U h of the h that came in and the Gram matrix G = U U^T,
edit k sees p_k + sum_{j<k} d_j G_kj. So a row's K dot products can all be taken at once, K scalars
follow one from the other, and h is written once, h + sum_k d_k u_k.
"""

import itertools
import numbers
from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

PADDING = -(2**31)  # the position of a column that holds no token: no edit reaches it
ALWAYS = (PADDING + 1, 2**31 - 1)  # first and last of an edit that acts everywhere


class Edit(NamedTuple):
    """One edit of one row. Position 0 is the last prompt token; `last` is included.

    add: bias=weight. To a target: bias=target, slope=1, and low=0 to go only up, high=0 only down.
    Ablation: slope=1.
    """

    index: int = -1  # of the direction in the bank; -1: no edit
    bias: float = 0.0
    slope: float = 0.0
    low: float = -inf
    high: float = inf
    first: int = ALWAYS[0]
    last: int = ALWAYS[1]


class Edits(NamedTuple):
    """The edits of B rows as tables (B, K), an index of -1 where a row has fewer than K."""

    index: Tensor  # int32
    bias: Tensor  # float32, like slope, low and high
    slope: Tensor
    low: Tensor
    high: Tensor
    first: Tensor  # int32
    last: Tensor  # int32
    gram: Tensor  # (B, K, K) float32, <u_k, u_j>

    @torch.no_grad()
    def copy_(self, other: "Edits") -> "Edits":
        """Take other's contents in place, as a captured CUDA graph needs it. Shapes must agree."""
        if self.index.shape != other.index.shape:
            old, new = tuple(self.index.shape), tuple(other.index.shape)
            raise ValueError(
                f"the tables hold {old} rows and edits, the new ones {new}: compile both with the "
                "same `capacity`"
            )
        for mine, theirs in zip(self, other, strict=True):
            mine.copy_(theirs, non_blocking=True)
        return self


@torch.no_grad()
def compile_edits(bank: Tensor, rows: Sequence[Sequence[Edit]], capacity: int = 0) -> Edits:
    """bank (N, D); one list of edits a row -> tables on the bank's device.

    K is the longest list's length, `capacity` at least, and beyond 2 a multiple of 4: the kernel
    takes 4 at a time. The tables hold the directions' dot products: a bank that changes asks for
    new ones. ValueError for a direction that the bank has not or that is not finite, for one that
    is not of unit length where its projection is read, and for positions beyond int32.
    """
    if bank.ndim != 2:
        raise ValueError(f"the bank is {tuple(bank.shape)}: give (directions, width)")
    if any(isinstance(row, Edit) or not isinstance(row, Sequence) for row in rows):
        raise ValueError("rows is a list of lists: for each row of x its edits, in order")
    K = max(capacity, *map(len, rows), 0)
    K += -K % 4 if K > 2 else 0
    for edit in itertools.chain(*{id(row): row for row in rows}.values()):
        check_edit(edit, len(bank))
    distinct: dict[tuple[Edit, ...], int] = {}  # rows that are alike are compiled once
    same = [distinct.setdefault(tuple(row), len(distinct)) for row in rows]
    padded = [[*row, *[Edit()] * (K - len(row))] for row in distinct]
    table = torch.tensor(padded, dtype=torch.float64, device="cpu")
    table = table.reshape(len(padded), K, len(Edit._fields))
    index, bias, slope, low, high, first, last = table.unbind(-1)
    named, where = index[index >= 0].unique(return_inverse=True)
    directions = bank[named.long().to(bank.device)].cpu().double()
    check_lengths(named.long().tolist(), directions, slope[index >= 0], where)
    gram = torch.zeros(len(padded), K, K, dtype=torch.float64, device="cpu")
    several = (index >= 0).sum(-1) > 1  # a single edit asks for no dot products
    u = directions.new_zeros(int(several.sum()), K, bank.shape[1])
    u[index[several] >= 0] = directions[where[several.repeat_interleave((index >= 0).sum(-1))]]
    gram[several] = u @ u.mT
    tables = Edits(
        index.int(),
        *(column.float() for column in (bias, slope, low, high)),
        first.int(),
        last.int(),
        gram.float(),
    )
    same = torch.tensor(same, dtype=torch.long, device="cpu")
    return Edits(*(column[same].to(bank.device) for column in tables))


def check_lengths(named: Sequence[int], directions: Tensor, slope: Tensor, where: Tensor) -> None:
    """ValueError for directions that are not finite, or not of length 1 where one is projected on.

    named: the directions' places in the bank; slope, where: each edit's, and which one it names.
    """
    projected = torch.zeros(len(named), dtype=torch.bool, device="cpu")
    projected[where[slope != 0]] = True
    lengths = directions.norm(dim=-1).tolist()
    for index, size, read in zip(named, lengths, projected.tolist(), strict=True):
        if not size < inf:
            raise ValueError(f"direction {index} of the bank is not finite")
        if read and abs(size - 1) > 0.01:
            raise ValueError(f"direction {index} of the bank has length {size:.4g}: make it 1")


def check_edit(edit: Edit, n_directions: int) -> None:
    """ValueError for what is no edit along a direction of the bank."""
    if not isinstance(edit, Edit) or not isinstance(edit.index, numbers.Integral):
        raise ValueError(f"{edit!r:.60} is no Edit(index of a direction, bias, ...)")
    if not -1 <= edit.index < n_directions:
        raise ValueError(f"an edit names direction {edit.index} of a bank of {n_directions}")
    if not PADDING < edit.first <= edit.last <= ALWAYS[1]:
        raise ValueError(f"an edit acts from {edit.first} to {edit.last}: no int32 positions")
    if not (abs(edit.bias) < inf and abs(edit.slope) < inf and edit.low <= edit.high):
        raise ValueError(f"{edit} has a bias or slope that is not finite, or low above high")
