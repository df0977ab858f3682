"""Rotary position embeddings: the frequencies of every scaling scheme, and tables of them.

S  positions     R  rotated dimensions of a head, paired (i, i + R/2); the rest pass through
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """One rotary embedding as plain numbers. What a scheme does not use keeps its default."""

    dim: int  # R
    theta: float = 10_000.0
    scheme: str = "default"  # a key of SCHEMES
    factor: float = 1.0  # linear, llama3: how much longer the context became
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_length: int = 0  # llama3, longrope: the context before it was made longer
    short_factors: tuple[float, ...] = ()  # longrope: (R/2,) for texts within original_length
    long_factors: tuple[float, ...] = ()  # longrope: (R/2,) for longer ones
    table_scale: float = 1.0  # longrope: multiplies cos and sin

    def __post_init__(self):
        for factors in (self.short_factors, self.long_factors):
            if factors and len(factors) != self.dim // 2:
                raise ValueError(
                    f"LongRoPE has {len(factors)} factors for {self.dim // 2} pairs of dimensions"
                )

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin of positions 0 .. length - 1, each (sets, length, R) float32.

        The first half of sin is negated, which is half of a rotation's work: see `attend`.
        """
        angles = torch.arange(length, device="cpu")[:, None] * SCHEMES[self.scheme](self)[:, None]
        cos, sin = angles.cos() * self.table_scale, angles.sin() * self.table_scale
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def choose(self, room: Tensor) -> Tensor:
        """room (B,), the most positions each row will have -> the set of tables it uses (B,).

        LongRoPE has one set for texts within `original_length` and one for longer ones. Prompt
        and new tokens decide once: keys in a cache could not follow a change within a text.
        """
        return (room > self.original_length).long() * (self.scheme == "longrope")


def default(rope: Rope) -> Tensor:
    """Radians per position of each pair, (sets, R/2); one set but for LongRoPE."""
    return 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2, device="cpu").float() / rope.dim)[None]


def linear(rope: Rope) -> Tensor:
    return default(rope) / rope.factor


def llama3(rope: Rope) -> Tensor:
    """Slow pairs are slowed by `factor`, fast ones kept, those between blended (Llama 3.1)."""
    frequencies = default(rope)
    turns = rope.original_length * frequencies / (2 * math.pi)  # within the original context
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / rope.factor


def longrope(rope: Rope) -> Tensor:
    """Each pair has its own factor, one for short texts and one for long (Phi-3 128k)."""
    factors = [rope.short_factors, rope.long_factors]
    return default(rope) / torch.tensor(factors, device="cpu")


SCHEMES = {"default": default, "linear": linear, "llama3": llama3, "longrope": longrope}
