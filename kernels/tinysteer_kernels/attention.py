"""The op `attend`: all that lies between a block's first product and its second.

    q, k   <- their norms, if any (Gemma 3), turned by the rotary embedding
    caches <- k and v, at the columns of the new positions
    y      <- softmax(q k / scale, soft-capped if asked, over the columns that are seen) v

B  batch    T  new positions    S  columns of the cache    H  query heads    G  key/value heads
R  rotated dimensions of a head

While decoding (T = 1) a row reads what it has filled of the cache, or what its window shows, and
nothing else: 4 G head_dim bytes a column in 16 bits. That is one launch, and a second where a row's
columns are shared out among several programs, because B x G of them would not fill a GPU. A prompt
goes through PyTorch's attention.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .devices import as_is, as_op, serves, tl, triton
from .residual import rms_norm

EVERYTHING = 2**31 - 1  # a window that hides nothing
PROGRAMS = 264  # two for each multiprocessor of an H200: fewer than this share out their columns
TILE = 16384  # bytes of keys at a time: with as much of values, in three stages, 96 KB
TOGETHER = 8192  # numbers of all shares of a head that the second launch holds in registers


@dataclass(frozen=True)
class View:
    """What new positions see of a cache whose rows are padded on the left.

    The columns are tensors, so that a captured step follows them.
    """

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
    """What of a layer's attention is the same at every step; see `attend`."""

    scale: float
    cap: float | None = None
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    eps: float = 0.0
    offset: float = 0.0


# The formula.


def formula(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, view: View, traits: Traits) -> Tensor:
    """What `attend` computes, in PyTorch."""
    G, head_dim = k_cache.shape[1], k_cache.shape[3]
    heads = qkv.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (B, H + 2G, T, head_dim)
    H = heads.shape[1] - 2 * G
    qk, v = heads.split((H + G, G), dim=1)
    if traits.q_weight is not None:
        q = rms_norm(qk[:, :H], traits.q_weight, traits.eps, traits.offset)
        k = rms_norm(qk[:, H:], traits.k_weight, traits.eps, traits.offset)
        qk = torch.cat((q, k), dim=1)
    q, k = rotate(qk, view.cos, view.sin).split((H, G), dim=1)
    k_cache.index_copy_(2, view.query, k)
    v_cache.index_copy_(2, view.query, v)
    k, v = k_cache[:, :, : view.reach], v_cache[:, :, : view.reach]
    if (
        traits.cap is not None or q.is_cuda
    ):  # grouped and masked, PyTorch's would hold all the scores
        k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
    if traits.cap is None:
        y = F.scaled_dot_product_attention(q, k, v, view.mask, scale=traits.scale, enable_gqa=True)
    else:
        y = soft_capped(q, k, v, view.mask, traits.scale, traits.cap)
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


# The kernels.


