"""A decoder-only transformer. One graph for Llama, Mistral, Phi-3 and Gemma 1-3.

B  batch          T  new positions
D  model width    H  query heads       G  key/value heads

Layer L is the residual stream after block L, counted from 0.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tinysteer_kernels import add_steer_norm
from tinysteer_kernels.decode import View, attend, gated, rms_norm
from torch import Tensor, nn

from tinysteer.model.cache import Cache
from tinysteer.model.config import Config

CHUNK = 512  # positions run at once: bounds the mask and the scores of a long prompt


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


class Linear(nn.Linear):
    """Weights come from a checkpoint: nothing is drawn first."""

    def reset_parameters(self) -> None: ...


class Embedding(nn.Embedding):
    """Likewise."""

    def reset_parameters(self) -> None: ...


class Stacked(Linear):
    """Several projections of one input in one product, stacked by rows: `parts` counts them."""

    def __init__(self, dim: int, parts: tuple[int, ...], bias: bool):
        super().__init__(dim, sum(parts), bias=bias)
        self.parts = parts


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer = layer
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.qkv = Stacked(config.dim, (q, kv, kv), bias=config.attn_bias)
        self.out = Linear(q, config.dim, bias=config.attn_bias)
        norm = partial(RMSNorm, config.head_dim, config) if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()
        self.attend = partial(
            attend,
            scale=config.attn_scale or config.head_dim**-0.5,
            cap=config.attn_cap,
            eps=config.norm_eps,
            offset=config.norm_offset,
        )

    def forward(self, x: Tensor, view: View, cache: Cache) -> Tensor:
        """x (B, T, D) -> (B, T, D); the cache takes in its keys and values."""
        k, v = cache.layer(self.layer)
        norms = {"q_weight": weight_of(self.q_norm), "k_weight": weight_of(self.k_norm)}
        return self.out(self.attend(self.qkv(x), k, v, view, **norms))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_up = Stacked(config.dim, (config.hidden_dim,) * 2, bias=config.mlp_bias)
        self.down = Linear(config.hidden_dim, config.dim, bias=config.mlp_bias)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gated(self.gate_up(x), self.activation))


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        norm = partial(RMSNorm, config.dim, config)
        post_norm = norm if config.post_norms else nn.Identity
        self.attn_norm, self.attn_post_norm = norm(), post_norm()
        self.attn = Attention(config, layer)
        self.mlp_norm, self.mlp_post_norm = norm(), post_norm()
        self.mlp = MLP(config)

    def forward(self, x: Tensor, y: Tensor, view: View, cache: Cache) -> tuple[Tensor, Tensor]:
        """The stream and its norm, (B, T, D) -> the stream after attention, what is added next."""
        norms = Norms(self.attn_post_norm, self.mlp_norm)
        x, y = add(x, self.attn(y, view, cache), norms)
        return x, self.mlp(y)


@functools.cache
def nearest(number: float, dtype: torch.dtype) -> float:
    """The nearest number of that type. No tensor: a captured step copies none from the host."""
    return torch.tensor(number, dtype=dtype, device="cpu").item()


def as_loaded(method: Callable) -> Callable:
    """Without torch.autocast: a decoder rounds as the reference does, in its weights' type."""

    @functools.wraps(method)
    def inside(self, *arguments):
        kind = self.embed.weight.device.type
        on = torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if on else nullcontext():
            return method(self, *arguments)

    return inside


class Decoder(nn.Module):
    """tokens in, normed residual stream out; `logits` reads the vocabulary off it."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config)
        self.head = (
            nn.Identity() if config.tied else Linear(config.dim, config.vocab_size, bias=False)
        )

    @as_loaded
    def forward(self, tokens: Tensor, cache: Cache, steer: Seam = unsteered) -> Tensor:
        """tokens (B, T), the cache's next columns -> (B, T, D) after the last norm."""
        views, position = cache.advance(tokens.shape[1])
        x = self.embed(tokens)
        x = x * nearest(self.config.embed_scale, x.dtype)  # as in training
        y = self.blocks[0].attn_norm(x)
        after = [*(block.attn_norm for block in self.blocks[1:]), self.norm]
        for layer, (block, kind) in enumerate(zip(self.blocks, self.config.layers, strict=True)):
            x, delta = block(x, y, views[kind], cache)
            norms = Norms(block.mlp_post_norm, after[layer])
            x, y = steer(x, delta, norms, layer, position)  # <- everything this library is about
        return y

    @property
    def multiple(self) -> int:
        """What columns of prompts are padded to: cuDNN's attention plans anew for every length."""
        return 64 if self.embed.weight.is_cuda else 1

    def prefill(self, tokens: Tensor, cache: Cache, steer: Seam = unsteered) -> Tensor:
        """`forward` in chunks -> the last position alone, (B, 1, D)."""
        for chunk in tokens.split(CHUNK, dim=1):
            x = self(chunk, cache, steer)
        return x[:, -1:]

    @as_loaded
    def logits(self, x: Tensor) -> Tensor:
        """x (B, T, D) after the last norm -> (B, T, vocab_size) float32."""
        weight = self.embed.weight if self.config.tied else self.head.weight
        logits = F.linear(x, weight).float()
        cap = self.config.logit_cap
        return cap * torch.tanh(logits / cap) if cap else logits
