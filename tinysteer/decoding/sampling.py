"""The next token of each row, drawn with the row's own seed, on the device."""

import copy
import secrets
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Sampler:
    """Draws from softmax(logits / temperature), cut to the likeliest tokens.

    top_k keeps that many tokens, top_p the fewest that hold that share of what top_k left, min_p
    those at least that fraction as likely as the likeliest. A row takes one number of its own
    generator a step, so its draws do not depend on its neighbours. The n_draws numbers of a row are
    made beforehand: a step only looks its own up, and settings, like them, are tensors.
    """

    def __init__(
        self,
        seeds: Sequence[int | None],
        n_draws: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        device: torch.device | str = "cpu",
    ):
        generators = [
            torch.Generator("cpu").manual_seed(secrets.randbits(63) if seed is None else seed)
            for seed in seeds
        ]
        host: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        draws = [torch.rand(n_draws, generator=g, **host) for g in generators]
        self.draws = torch.stack(draws).to(device)  # (B, n_draws)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        cuts = (top_k, top_p, min_p)
        whole = (1 << 62, 2.0, 0.0)  # what a cut that is absent keeps
        settings = [w if cut is None else cut for cut, w in zip(cuts, whole, strict=True)]
        self.settings = torch.tensor([temperature, *settings], dtype=torch.float64, device=device)
        self.kind = "whole" if cuts == (None, None, None) else "cut"

    def empty(self, n_rows: int, n_draws: int) -> "Sampler":
        """One of the same kind, for `copy_` to fill."""
        made = copy.copy(self)
        made.draws = self.draws.new_zeros(n_rows, n_draws)
        made.step, made.settings = self.step.clone(), self.settings.clone()
        return made

    def copy_(self, other: "Sampler") -> "Sampler":
        """Take other's draws and settings, which may be of fewer rows and steps."""
        rows, steps = other.draws.shape
        self.draws[:rows, :steps].copy_(other.draws)
        self.settings.copy_(other.settings)
        self.step.zero_()
        return self

    def probabilities(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits (B, V) -> probabilities (B, V) float64 and their tokens, the likeliest first.

        Without a cut they come in the vocabulary's order: sorting is most of the work.
        """
        temperature, top_k, top_p, min_p = self.settings
        above = logits - logits.amax(-1, keepdim=True)  # cannot overflow
        rank = torch.arange(logits.shape[-1], device=logits.device)
        if self.kind == "whole":
            return (above.double() / temperature).softmax(-1), rank.expand(logits.shape)
        above, tokens = torch.sort(above, dim=-1, descending=True, stable=True)
        p = (above.double() / temperature).softmax(-1)
        p = p.where(rank < top_k, 0.0)
        p = p / p.sum(-1, keepdim=True)
        p = p.where((p.cumsum(-1) - p < top_p) & (p >= min_p * p[:, :1]), 0.0)
        return p / p.sum(-1, keepdim=True), tokens

    def __call__(self, logits: Tensor) -> Tensor:
        """logits (B, V) -> tokens (B,)."""
        p, tokens = self.probabilities(logits)
        draws = self.draws.index_select(1, self.step)  # (B, 1)
        self.step += 1
        chosen = torch.searchsorted(p.cumsum(-1), draws, right=True)
        likely = torch.arange(p.shape[-1], device=p.device).where(p > 0, 0)
        last = likely.amax(-1, keepdim=True)  # rounding may leave the sum below 1
        return tokens.gather(-1, chosen.minimum(last))[:, 0]
