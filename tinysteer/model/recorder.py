"""A seam that keeps the residual stream: extraction needs no hooks."""

from torch import Tensor

from tinysteer.model.decoder import Norms, Seam, unsteered


class Recorder:
    """Keeps the stream that another seam returns: for each layer a list of (B, T, D)."""

    def __init__(self, n_layers: int, steer: Seam = unsteered, keep: slice = slice(None)):
        self.steer, self.keep = steer, keep  # of each forward's positions
        self.states: list[list[Tensor]] = [[] for _ in range(n_layers)]

    def __call__(
        self, x: Tensor, delta: Tensor, norms: Norms, layer: int, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, h = self.steer(x, delta, norms, layer, position)
        self.states[layer].append(x[:, self.keep].clone())
        return x, h
