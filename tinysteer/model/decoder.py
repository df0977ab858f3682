"""A decoder-only transformer. One graph for Llama, Mistral, Phi-3 and Gemma 1-3.

B  batch          T  new positions
D  model width    H  query heads       G  key/value heads

x (B, T, D) is the residual stream and h its norm, which products read. A block adds to x twice;
`add` does such a sum and the norm behind it, in one kernel. The sum at a block's end is `steer`'s,
which may move x before it is normed. Layer L is the stream after block L, counted from 0.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tinysteer_kernels import add_steer_norm
from tinysteer_kernels.decode import View, attend, gated, rms_norm
from tinysteer_kernels.devices import as_is
from torch import Tensor, nn

from tinysteer.model.cache import Cache
from tinysteer.model.config import Config, nearest

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
    """x + norms.post(delta), edited if `steering` says so, and norms.next of it."""
    norm, post = norms.next, weight_of(norms.post)
    return add_steer_norm(
        x, delta, norm.weight, norm.eps, offset=norm.offset, post_weight=post, **steering
    )


Seam = Callable[[Tensor, Tensor, Norms, int, Tensor], tuple[Tensor, Tensor]]


def unsteered(
    x: Tensor, delta: Tensor, norms: Norms, layer: int, position: Tensor
) -> tuple[Tensor, Tensor]:
    """The seam without edits. Any function of this signature may stand in its place.

    Block `layer` ends by adding delta to x, both (B, T, D). position (B, T) counts from the last
    prompt token (0), and is PADDING where a row has no token. -> the sum, and its norm.
    """
    return add(x, delta, norms)


class Stacked(nn.Linear):
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
        self.out = nn.Linear(q, config.dim, bias=config.attn_bias)
        norm = partial(RMSNorm, config.head_dim, config) if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()
        self.attend = partial(
            attend,
            scale=config.attn_scale or config.head_dim**-0.5,
            cap=config.attn_cap,
            eps=config.norm_eps,
            offset=config.norm_offset,
        )

    def forward(self, h: Tensor, view: View, cache: Cache) -> Tensor:
        """(B, T, D) -> (B, T, D); the cache takes in its keys and values."""
        k, v = cache.layer(self.layer)
        norms = {"q_weight": weight_of(self.q_norm), "k_weight": weight_of(self.k_norm)}
        return self.out(self.attend(self.qkv(h), k, v, view, **norms))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_up = Stacked(config.dim, (config.hidden_dim,) * 2, bias=config.mlp_bias)
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=config.mlp_bias)
        self.activation = config.activation

    def forward(self, h: Tensor) -> Tensor:
        return self.down(gated(self.gate_up(h), self.activation))


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        norm = partial(RMSNorm, config.dim, config)
        post_norm = norm if config.post_norms else nn.Identity
        self.attn_norm, self.attn_post_norm = norm(), post_norm()
        self.attn = Attention(config, layer)
        self.mlp_norm, self.mlp_post_norm = norm(), post_norm()
        self.mlp = MLP(config)

    def forward(self, x: Tensor, h: Tensor, view: View, cache: Cache) -> tuple[Tensor, Tensor]:
        """The stream and its norm -> the stream after attention, and what the MLP adds to it."""
        x, h = add(x, self.attn(h, view, cache), Norms(self.attn_post_norm, self.mlp_norm))
        return x, self.mlp(h)


class Decoder(nn.Module):
    """tokens in, normed residual stream out; `logits` reads the vocabulary off it."""

    blocks: Sequence[Block]

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        V, D = config.vocab_size, config.dim
        self.embed = nn.Embedding(V, D)
        blocks = [Block(config, layer) for layer in range(config.n_layers)]
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = RMSNorm(D, config)
        self.head = nn.Identity() if config.tied else nn.Linear(D, V, bias=False)

    def forward(self, tokens: Tensor, cache: Cache, steer: Seam = unsteered) -> Tensor:
        """tokens (B, T), the cache's next columns -> (B, T, D) after the last norm."""
        views, position = cache.advance(tokens.shape[1])
        norms = [*(block.attn_norm for block in self.blocks), self.norm]
        with as_is(self.embed.weight, launched=False):  # no autocast: rounded as the reference is
            x = self.embed(tokens)
            x = x * nearest(self.config.embed_scale, x.dtype)  # as in training
            h = norms[0](x)
            for layer, block in enumerate(self.blocks):
                x, delta = block(x, h, views[self.config.layers[layer]], cache)
                end = Norms(block.mlp_post_norm, norms[layer + 1])
                # x + delta; then for each edit x + d u, d = clip(bias - slope <x, u>, low, high)
                x, h = steer(x, delta, end, layer, position)
        return h

    @property
    def multiple(self) -> int:
        """What columns of prompts are padded to: cuDNN's attention plans anew for every length."""
        return 64 if self.embed.weight.is_cuda else 1

    def prefill(self, tokens: Tensor, cache: Cache, steer: Seam = unsteered) -> Tensor:
        """`forward` in chunks -> the last position alone, (B, 1, D)."""
        for chunk in tokens.split(CHUNK, dim=1):
            h = self(chunk, cache, steer)
        return h[:, -1:]

    def logits(self, h: Tensor) -> Tensor:
        """h (B, T, D) after the last norm -> (B, T, vocab_size) float32."""
        weight = self.head.weight if isinstance(self.head, nn.Linear) else self.embed.weight
        with as_is(weight, launched=False):
            logits = F.linear(h, weight).float()
        cap = self.config.logit_cap
        return cap * torch.tanh(logits / cap) if cap else logits
