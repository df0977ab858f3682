"""What attention computes for new positions: what they see of a cache, and the formula.

B  batch    T  new positions    H  query heads    G  key/value heads
R  rotated dimensions of a head
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..residual import rms_norm

# Without cuDNN's, which on a GPU makes a new plan for every length that a prompt may have.
PLANLESS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class View:
    """What new positions see of a cache padded on the left, in tensors for a captured step."""

    cos: Tensor  # (B, 1, T, R), of the new positions
    sin: Tensor  # with the first half negated
    query: Tensor  # (T,) int64, the columns of the new positions
    start: Tensor  # (B,) int64, where a row's text begins; behind its query: the row is padding
    reach: int  # columns that may be looked at: at least those that are filled
    window: int | None = None  # columns a query sees, its own included; None: all before it

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, T, reach) bool, True where a query sees a key."""
        key = torch.arange(self.reach, device=self.query.device)
        query, start = self.query[:, None], self.start[:, None, None]  # (T, 1), (B, 1, 1)
        # A padding query sees itself: a row of nothing but -inf would turn into NaN.
        seen = ((key <= query) & (key >= start)) | (key == query)  # (B, T, reach)
        return (seen if self.window is None else seen & (key > query - self.window))[:, None]


class Traits(NamedTuple):
    """What of a layer's attention is the same at every step."""

    scale: float
    cap: float | None = None  # bounds the scores
    q_weight: Tensor | None = None  # (head_dim,) of the heads' norms, with their eps and offset
    k_weight: Tensor | None = None
    eps: float = 0.0
    offset: float = 0.0


def attend_reference(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, view: View, traits: Traits
) -> Tensor:
    """What `attend` computes, in PyTorch."""
    G, head_dim = k_cache.shape[1], k_cache.shape[3]
    heads = qkv.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (B, H + 2G, T, head_dim)
    H = heads.shape[1] - 2 * G
    qk, v = heads.split((H + G, G), dim=1)
    if traits.q_weight is not None and traits.k_weight is not None:
        q = rms_norm(qk[:, :H], traits.q_weight, traits.eps, traits.offset)
        k = rms_norm(qk[:, H:], traits.k_weight, traits.eps, traits.offset)
        qk = torch.cat((q, k), dim=1)
    q, k = rotate(qk, view.cos, view.sin).split((H, G), dim=1)
    k_cache.index_copy_(2, view.query, k)
    v_cache.index_copy_(2, view.query, v)
    k, v = k_cache[:, :, : view.reach], v_cache[:, :, : view.reach]
    mask, scale, cap = view.mask, traits.scale, traits.cap
    if cap is not None or q.is_cuda:  # grouped and masked, PyTorch's would hold all the scores
        k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
    if cap is not None:
        y = soft_capped(q, k, v, mask, scale, cap)
    else:
        with sdpa_kernel(PLANLESS) if q.is_cuda else nullcontext():
            y = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, head_dim); cos, sin (B, 1, T, R) -> x, R dimensions turned.

    A pair (a, b), R / 2 apart, becomes (a cos - b sin, b cos + a sin). The first half of sin comes
    negated, which is half of a rotation's work.
    """
    R = cos.shape[-1]
    turned = x[..., :R]
    turned = turned * cos + turned.roll(R // 2, dims=-1) * sin
    return turned if x.shape[-1] == R else torch.cat((turned, x[..., R:]), dim=-1)


def soft_capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float) -> Tensor:
    """Attention whose scores stay within +-cap, which PyTorch's cannot do. As many heads each."""
    scores = cap * torch.tanh(q @ k.mT * scale / cap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
