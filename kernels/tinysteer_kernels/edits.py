"""x += the edits of its row, in order: the definition, in PyTorch, that every kernel must meet.

B  batch     T  positions     D  model width     K  edits per row     N  directions in the bank

An edit moves h along one unit direction u:  h <- h + d u,  d = clip(bias - slope <h, u>).
It acts on the positions from `first` to `last`; a row's edits act one after another, each on the
result of those before it. Only projections pass between them, so one read and one write of h
do: with p = U h and the Gram matrix G = U U^T the k-th edit sees p_k + sum_{j<k} d_j G_kj.
"""

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

PADDING = -(2**31)  # the position of a column that holds no token: no edit reaches it
ALWAYS = (PADDING + 1, 2**31 - 1)  # first and last of an edit that acts everywhere


class Edit(NamedTuple):
    """One edit of one row. Position 0 is the last prompt token; `last` is included."""

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


def compile_edits(bank: Tensor, rows: Sequence[Sequence[Edit]]) -> Edits:
    """bank (N, D); one list of edits a row -> tables on the bank's device."""
    K = max(map(len, rows), default=0)
    padded = [[*row, *[Edit()] * (K - len(row))] for row in rows]
    for edit in (edit for row in padded for edit in row):
        if not -1 <= edit.index < len(bank):
            raise ValueError(f"an edit names direction {edit.index} of a bank of {len(bank)}")
    table = torch.tensor(padded, dtype=torch.float64).reshape(len(rows), K, len(Edit._fields))
    index, bias, slope, low, high, first, last = table.unbind(-1)
    u = bank.cpu()[index.long().clamp(min=0)].double()  # (B, K, D)
    u = torch.where((index >= 0)[..., None], u, 0.0)
    tables = Edits(
        index.int(),
        *(column.float() for column in (bias, slope, low, high)),
        first.int(),
        last.int(),
        gram=(u @ u.mT).float(),
    )
    return Edits(*(column.to(bank.device) for column in tables))


def steer(x: Tensor, bank: Tensor, edits: Edits, position: Tensor) -> Tensor:
    """Edit x (B, T, D) in place and return it; bank (N, D) of unit rows, position (B, T) int32.

    Sums in float32 and rounds once. Where no edit moves anything x keeps its bits.
    """
    B, T, D = x.shape
    if bank.ndim != 2 or bank.shape[1] != D:
        raise ValueError(f"x is {D} wide, but the bank of directions is {tuple(bank.shape)}")
    if position.shape != (B, T):
        raise ValueError(f"position is {tuple(position.shape)}, x has {B} rows of {T} positions")
    if len(edits.index) != B:
        raise ValueError(f"edits are for {len(edits.index)} rows, x has {B}")
    h, u = x.float(), directions(bank, edits)
    d = moves(h, u, edits, position)
    moved = (d != 0).any(-1, keepdim=True)
    return x.copy_(torch.where(moved, (h + d @ u).to(x.dtype), x))


def directions(bank: Tensor, edits: Edits) -> Tensor:
    """The direction of every edit, (B, K, D) float32, zeros where a row has none."""
    u = bank[edits.index.long().clamp(min=0)].float()
    return torch.where((edits.index >= 0)[..., None], u, 0.0)  # another row's NaN stays with it


def moves(h: Tensor, u: Tensor, edits: Edits, position: Tensor) -> Tensor:
    """d of every edit at every position, (B, T, K), 0 where it does not act.

    h (B, T, D) and u (B, K, D) float32, position (B, T) int32.
    """
    p = h @ u.mT  # (B, T, K)
    d = torch.zeros_like(p)
    at = position[..., None]
    acts = (edits.first[:, None] <= at) & (at <= edits.last[:, None]) & (edits.index >= 0)[:, None]
    for k in range(u.shape[1]):
        seen = p[..., k] + (d * edits.gram[:, None, k]).sum(-1)  # (B, T)
        move = edits.bias[:, k, None] - edits.slope[:, k, None] * seen
        move = move.clamp(edits.low[:, k, None], edits.high[:, k, None])
        d[..., k] = move.where(acts[..., k], 0.0)
    return d
