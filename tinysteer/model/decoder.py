"""A decoder-only transformer. One graph for Llama, Mistral, Phi-3 and Gemma 1-3.

B  batch          T  new positions
D  model width    H  query heads       G  key/value heads

Layer L is the residual stream after block L, counted from 0.
"""

import functools
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from tinysteer_kernels.decode import View, attend, gated
from tinysteer_kernels.devices import as_is
from torch import Tensor, nn

from tinysteer.model.cache import Cache
from tinysteer.model.config import Config
from tinysteer.model.stream import Norms, RMSNorm, Seam, add, unsteered, weight_of

CHUNK = 512  # positions run at once: bounds the mask and the scores of a long prompt


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

    def forward(self, x: Tensor, view: View, cache: Cache) -> Tensor:
        """x (B, T, D) -> (B, T, D); the cache takes in its keys and values."""
        k, v = cache.layer(self.layer)
        norms = {"q_weight": weight_of(self.q_norm), "k_weight": weight_of(self.k_norm)}
        return self.out(self.attend(self.qkv(x), k, v, view, **norms))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_up = Stacked(config.dim, (config.hidden_dim,) * 2, bias=config.mlp_bias)
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=config.mlp_bias)
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
        with as_is(self.embed.weight, launched=False):
            return method(self, *arguments)

    return inside


class Decoder(nn.Module):
    """tokens in, normed residual stream out; `logits` reads the vocabulary off it."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        V, D = config.vocab_size, config.dim
        self.embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(D, config)
        self.head = nn.Identity() if config.tied else nn.Linear(D, V, bias=False)

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
