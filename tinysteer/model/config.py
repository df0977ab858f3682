"""Everything the decoder's graph depends on, as plain numbers.

A field's default means "absent": the graph of Llama 2 is the one with every default.
"""

import functools
from dataclasses import dataclass

import torch

from tinysteer.model.rope import Rope


@dataclass(frozen=True)
class Layer:
    """What may differ between the layers of one model."""

    rope: Rope
    window: int | None = None  # positions a query sees, itself included; None: all before it


@dataclass(frozen=True)
class Config:
    """A decoder's sizes and traits. `families.read_config` makes one from a config.json."""

    family: str  # where it came from, for people: the graph never asks
    vocab_size: int
    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    norm_eps: float
    context_length: int
    layers: tuple[Layer, ...]
    tied: bool = False  # the head reads the embedding's weight
    activation: str = "silu"  # a key of tinysteer_kernels.decode.ACTIVATIONS
    attn_bias: bool = False
    mlp_bias: bool = False
    norm_offset: float = 0.0  # Gemma stores its norms' weights less 1
    embed_scale: float = 1.0  # Gemma: sqrt(dim)
    post_norms: bool = False  # Gemma 2, 3: a norm after attention and after the MLP
    qk_norm: bool = False  # Gemma 3: norms of each query and key head
    attn_scale: float | None = None  # of scores; None: head_dim ** -0.5
    attn_cap: float | None = None  # Gemma 2: soft cap of scores
    logit_cap: float | None = None  # Gemma 2: soft cap of logits

    @property
    def n_layers(self) -> int:
        return len(self.layers)


@functools.cache
def nearest(number: float, dtype: torch.dtype) -> float:
    """The nearest number of that type. No tensor: a captured step copies none from the host."""
    return torch.tensor(number, dtype=dtype, device="cpu").item()
