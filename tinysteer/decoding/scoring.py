"""How probable a model finds tokens that are given."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysteer.model.decoder import Decoder

SLICE = 16  # positions whose logits are held at once


def logprobs_of(decoder: Decoder, h: Tensor, following: Tensor) -> Tensor:
    """h (B, T, D) after the last norm, the token that follows each (B, T) -> (B, T) float32."""
    parts = zip(h.split(SLICE, 1), following.split(SLICE, 1), strict=True)
    losses = [F.cross_entropy(decoder.logits(x).mT, ids, reduction="none") for x, ids in parts]
    return -torch.cat(losses, dim=1)
