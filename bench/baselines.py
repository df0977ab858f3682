"""What one writes without us: hooks in PyTorch, the same compiled, a gather, a one-vector kernel.

B  rows     T  positions     D  model width     K  edits per row     N  directions in the bank

h (B, T, D); V (K, D) the directions that all rows share, w (K,) their weights or targets, in h's
type. Windows and clips, which our tables carry, are left out: to the baselines' advantage.
"""

import os
from collections.abc import Callable

import torch
from cases import EPS, Inputs, Shape, Way
from tinysteer_kernels.devices import HAS_TRITON, tl, triton
from torch import Tensor

try:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as Liger
except ImportError:
    Liger = None

# On a CPU Triton's kernels run in its interpreter only.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS_RUN = HAS_TRITON and (torch.cuda.is_available() or INTERPRETED)

# Steering alone.


def add_at_once(h: Tensor, w: Tensor, V: Tensor) -> Tensor:
    return h + w @ V


def add_each(h: Tensor, vectors: Tensor) -> Tensor:
    """One hook a vector: vectors (K, D), already scaled."""
    for v in vectors:
        h = h + v
    return h


def to_targets(h: Tensor, w: Tensor, V: Tensor) -> Tensor:
    """One hook an edit, each on the result of those before it."""
    if len(V) == 1:
        return h + (w - h @ V.T) @ V
    for t, v in zip(w, V, strict=True):
        h = h + (t - h @ v)[..., None] * v
    return h


def gather(h: Tensor, vectors: Tensor, slots: Tensor) -> Tensor:
    """Every position its own: vectors (N, D), already scaled, slots (K, B, T)."""
    for slot in slots:
        h = h + vectors[slot]
    return h


@triton.jit
def one_vector_kernel(x, bank, slots, scales, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """x (B T, D) += its slot's scale * its slot's vector; a slot below 0 is none."""
    m = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + m).to(tl.int64)
    if slot < 0:
        return
    scale = tl.load(scales + slot)
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        h = tl.load(x + m * D + column, mask=column < D, other=0.0).to(tl.float32)
        u = tl.load(bank + slot * D + column, mask=column < D, other=0.0).to(tl.float32)
        tl.store(x + m * D + column, h + scale * u, mask=column < D)


def one_vector(x: Tensor, bank: Tensor, slots: Tensor, scales: Tensor) -> Tensor:
    """In place, a program a position. slots (B T,) int32, scales (N,) float32."""
    D = x.shape[-1]
    one_vector_kernel[(len(slots),)](x, bank, slots, scales, D=D, BLOCK_D=1024, num_warps=4)
    return x


# Add, edit, norm.


def norm(h: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm, rounded where Llama's is."""
    y = h.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)
    return weight * y.to(h.dtype)


def whole(x: Tensor, delta: Tensor, weight: Tensor, *moves: tuple) -> tuple[Tensor, Tensor]:
    """Written for a compiler to fuse: float32 throughout, and sums in place of matrix products.

    moves: of each edit slope, w and u, (D,) or (B, 1, D).
    """
    h = (x + delta).float()
    for slope, w, u in moves:
        d = w - (h * u.float()).sum(-1, keepdim=True) if slope else w
        h = h + d * u.float()
    h = h.to(x.dtype)
    return h, norm(h, weight)


def whole_shared(x, delta, weight, slope: int, w: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    return whole(x, delta, weight, *[(slope, t, v) for t, v in zip(w, V, strict=True)])


def whole_own(x, delta, weight, slope: int, w: Tensor, bank: Tensor, index: Tensor):
    """Every row its own: w (B, K), bank (N, D), index (B, K)."""
    columns = zip(w.unbind(1), index.unbind(1), strict=True)
    moves = [(slope, t[:, None, None], bank[i][:, None]) for t, i in columns]
    return whole(x, delta, weight, *moves)


# What the calls take besides x.


def shared_vectors(i: Inputs) -> tuple[Tensor, Tensor]:
    return i.weights[0], i.bank


def own_vectors(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return i.weights, i.bank, i.index


def scaled(i: Inputs) -> tuple[Tensor]:
    return ((i.weights.flatten()[: len(i.bank), None].float() * i.bank.float()).to(i.x.dtype),)


def scaled_and_slots(i: Inputs) -> tuple[Tensor, Tensor]:
    return *scaled(i), i.index.T[..., None].expand(-1, -1, i.x.shape[1]).contiguous()


def slots_and_scales(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """K is 1: a position's slot is its row's direction."""
    slots = i.index[:, 0].int().repeat_interleave(i.x.shape[1])
    return i.bank, slots, i.weights.flatten()[: len(i.bank)].float()


# The ways that fit a shape, the compiled ones where compiling is wanted.


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False, fullgraph=True)


def alone(shape: Shape, kind: str, compiling: bool) -> list[Way]:
    def on_x(name: str, function: Callable, prepare: Callable) -> Way:
        return Way(name, lambda i, *rest: function(i.x, *rest), kind, False, prepare)

    ways = []
    if shape.directions == "shared":
        once = add_at_once if kind == "adds" else to_targets
        ways.append(on_x("eager", once, shared_vectors))
        if compiling:
            ways.append(on_x("compiled", compiled(once), shared_vectors))
    if kind == "adds":
        if shape.directions == "shared":
            ways.append(on_x("one add a vector", add_each, scaled))
        ways.append(on_x("gather", gather, scaled_and_slots))
        if compiling:
            ways.append(on_x("gather, compiled", compiled(gather), scaled_and_slots))
        if shape.K == 1 and KERNELS_RUN:
            ways.append(on_x("one-vector kernel", one_vector, slots_and_scales))
    return ways


def fused(shape: Shape, kind: str, compiling: bool) -> list[Way]:
    steer = add_at_once if kind == "adds" else to_targets

    def plain(i):
        h = i.x + i.delta
        return h, norm(h, i.weight)

    def hooked(i, w, V):
        h = steer(i.x + i.delta, w, V)
        return h, norm(h, i.weight)

    def liger(i):
        return Liger.apply(i.x, i.delta, i.weight, EPS)[::-1]  # it returns the norm first

    own, slope = shape.directions == "own", int(kind == "targets")
    vectors = own_vectors if own else shared_vectors
    ways = [Way("off, eager", plain, "off", True)]
    if not own:
        ways.append(Way("eager", hooked, kind, True, vectors))
    if compiling:
        off, on = compiled(whole), compiled(whole_own if own else whole_shared)

        def compiled_off(i):
            return off(i.x, i.delta, i.weight)

        def compiled_on(i, *vectors):
            return on(i.x, i.delta, i.weight, slope, *vectors)

        ways.append(Way("off, compiled", compiled_off, "off", True))
        ways.append(Way("compiled", compiled_on, kind, True, vectors))
    return [*ways, Way("off, Liger", liger, "off", True)] if Liger else ways
