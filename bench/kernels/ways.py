"""Ways to steer: ours, and what one writes without us. Eager, compiled, or as a kernel.

B  rows     T  positions     D  model width     K  moves per row     N  directions in the bank

h (B, T, D); V (K, D) the directions that all rows share, w (K,) their weights or targets; where
each row has its own, w (B, K) and index (B, K) into the bank (N, D). All in h's type. Windows and
clips, which our tables carry, are left out of the baselines: to their advantage.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from tinysteer_kernels import MoveTables, add_steer_norm, residual, steer, steering
from tinysteer_kernels.devices import HAS_TRITON, tl, triton
from torch import Tensor

from bench.kernels.cases import EPS, Case, Inputs, Way
from bench.machine import ON_GPU

# On a CPU Triton's kernels run in its interpreter only, and in float32: it casts wrongly.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and HAS_TRITON and not ON_GPU

# Ours.


def ours(kind: str, function: Callable = steer, name: str = "steer") -> Way:
    """`steer`, or what a reader has in its place, who is given a slot only where there is one."""

    def call(i: Inputs) -> Tensor:
        slot = () if i.slot is None else (i.slot,)
        return function(i.x, i.bank, i.tables[kind], i.position, *slot)

    return Way(f"{name}: {kind}", call, kind, fused=False)


def ours_fused(kind: str) -> Way:
    def call(i: Inputs) -> tuple[Tensor, Tensor]:
        steered = {"bank": i.bank, "tables": i.tables.get(kind), "position": i.position}
        return add_steer_norm(i.x, i.delta, i.weight, EPS, **steered, slot=i.slot)

    return Way(kind, call, kind, fused=True)


@contextmanager
def interpreted() -> Iterator[None]:
    """In it our ops run their kernels on a CPU, which Triton interprets."""
    with ExitStack() as stack:
        for module in (steering, residual):
            stack.enter_context(patch.object(module, "fits", lambda *_: True))
        yield


# Steering alone, without us.


def add_at_once(h: Tensor, w: Tensor, V: Tensor) -> Tensor:
    return h + w @ V


def add_each(h: Tensor, w: Tensor, V: Tensor) -> Tensor:
    """One hook a vector."""
    for weight, v in zip(w, V, strict=True):
        h = h + weight * v
    return h


def to_targets(h: Tensor, w: Tensor, V: Tensor) -> Tensor:
    """One hook an edit, each on the result of those before it."""
    for t, v in zip(w, V, strict=True):
        h = h + (t - h @ v)[..., None] * v
    return h


def gathered_adds(h: Tensor, w: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    for weight, i in zip(w.unbind(1), index.unbind(1), strict=True):
        h = h + (weight[:, None] * bank[i])[:, None]
    return h


def gathered_targets(h: Tensor, w: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    for t, i in zip(w.unbind(1), index.unbind(1), strict=True):
        u = bank[i]
        h = torch.baddbmm(h, t[:, None, None] - h @ u[..., None], u[:, None])
    return h


def baddbmm(h: Tensor, w: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    return torch.baddbmm(h, w[:, None].expand(-1, h.shape[1], -1), bank[index])


def embedding_bag(h: Tensor, w: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    moved = F.embedding_bag(index, bank, per_sample_weights=w, mode="sum")
    return h + moved[:, None]


def formula(h: Tensor, bank: Tensor, packed: Tensor, position: Tensor | None, slot) -> Tensor:
    return steering.steer_reference(h, bank, MoveTables(packed), position, slot)


@triton.jit
def one_vector_kernel(x, bank, index, weights, T, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """x (B T, D) += its row's weight * its row's direction; an index below 0 is none."""
    m = tl.program_id(0).to(tl.int64)
    i = tl.load(index + m // T).to(tl.int64)
    if i < 0:
        return
    weight = tl.load(weights + m // T).to(tl.float32)
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        h = tl.load(x + m * D + column, mask=column < D, other=0.0).to(tl.float32)
        u = tl.load(bank + i * D + column, mask=column < D, other=0.0).to(tl.float32)
        tl.store(x + m * D + column, h + weight * u, mask=column < D)


def one_vector(x: Tensor, w: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """In place, a launch a vector, a program a position. w and index (K, B), contiguous."""
    B, T, D = x.shape
    for weights, i in zip(w, index, strict=True):
        one_vector_kernel[(B * T,)](x, bank, i, weights, T, D=D, BLOCK_D=1024, num_warps=4)
    return x


@triton.jit
def gather_reduce_kernel(x, bank, index, weights, T, K, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """As multi-LoRA serving expands (BGMV): a program sums one block of a row's directions."""
    m, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    h = tl.load(x + m * D + column, mask=column < D, other=0.0).to(tl.float32)
    for k in range(K):
        i = tl.load(index + m // T * K + k).to(tl.int64)
        weight = tl.load(weights + m // T * K + k).to(tl.float32)
        u = tl.load(bank + i * D + column, mask=column < D, other=0.0).to(tl.float32)
        h += weight * u
    tl.store(x + m * D + column, h, mask=column < D)


def gather_reduce(x: Tensor, w: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """In place, one launch. w and index (B, K)."""
    (B, T, D), K = x.shape, w.shape[1]
    grid = B * T, triton.cdiv(D, 1024)
    gather_reduce_kernel[grid](x, bank, index, w, T, K, D=D, BLOCK_D=1024, num_warps=4)
    return x


# Add, edit, norm, without us.


def norm(h: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm, rounded where Llama's is."""
    y = h.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)
    return weight * y.to(h.dtype)


def whole(slope: int, x: Tensor, delta: Tensor, weight: Tensor, w: Tensor, bank: Tensor, index):
    """Written for a compiler to fuse: float32 throughout, and sums in place of matrix products."""
    h = (x + delta).float()
    for t, i in zip(w.float().unbind(1), index.unbind(1), strict=True):
        u = bank[i].float()[:, None]
        h = h + (t[:, None, None] - slope * (h * u).sum(-1, keepdim=True)) * u
    h = h.to(x.dtype)
    return h, norm(h, weight)


# The ways that fit a case, the compiled ones where compiling is wanted.


@functools.cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False, fullgraph=True)


def shared(i: Inputs) -> tuple:
    return i.weights[0], i.bank


def own(i: Inputs) -> tuple:
    return i.weights, i.bank, i.index


def rivals(case: Case, kind: str, compiling: bool) -> list[Way]:
    """Of `steer`: for "adds" and "targets", and for other kinds our formula compiled."""
    several = {"adds": [gathered_adds, baddbmm], "targets": [gathered_targets]}.get(kind, [])
    if kind == "adds" and case.T == 1:
        several.append(embedding_bag)
    alike = {"adds": [add_at_once, add_each], "targets": [to_targets]}.get(kind, [])
    functions = [(f, own) for f in several]
    if case.directions == "shared":
        functions[:0] = [(f, shared) for f in alike]
    tables = lambda i: (i.bank, i.tables[kind].packed, i.position, i.slot)  # noqa: E731
    ways = [rival(function, kind, prepare) for function, prepare in functions]
    if compiling:
        functions.append((formula, tables))
        ways += [rival(f, kind, p, compiled(f)) for f, p in functions if f is not embedding_bag]
    runs = ON_GPU or (INTERPRETED and case.dtype == "float32" and not compiling)  # nor is it timed
    if kind == "adds" and runs:
        columns = lambda i: (i.weights.T.contiguous(), i.bank, i.index.T.contiguous())  # noqa: E731
        ways.append(rival(one_vector, kind, columns))
        ways.append(rival(gather_reduce, kind, own))
    return ways


def rival(function: Callable, kind: str, prepare: Callable, run: Callable | None = None) -> Way:
    name = function.__name__ + ", compiled" * (run is not None)
    return Way(name, lambda i, *rest: (run or function)(i.x, *rest), kind, False, prepare)


def fused_rivals(case: Case, kind: str, compiling: bool) -> list[Way]:
    """Of `add_steer_norm`, "adds" or "targets": no edits, hooks, and written for a compiler."""
    if kind not in ("adds", "targets"):
        return []
    edit = {"adds": gathered_adds, "targets": gathered_targets}
    if case.directions == "shared":
        edit = {"adds": add_at_once, "targets": to_targets}
    prepare = shared if case.directions == "shared" else own

    def off(i: Inputs) -> tuple[Tensor, Tensor]:
        h = i.x + i.delta
        return h, norm(h, i.weight)

    def hooked(i: Inputs, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        h = edit[kind](i.x + i.delta, *vectors)
        return h, norm(h, i.weight)

    ways = [Way("off, eager", off, "off", True), Way("hooked", hooked, kind, True, prepare)]
    if compiling:
        function, slope = compiled(whole), int(kind == "targets")

        def compiled_off(i: Inputs) -> tuple[Tensor, Tensor]:
            nothing = i.weights[:, :0], i.bank, i.index[:, :0]
            return function(0, i.x, i.delta, i.weight, *nothing)

        def compiled_on(i: Inputs) -> tuple[Tensor, Tensor]:
            return function(slope, i.x, i.delta, i.weight, *own(i))

        ways.append(Way("off, compiled", compiled_off, "off", True))
        ways.append(Way("whole, compiled", compiled_on, kind, True))
    return ways
