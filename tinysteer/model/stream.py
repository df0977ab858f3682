"""The residual stream where a block ends: what is added to it, who may edit it, the next norm.

B  batch    T  new positions    D  model width
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from tinysteer_kernels import add_steer_norm
from tinysteer_kernels.decode import rms_norm
from torch import Tensor, nn

from tinysteer.model.config import Config


class RMSNorm(nn.Module):
    def __init__(self, dim: int, config: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps, self.offset = config.norm_eps, config.norm_offset

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset)


class Norms(NamedTuple):
    """What surrounds a sum of the residual stream."""

    post: nn.Module  # of what is added to it: an RMSNorm, or an identity
    next: RMSNorm  # of the sum, for what reads it


def weight_of(norm: nn.Module) -> Tensor | None:
    """A norm's weight; an identity has none."""
    return getattr(norm, "weight", None)


def add(x: Tensor, delta: Tensor, norms: Norms, **steering) -> tuple[Tensor, Tensor]:
    """x (B, T, D) + norms.post(delta), edited if `steering` says so, and norms.next of it."""
    norm, traits = norms.next, {"offset": norms.next.offset, "post_weight": weight_of(norms.post)}
    return add_steer_norm(x, delta, norm.weight, norm.eps, **traits, **steering)


Seam = Callable[[Tensor, Tensor, Norms, int, Tensor], tuple[Tensor, Tensor]]


def unsteered(
    x: Tensor, delta: Tensor, norms: Norms, layer: int, position: Tensor
) -> tuple[Tensor, Tensor]:
    """The seam without edits. Any function of this signature may stand in its place.

    Block `layer` adds delta to the residual stream x, both (B, T, D); position (B, T) counts from
    the last prompt token (0), and is PADDING where a row has no token. -> the stream after the
    block, and its norm for the next block or the head.
    """
    return add(x, delta, norms)


class Recorder:
    """A seam that keeps the stream another one returns: for each layer a list of (B, T, D)."""

    def __init__(self, n_layers: int, steer: Seam = unsteered, keep: slice = slice(None)):
        self.steer, self.keep = steer, keep  # of each forward's positions
        self.states: list[list[Tensor]] = [[] for _ in range(n_layers)]

    def __call__(
        self, x: Tensor, delta: Tensor, norms: Norms, layer: int, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, y = self.steer(x, delta, norms, layer, position)
        self.states[layer].append(x[:, self.keep].clone())
        return x, y
