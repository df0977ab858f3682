"""Random inputs for the kernels at one shape, and the float64 answers that every way must meet.

B  rows     T  positions     D  model width     K  edits per row     N  directions in the bank
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from timing import Graph, poison
from tinysteer_kernels import Move, MoveTables, compile_moves
from tinysteer_kernels.naive import steer_naive
from torch import Tensor

EPS = 1e-6
BF16, FP32 = torch.bfloat16, torch.float32
LIMITS = {BF16: 2e-2, FP32: 2e-5}  # of a position's relative error; every edit moves it by 0.2

# kind -> the k-th edit of a row, from a weight
KINDS = {
    "adds": lambda k, w: {"bias": w},
    "targets": lambda k, w: {"bias": w, "slope": 1.0},
    "half": lambda k, w: {"bias": w, "slope": 1.0},  # of the rows
    "mixed": lambda k, w: (
        {"bias": w, "last": -1},
        {"bias": w, "slope": 1.0, "first": 0},
        {"bias": w, "slope": 1.0, "low": 0.0},
        {"bias": w, "slope": 0.5, "high": 0.0},
    )[k % 4],
}


class Inputs(NamedTuple):
    """One set. weights: the biases of adds and targets as the baselines take them, x's type."""

    x: Tensor  # (B, T, D), like delta
    delta: Tensor
    weight: Tensor  # (D,)
    bank: Tensor  # (N, D)
    rows: dict[str, list[list[Move]]]
    tables: dict[str, MoveTables]  # of those rows
    position: Tensor  # (B, T), 0 in the middle
    weights: Tensor  # (B, K)
    index: Tensor  # (B, K) int64


class Way(NamedTuple):
    """One way to compute a result: x in place, x anew, or both x and its norm.

    prepare: what `call` takes besides Inputs, made ready once for each set and never timed.
    """

    name: str
    call: Callable[..., Tensor | tuple[Tensor, Tensor]]
    kind: str
    fused: bool
    prepare: Callable[[Inputs], tuple] = lambda inputs: ()
    bank_itemsize: int = 2

    @property
    def acting(self) -> float:
        """The share of positions that are edited."""
        return {"off": 0.0, "idle": 0.0, "half": 0.5}.get(self.kind, 1.0)


class Shape(NamedTuple):
    B: int
    T: int
    D: int
    K: int
    directions: str = "shared"  # by all rows, N = K; "own": N = B K

    @property
    def N(self) -> int:  # noqa: N802
        return self.K * (self.B if self.directions == "own" else 1)

    def traffic(self, way: Way) -> float:
        """Bytes, each input read once and each output written once: the floor of any way."""
        return self.memory(way, 4 if way.fused else 1 + way.acting)

    def touched(self, way: Way) -> float:
        """Bytes of memory in use: a stream edited in place counts once."""
        return self.memory(way, 4 if way.fused else 1)

    def memory(self, way: Way, streams: float) -> float:
        """Of 16-bit streams (B, T, D), the norm's weight and the directions."""
        norm = self.D if way.fused else 0
        bank = way.acting * self.N * self.D * way.bank_itemsize
        return 2 * (streams * self.B * self.T * self.D + norm) + bank


