"""The next token of each row: the likeliest, or drawn with the row's own seed."""

import secrets
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Pick = Callable[[Tensor], Tensor]  # logits (B, vocab_size) -> tokens (B,)


def greedy(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


class Sampler:
    """Draws from softmax(logits / temperature), cut to the likeliest tokens.

    top_k keeps that many tokens, top_p the fewest that hold that share of what top_k left, min_p
    those at least that fraction as likely as the likeliest. A row takes one number of its own
    generator a step, so its draws do not depend on its neighbours.
    """

    def __init__(
        self,
        seeds: Sequence[int | None],
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
    ):
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.generators = [
            torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
            for seed in seeds
        ]

    def probabilities(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits (B, V) -> probabilities (B, V), the likeliest first, and their tokens."""
        above = (logits - logits.amax(-1, keepdim=True)).double()  # cannot overflow
        p = (above / self.temperature).softmax(-1)
        p, tokens = torch.sort(p, dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            p[:, self.top_k :] = 0
            p = p / p.sum(-1, keepdim=True)
        before = p.cumsum(-1) - p
        if self.top_p is not None:
            p = p.where(before < self.top_p, 0.0)
        if self.min_p is not None:
            p = p.where(p >= self.min_p * p[:, :1], 0.0)
        return p / p.sum(-1, keepdim=True), tokens

    def __call__(self, logits: Tensor) -> Tensor:
        p, tokens = self.probabilities(logits)
        draws = torch.stack([torch.rand((), generator=g, dtype=p.dtype) for g in self.generators])
        chosen = torch.searchsorted(p.cumsum(-1), draws.to(p.device)[:, None], right=True)
        last = (p > 0).sum(-1, keepdim=True) - 1  # rounding may leave the sum below 1
        return tokens.gather(-1, chosen.minimum(last))[:, 0]