@triton.jit
def turned(
    x_ptr,
    inside,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    D: tl.constexpr,
    R: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The heads at x_ptr (N, 1), normed and rotated, (N, BLOCK_D) in their own type."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK_D)[None, :]
    partner = tl.where(column < R // 2, column + R // 2, column - R // 2)
    rotated = column < R
    x = tl.load(x_ptr + column, mask=inside & (column < D), other=0.0).to(tl.float32)
    y = tl.load(x_ptr + partner, mask=inside & rotated, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        x_weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
        y_weight = tl.load(weight_ptr + partner, mask=rotated, other=0.0).to(tl.float32)
        x = weighted(x * scale, x_weight, OFFSET, dtype)
        y = weighted(y * scale, y_weight, OFFSET, dtype)
    cos = tl.load(cos_ptr + column, mask=rotated, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + column, mask=rotated, other=0.0).to(tl.float32)
    return (x * cos + y * sin).to(dtype)


@triton.jit
def weighted(x, weight, OFFSET: tl.constexpr, dtype: tl.constexpr):
    """The end of an RMSNorm, rounded where its family rounds (see residual.py)."""
    if OFFSET != 0:
        x *= OFFSET + weight
    else:
        x = x.to(dtype).to(tl.float32) * weight
    return x.to(dtype).to(tl.float32)


@triton.jit
def capped(scores, cap):
    """cap tanh(scores / cap), or the scores themselves where there is no cap."""
    if cap is not None:
        scores = cap * (1 - 2 / (tl.exp(2 * scores / cap) + 1))
    return scores


@triton.jit
def attend_kernel(
    qkv_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    query_ptr,
    start_ptr,
    q_weight_ptr,
    k_weight_ptr,
    y_ptr,
    lse_ptr,
    stride_b,
    stride_g,
    stride_s,
    window,
    scale,
    cap,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One of SPLITS equal shares of what one row sees, by the query heads of one key head."""
    split = tl.program_id(0) % SPLITS
    g = tl.program_id(0) // SPLITS % G
    b = (tl.program_id(0) // SPLITS // G).to(tl.int64)
    now = tl.load(query_ptr).to(tl.int32)
    first = tl.maximum(tl.load(start_ptr + b).to(tl.int32), now - window + 1)
    share = tl.cdiv(tl.cdiv(tl.maximum(now - first, 0), SPLITS), BLOCK_S) * BLOCK_S
    first += split * share
    end = tl.minimum(first + share, now)

    column = tl.arange(0, BLOCK_D)
    head = tl.arange(0, BLOCK_H)
    mine = (head < H // G)[:, None]
    head += g * (H // G)
    qkv_ptr += b * (H + 2 * G) * D
    at = b * R
    q = turned(
        qkv_ptr + head[:, None] * D,
        mine,
        q_weight_ptr,
        cos_ptr + at,
        sin_ptr + at,
        eps,
        D,
        R,
        OFFSET,
        BLOCK_D,
    )
    key = tl.arange(0, 1)[:, None]
    k = turned(
        qkv_ptr + (H + g) * D + key,
        key == 0,
        k_weight_ptr,
        cos_ptr + at,
        sin_ptr + at,
        eps,
        D,
        R,
        OFFSET,
        BLOCK_D,
    )  # (1, BLOCK_D)
    v = tl.load(qkv_ptr + (H + G + g) * D + column[None, :], mask=(column < D)[None, :], other=0.0)
    k_ptr += b * stride_b + g * stride_g + column[None, :]
    v_ptr += b * stride_b + g * stride_g + column[None, :]

    # The new position opens the first share's sums: nobody waits for what is written here.
    if split == 0:
        tl.store(k_ptr + now.to(tl.int64) * stride_s + key, k, mask=(column < D)[None, :])
        tl.store(v_ptr + now.to(tl.int64) * stride_s + key, v, mask=(column < D)[None, :])
    score = capped(tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1) * scale, cap)
    highest = tl.where(split == 0, score, -float("inf"))  # (BLOCK_H,)
    total = tl.where(split == 0, 1.0, tl.zeros_like(score))
    y = tl.where(split == 0, v.to(tl.float32), tl.zeros((BLOCK_H, BLOCK_D), tl.float32))
    for s0 in range(first, end, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        seen = s < end
        inside = seen[:, None] & (column < D)[None, :]
        ks = tl.load(k_ptr + s.to(tl.int64)[:, None] * stride_s, mask=inside, other=0.0)
        vs = tl.load(v_ptr + s.to(tl.int64)[:, None] * stride_s, mask=inside, other=0.0)
        scores = capped(tl.dot(q, tl.trans(ks), input_precision="ieee") * scale, cap)
        scores = tl.where(seen[None, :], scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(highest - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        y *= shrink[:, None]
        y += tl.dot(weights.to(vs.dtype), vs, input_precision="ieee")
        highest = higher
    some = tl.where(total > 0, total, 1.0)  # a share may be empty
    y /= some[:, None]
    out = (b * H + head) * SPLITS + split
    tl.store(y_ptr + out[:, None] * D + column[None, :], y, mask=mine & (column < D)[None, :])
    if lse_ptr is not None:
        lse = tl.where(total > 0, highest + tl.log(some), -float("inf"))
        tl.store(lse_ptr + out, lse, mask=head < (g + 1) * (H // G))


@triton.jit
def combine_kernel(
    part_ptr, lse_ptr, y_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr
):
    """The shares of one head, weighted by their sums of exponentials."""
    head = tl.program_id(0).to(tl.int64)
    column, split = tl.arange(0, BLOCK_D), head * SPLITS + tl.arange(0, SPLITS)
    inside = (column < D)[None, :]
    lse = tl.load(lse_ptr + split)
    part = tl.load(part_ptr + split[:, None] * D + column[None, :], mask=inside, other=0.0)
    weight = tl.exp(lse - tl.max(lse, axis=0))
    y = tl.sum(part * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    tl.store(y_ptr + head * D + column, y, mask=column < D)


# The op and its launcher.


def attend(
    qkv: Tensor,
    k: Tensor,
    v: Tensor,
    view: View,
    *,
    scale: float,
    cap: float | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
) -> Tensor:
    """qkv (B, T, (H + 2G) head_dim) -> what attention reads, (B, T, H head_dim).

    k, v (B, G, S, head_dim) are one layer's caches, which take the new positions in. cap bounds
    the scores. q_weight, k_weight (head_dim,): of the heads' norms, with their eps and offset.

    On a GPU decoding is one or two launches without host reads, fit for CUDA graphs.
    """
    traits = Traits(scale, cap, q_weight, k_weight, eps, offset)
    if qkv.shape[1] == 1 and as_op(qkv) and serves(qkv):
        where = view.cos, view.sin, view.query, view.start, view.reach, view.window
        return op(qkv, k, v, *where, *traits)
    return formula(qkv, k, v, view, traits)


@torch.library.custom_op(f"{__package__}::attend", mutates_args=("k", "v"))
def op(
    qkv: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    query: Tensor,
    start: Tensor,
    reach: int,
    window: int | None,
    scale: float,
    cap: float | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    offset: float,
) -> Tensor:
    view = View(cos, sin, query, start, reach, window)
    run = launch if serves(qkv) and qkv.shape[1] == 1 else formula
    with as_is(qkv):
        return run(qkv, k, v, view, Traits(scale, cap, q_weight, k_weight, eps, offset))


@op.register_fake
def _(qkv, k, v, *_) -> Tensor:
    B, T, width = qkv.shape
    return qkv.new_empty(B, T, width - 2 * k.shape[1] * k.shape[3])


def launch(qkv: Tensor, k: Tensor, v: Tensor, view: View, traits: Traits) -> Tensor:
    """Run the kernels: one program for a share of a row's columns and the heads of one key head."""
    B, G, S, D = k.shape
    H, R = qkv.shape[2] // D - 2 * G, view.cos.shape[-1]
    qkv, cos, sin = qkv.contiguous(), view.cos.contiguous(), view.sin.contiguous()
    assert k.stride() == v.stride(), (k.stride(), v.stride())
    assert k.stride(3) == 1, k.stride()
    tile = tiling(B, H, G, S, D, k.itemsize)
    splits = tile["SPLITS"]
    y = qkv.new_empty(B, 1, H * D)
    part, lse = y, None
    if splits > 1:
        part = qkv.new_empty(B, H, splits, D, dtype=torch.float32)
        lse = qkv.new_empty(B, H, splits, dtype=torch.float32)
    attend_kernel[(B * G * splits,)](
        qkv_ptr=qkv,
        k_ptr=k,
        v_ptr=v,
        cos_ptr=cos,
        sin_ptr=sin,
        query_ptr=view.query,
        start_ptr=view.start,
        q_weight_ptr=traits.q_weight,
        k_weight_ptr=traits.k_weight,
        y_ptr=part,
        lse_ptr=lse,
        stride_b=k.stride(0),
        stride_g=k.stride(1),
        stride_s=k.stride(2),
        window=EVERYTHING if view.window is None else view.window,
        scale=traits.scale,
        cap=traits.cap,
        eps=traits.eps,
        H=H,
        G=G,
        D=D,
        R=R,
        OFFSET=traits.offset,
        **tile,
        num_warps=4,
    )
    if lse is not None:
        combine_kernel[(B * H,)](
            part_ptr=part,
            lse_ptr=lse,
            y_ptr=y,
            D=D,
            BLOCK_D=tile["BLOCK_D"],
            SPLITS=splits,
            num_warps=4,
        )
    return y


def tiling(B: int, H: int, G: int, S: int, D: int, itemsize: int) -> dict[str, int]:
    """Block sizes, and how many programs share a row's columns. Not yet tuned on a GPU.

    A product of tiles wants 16 rows: fewer query heads to a key head leave some of them idle,
    which costs nothing where reading the cache takes the time.
    """
    block_d = max(triton.next_power_of_2(D), 16)
    block_s = max(TILE // (block_d * itemsize), 16)
    wanted = min(PROGRAMS // (B * G), triton.cdiv(S, block_s), TOGETHER // block_d)
    return {
        "BLOCK_H": max(triton.next_power_of_2(H // G), 16),
        "BLOCK_D": block_d,
        "BLOCK_S": block_s,
        "SPLITS": 1 << max(wanted, 1).bit_length() - 1,  # down to a power of two
    }