def make(shape: Shape, kinds: set[str], n: int, dtype=BF16, bank_dtype=None, device="cuda"):
    """n sets of Inputs, none with memory of another's."""
    B, T, D, K = shape[:4]
    generator = torch.Generator().manual_seed(B * T + D + K)
    bank = torch.randn(shape.N, D, generator=generator)
    bank = (bank / bank.norm(dim=-1, keepdim=True)).to(device, bank_dtype or dtype)
    sign = torch.randint(2, (B, K), generator=generator) * 2 - 1
    size = 0.2 + 0.3 * torch.rand(B, K, generator=generator)  # of a position's norm
    weights = (sign * size * D**0.5).to(dtype)  # that all ways add the same
    if shape.directions == "shared":
        weights = weights[:1].expand(B, K).contiguous()
    index = torch.arange(shape.N).view(-1, K).expand(B, K).contiguous()
    position = (torch.arange(T, dtype=torch.int32) - T // 2).repeat(B, 1)

    def moves(kind: str, b: int) -> list[Move]:
        if kind == "idle" or (kind == "half" and b % 2):
            return []
        pairs = zip(index[b].tolist(), weights[b].tolist(), strict=True)
        return [Move(i, **KINDS[kind](k, w)) for k, (i, w) in enumerate(pairs)]

    rows = {kind: [moves(kind, b) for b in range(B)] for kind in kinds - {"off"}}
    tables = {kind: compile_moves(bank, rows[kind], capacity=K) for kind in rows}
    many = {kind: list(map(MoveTables, copies(t.packed, n))) for kind, t in tables.items()}
    tables = [{kind: many[kind][i] for kind in many} for i in range(n)]
    weight = 1 + 0.1 * torch.randn(D, generator=generator)
    streams = (torch.randn(n, B, T, D, dtype=dtype, device=device).unbind() for _ in range(2))
    norm, rest = copies(weight.to(device, dtype), n), (position, weights, index)
    rest = (copies(t.to(device), n) for t in rest)
    fields = zip(*streams, norm, copies(bank, n), [rows] * n, tables, *rest, strict=True)
    return [Inputs(*one) for one in fields]


def copies(tensor: Tensor, n: int) -> list[Tensor]:
    """n tensors with its contents, in one allocation, as well aligned as if each had its own."""
    size = -(-tensor.nbytes // 256) * 256 // tensor.itemsize
    many = tensor.new_empty(n, size)
    many[:, : tensor.numel()] = tensor.flatten()
    return [one[: tensor.numel()].view(tensor.shape) for one in many.unbind()]


def reference(inputs: Inputs, way: Way) -> list[Tensor]:
    """What a way must give in float64, by the definition: one move after another."""
    h = inputs.x.double() + (inputs.delta.double() if way.fused else 0)
    if way.kind != "off":
        h = steer_naive(h, inputs.bank, inputs.rows[way.kind], inputs.position)
    if not way.fused:
        return [h]
    return [h, h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS) * inputs.weight.double()]


def check(way: Way, x: Tensor, outputs: Tensor | tuple, expected: list[Tensor]) -> float:
    """The largest relative error of a position; AssertionError where it is too large, or NaN."""
    outputs = outputs if isinstance(outputs, tuple) else [outputs]
    like = {(getattr(o, "dtype", type(o)), *getattr(o, "shape", ())) for o in outputs}
    assert like == {(x.dtype, *x.shape)}, f"{way.name} returns {like}, x is {(x.dtype, *x.shape)}"
    pairs = list(zip(outputs, expected, strict=True))
    errors = [((o - e).norm(dim=-1) / e.norm(dim=-1)).flatten() for o, e in pairs]
    error, limit = float(torch.cat(errors).amax()), LIMITS[x.dtype]  # NaN, if one is
    assert error < limit, f"{way.name} is off by {error:.2g}, the limit is {limit:.0e}"
    return error


def verify(way: Way, inputs: Inputs) -> float:
    """Call once on a fresh x, and check."""
    inputs.x.normal_()
    expected = reference(inputs, way)  # first: the call may work in place
    return check(way, inputs.x, way.call(inputs, *way.prepare(inputs)), expected)


def verify_graph(way: Way, graph: Graph, sets: list[Inputs]) -> float:
    """Poison what the graph wrote, replay it on a fresh x, and check the first and the last set."""
    errors = []
    for i in {0, max(graph.outputs)}:
        if graph.outputs[i] is sets[i].x:  # edited in place, many times a replay: one call instead
            errors.append(verify(way, sets[i]))
            continue
        sets[i].x.normal_()
        poison(graph.outputs[i])
        graph.replay()
        errors.append(check(way, sets[i].x, graph.outputs[i], reference(sets[i], way)))
    return max(errors)
