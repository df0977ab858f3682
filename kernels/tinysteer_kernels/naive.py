"""What moves do, one after another: the definition, which all else here only computes faster."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .tables import Move


def steer_naive(
    x: Tensor, bank: Tensor, rows: Sequence[Sequence[Move]], position: Tensor | None = None
) -> Tensor:
    """x (B, T, D), bank (N, D), a list of moves a row -> a new x in float64.

    position (B, T) says where each token stands; None: at 0, the last of the prompt.
    """
    position = x.new_zeros(x.shape[:2]) if position is None else position
    steered = []
    for h, moves, at in zip(x.double(), rows, position, strict=True):  # (T, D), list, (T,)
        for move in moves:
            u = bank[move.index].double() if move.index >= 0 else torch.zeros_like(h[0])
            d = (move.bias - move.slope * (h @ u)).clamp(move.low, move.high)
            acts = (move.first <= at) & (at <= move.last)  # PADDING lies before any `first`
            h = h + torch.where(acts, d, 0.0)[:, None] * u
        steered.append(h)
    return torch.stack(steered)
