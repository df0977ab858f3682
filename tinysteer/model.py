"""A decoder-only transformer. One graph for Llama, Mistral, Phi-3 and Gemma 1-3.

B  batch          T  new positions     S  columns of the cache, the new ones included
D  model width    H  query heads       G  key/value heads

Layer L is the residual stream after block L, counted from 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tinysteer_kernels import PADDING, add_steer_norm, rms_norm
from torch import Tensor, nn

from tinysteer.config import Config, Layer
from tinysteer.rope import rotate

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
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


def add(x: Tensor, delta: Tensor, norms: Norms, **steering) -> tuple[Tensor, Tensor]:
    """x (B, T, D) + norms.post(delta), edited if `steering` says so, and norms.next of it."""
    post_weight, norm = getattr(norms.post, "weight", None), norms.next
    traits = {"offset": norm.offset, "post_weight": post_weight}
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


class Fused(Linear):
    """Several projections of one input in one product, stacked by rows: `parts` counts them."""

    def __init__(self, dim: int, parts: tuple[int, ...], bias: bool):
        super().__init__(dim, sum(parts), bias=bias)
        self.parts = parts

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x).split(self.parts, dim=-1)


@dataclass(frozen=True)
class View:
    """What one kind of layer sees in one forward: its rope's tables and its mask."""

    cos: Tensor  # (B, 1, T, R)
    sin: Tensor
    mask: Tensor  # (B, 1, T, S) bool, True where a query sees a key


class Cache:
    """Keys and values of `length` columns, and where each row's text lies in them.

    Rows are padded on the left: row b's text begins at column start[b] (B,), and every prompt
    ends before column `prompt`. `end` columns are filled. room (B,) says how many positions each
    row will have at most; default all columns from its start.
    """

    def __init__(
        self,
        decoder: "Decoder",
        start: Tensor,
        prompt: int,
        length: int,
        room: Tensor | None = None,
    ):
        config, weight = decoder.config, decoder.embed.weight
        shape = (config.n_layers, len(start), config.n_kv_heads, length, config.head_dim)
        self.k, self.v = weight.new_zeros(shape), weight.new_zeros(shape)
        self.start, self.prompt, self.end = start.to(weight.device), prompt, 0
        room = (length - start if room is None else room).to(weight.device)
        ropes = {layer.rope for layer in config.layers}
        self.sets = {rope: rope.choose(room)[:, None] for rope in ropes}  # (B, 1)
        self.tables = {
            rope: [table.to(weight.device, weight.dtype) for table in rope.tables(length)]
            for rope in ropes
        }
        self.kinds = set(config.layers)

    def advance(self, T: int) -> tuple[dict[Layer, View], Tensor]:
        """Make room for T columns: each kind of layer's view, and the positions (B, T)."""
        assert self.end + T <= self.k.shape[3], f"{self.end} + {T} columns > {self.k.shape[3]}"
        self.end += T
        key = torch.arange(self.end, device=self.start.device)
        query, start = key[-T:, None], self.start[:, None, None]  # (T, 1), (B, 1, 1)
        # A padding query sees itself: a row of nothing but -inf would turn into NaN.
        seen = ((key <= query) & (key >= start)) | (key == query)  # (B, T, S)
        place = query.T - self.start[:, None]  # (B, T) within the row's own text
        views = {}
        for kind in self.kinds:
            at = self.sets[kind.rope], place.clamp(min=0)
            cos, sin = (table[at][:, None] for table in self.tables[kind.rope])
            mask = seen if kind.window is None else seen & (key > query - kind.window)
            views[kind] = View(cos, sin, mask[:, None])
        position = (query.T - (self.prompt - 1)).expand(len(self.start), T)
        return views, position.where(place >= 0, PADDING).to(torch.int32)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (B, G, T, head_dim), the newest columns -> all filled ones (B, G, S, head_dim)."""
        new = slice(self.end - k.shape[2], self.end)
        self.k[layer, :, :, new], self.v[layer, :, :, new] = k, v
        return self.k[layer, :, :, : self.end], self.v[layer, :, :, : self.end]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q (B, H, T, head_dim); k, v (B, G, S, head_dim) -> (B, H, T, head_dim)."""
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


def attend_capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float
) -> Tensor:
    """The same with scores soft-capped, which PyTorch's attention cannot do."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = cap * torch.tanh(q @ k.mT * scale / cap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.qkv = Fused(config.dim, (q, kv, kv), bias=config.attn_bias)
        self.out = Linear(q, config.dim, bias=config.attn_bias)
        norm = partial(RMSNorm, config.head_dim, config) if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()
        self.scale = config.attn_scale or config.head_dim**-0.5
        cap = config.attn_cap
        self.attend = partial(attend_capped, cap=cap) if cap else attend

    def forward(self, x: Tensor, view: View, cache: Cache) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (y.view(heads).transpose(1, 2) for y in self.qkv(x))
        q = rotate(self.q_norm(q), view.cos, view.sin)
        k = rotate(self.k_norm(k), view.cos, view.sin)
        k, v = cache.append(self.layer, k, v)
        y = self.attend(q, k, v, view.mask, self.scale)
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_up = Fused(config.dim, (config.hidden_dim,) * 2, bias=config.mlp_bias)
        self.down = Linear(config.hidden_dim, config.dim, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x)
        return self.down(self.activation(gate) * up)


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        norm = partial(RMSNorm, config.dim, config)
        post_norm = norm if config.post_norms else nn.Identity
        self.attn_norm, self.attn, self.attn_post_norm = (
            norm(),
            Attention(config, layer),
            post_norm(),
        )
        self.mlp_norm, self.mlp, self.mlp_post_norm = norm(), MLP(config), post_norm()

    def forward(self, x: Tensor, y: Tensor, view: View, cache: Cache) -> tuple[Tensor, Tensor]:
        """The stream and its norm, (B, T, D) -> the stream after attention, what is added next."""
        norms = Norms(self.attn_post_norm, self.mlp_norm)
        x, y = add(x, self.attn(y, view, cache), norms)
        return x, self.mlp(y)


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

    def forward(self, tokens: Tensor, cache: Cache, steer: Seam = unsteered) -> Tensor:
        """tokens (B, T), the cache's next columns -> (B, T, D) after the last norm."""
        views, position = cache.advance(tokens.shape[1])
        x = self.embed(tokens)
        x = x * torch.tensor(self.config.embed_scale, dtype=x.dtype)  # rounded, as in training
        y = self.blocks[0].attn_norm(x)
        after = [*(block.attn_norm for block in self.blocks[1:]), self.norm]
        for layer, (block, kind) in enumerate(zip(self.blocks, self.config.layers, strict=True)):
            x, delta = block(x, y, views[kind], cache)
            norms = Norms(block.mlp_post_norm, after[layer])
            x, y = steer(x, delta, norms, layer, position)  # <- everything this library is about
        return y

    def prefill(self, tokens: Tensor, cache: Cache, steer: Seam = unsteered) -> Tensor:
        """`forward` in chunks -> the last position alone, (B, 1, D)."""
        for chunk in tokens.split(CHUNK, dim=1):
            x = self(chunk, cache, steer)
        return x[:, -1:]

    def logits(self, x: Tensor) -> Tensor:
        """x (B, T, D) after the last norm -> (B, T, vocab_size) float32."""
        weight = self.embed.weight if self.config.tied else self.head.weight
        logits = F.linear(x, weight).float()
        cap = self.config.logit_cap
        return cap * torch.tanh(logits / cap) if cap else logits
