"""The op `attend`: all that lies between a block's first product and its second.

    q, k   <- their norms, if any (Gemma 3), turned by the rotary embedding
    caches <- k and v, at the columns of the new positions
    y      <- softmax(q k / scale, soft-capped if asked, over the columns that are seen) v

B  batch    T  new positions    S  columns of the cache    H  query heads    G  key/value heads

While decoding (T = 1) a row reads what it has filled of the cache, or what its window shows, and
nothing else: 4 G head_dim bytes a column in 16 bits. That is one launch, and a second where a row's
columns are shared out among several programs, because B x G of them would not fill a GPU. A prompt
goes through PyTorch's attention.
"""

import torch
from torch import Tensor

from ..devices import as_is, op, serves, tl, traced, triton
from ..residual import weighted
from .view import Traits, View, attend_reference

EVERYTHING = 2**31 - 1  # a window that hides nothing
PROGRAMS = 264  # two for each multiprocessor of an H200: fewer than this share out their columns
TILE = 16384  # bytes of keys at a time: with as much of values, in three stages, 96 KB
TOGETHER = 8192  # numbers of all shares of a head that the second launch holds in registers


@triton.jit
def turned(x_ptr, inside, column, weight_ptr, cos_ptr, sin_ptr, eps, D, R, OFFSET: tl.constexpr):
    """The heads at x_ptr (N, 1), normed and rotated, (N, BLOCK_D) in their own type."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    partner = tl.where(column < R // 2, column + R // 2, column - R // 2)
    rotated = column < R
    x = tl.load(x_ptr + column, mask=inside & (column < D), other=0.0).to(tl.float32)
    y = tl.load(x_ptr + partner, mask=inside & rotated, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        x_weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
        y_weight = tl.load(weight_ptr + partner, mask=rotated, other=0.0).to(tl.float32)
        x = weighted(x * scale, x_weight, OFFSET, dtype).to(dtype).to(tl.float32)
        y = weighted(y * scale, y_weight, OFFSET, dtype).to(dtype).to(tl.float32)
    cos = tl.load(cos_ptr + column, mask=rotated, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + column, mask=rotated, other=0.0).to(tl.float32)
    return (x * cos + y * sin).to(dtype)


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

    column, head = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_H)
    exists = column < D
    mine = (head < H // G)[:, None]
    head += g * (H // G)
    qkv_ptr += b * (H + 2 * G) * D
    cos_ptr += b * R
    sin_ptr += b * R
    q_ptr, key = qkv_ptr + head[:, None] * D, tl.arange(0, 1)[:, None]
    q = turned(q_ptr, mine, column, q_weight_ptr, cos_ptr, sin_ptr, eps, D, R, OFFSET)
    key_ptr = qkv_ptr + (H + g) * D + key
    k = turned(key_ptr, key == 0, column, k_weight_ptr, cos_ptr, sin_ptr, eps, D, R, OFFSET)
    v = tl.load(qkv_ptr + (H + G + g) * D + column, mask=exists, other=0.0)
    k_ptr += b * stride_b + g * stride_g + column
    v_ptr += b * stride_b + g * stride_g + column

    # The new position opens the first share's sums: nobody waits for what is written here.
    if split == 0:
        tl.store(k_ptr + now.to(tl.int64) * stride_s + key, k, mask=exists)
        tl.store(v_ptr + now.to(tl.int64) * stride_s + key, v, mask=exists)
    score = capped(tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1) * scale, cap)
    highest = tl.where(split == 0, score, -float("inf"))  # (BLOCK_H,)
    total = tl.where(split == 0, 1.0, tl.zeros_like(score))
    y = tl.where(split == 0, v.to(tl.float32), tl.zeros((BLOCK_H, BLOCK_D), tl.float32))
    for s0 in range(first, end, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        seen = s < end
        inside = seen[:, None] & exists
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
    tl.store(y_ptr + out[:, None] * D + column, y, mask=mine & exists)
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


def attend(qkv: Tensor, k: Tensor, v: Tensor, view: View, **fields) -> Tensor:
    """qkv (B, T, (H + 2G) head_dim) -> what attention reads, (B, T, H head_dim).

    k, v (B, G, S, head_dim) are one layer's caches, which take the new positions in; fields are
    those of `Traits`. On a GPU decoding is one or two launches, fit for CUDA graphs.
    """
    traits = Traits(**fields)
    decoding = qkv.shape[1] == 1  # a prompt's formula is PyTorch's operations to anyone
    if not (decoding and traced(qkv, k, v, traits.q_weight, traits.k_weight)):
        return attend_run(qkv, k, v, view, traits)
    columns = view.cos, view.sin, view.query, view.start, view.reach, view.window
    return attend_op(qkv, k, v, *columns, *traits)


def attend_run(qkv: Tensor, k: Tensor, v: Tensor, view: View, traits: Traits) -> Tensor:
    """By the kernels where they can run, else by the formula."""
    launched = qkv.shape[1] == 1 and serves(qkv, k, v, traits.q_weight, traits.k_weight)
    with as_is(qkv, launched):
        return (attend_launch if launched else attend_reference)(qkv, k, v, view, traits)


def attend_fake(qkv, k, v, *_) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] - 2 * k.shape[1] * k.shape[3])


@op("attend", attend_fake, mutates=("k", "v"))
def attend_op(
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
    """A view and traits by their fields, which are all that an op may take."""
    view = View(cos, sin, query, start, reach, window)
    return attend_run(qkv, k, v, view, Traits(scale, cap, q_weight, k_weight, eps, offset))


def attend_launch(qkv: Tensor, k: Tensor, v: Tensor, view: View, traits: Traits) -> Tensor:
    """Run the kernels: one program for a share of a row's columns and the heads of one key head."""
    B, G, S, D = k.shape
    H, R = qkv.shape[2] // D - 2 * G, view.cos.shape[-1]
    qkv, cos, sin = qkv.contiguous(), view.cos.contiguous(), view.sin.contiguous()
    assert k.stride() == v.stride(), (k.stride(), v.stride())
    assert k.stride(3) == 1, k.stride()
    tile = attend_tiling(B, H, G, S, D, k.itemsize)
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


def attend_tiling(B: int, H: int, G: int, S: int, D: int, itemsize: int) -> dict[str, int]:
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
