"""Random inputs for the kernels in one case, and the float64 answers that every way must meet.

B  rows     T  positions     D  model width     K  moves per row     N  directions in the bank
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from tinysteer_kernels import Move, MoveTables, compile_moves
from tinysteer_kernels.naive import steer_naive
from torch import Tensor

from bench.machine import DEVICE
from bench.timing import Replay, poison

EPS, MOST = 1e-6, 4  # of the norm; rounds in place that are checked
# Of a position's relative error; every edit moves it by a fifth and more.
LIMITS = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}
VERBS = {  # the k-th move of a row, from a weight
    "adds": lambda k, w: {"bias": w},
    "targets": lambda k, w: {"bias": w, "slope": 1.0},
    "mixed": lambda k, w: (
        {"bias": w, "last": -1},
        {"bias": w, "slope": 1.0, "first": 0},
        {"bias": w, "slope": 1.0, "low": 0.0},
        {"bias": w, "slope": 0.5, "high": 0.0},
    )[k % 4],
}
KINDS = ("idle", *VERBS, *(f"{verb}, half idle" for verb in VERBS))  # besides "off"


class Case(NamedTuple):
    """What is steered: sizes, types, and which optional arguments are given."""

    B: int
    T: int
    D: int
    K: int
    directions: str = "shared"  # by all rows, N = K; "own": N = B K
    dtype: str = "bfloat16" if DEVICE == "cuda" else "float32"
    position: bool = True
    slot: bool = False

    @property
    def N(self) -> int:  # noqa: N802
        return self.K * (self.B if self.directions == "own" else 1)

    def __str__(self) -> str:
        notes = [self.directions] * (self.directions == "own") + ["slot"] * self.slot
        notes += ["no position"] * (not self.position)
        usual = self.dtype == Case._field_defaults["dtype"]
        return " ".join([*map(str, self[:4]), *notes, *([] if usual else [self.dtype])])


class Inputs(NamedTuple):
    """One set. weights: the biases of adds and targets as the baselines take them, x's type."""

    x: Tensor  # (B, T, D), like delta
    delta: Tensor
    weight: Tensor  # (D,)
    bank: Tensor  # (N, D)
    rows: dict[str, list[list[Move]]]
    tables: dict[str, MoveTables]  # of those rows, from the last to the first where slots are given
    position: Tensor | None  # (B, T), 0 in the middle
    slot: Tensor | None  # (B,)
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

    def traffic(self, case: Case, streams: float | None = None) -> float:
        """Bytes, each input read once and each output written once: the floor of any way.

        streams: how often a stream (B, T, D) counts, if that is not what is moved.
        """
        rows = 0 if self.kind in ("off", "idle") else -(-case.B // (1 + ("half" in self.kind)))
        streams = streams or (4 if self.fused else 1 + rows / case.B)
        shared = case.N * (rows > 0) if case.directions == "shared" else case.K * rows
        numbers = streams * case.B * case.T + self.fused + shared
        return numbers * case.D * getattr(torch, case.dtype).itemsize

    def touched(self, case: Case) -> float:
        """Bytes of memory in use: a stream edited in place counts once."""
        return self.traffic(case, 4 if self.fused else 1)


def make(case: Case, kinds: set[str], n: int, bank_dtype=None, device=DEVICE) -> list[Inputs]:
    """n sets of Inputs, none with memory of another's."""
    (B, T, D, K), dtype = case[:4], getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(B * T + D + K)
    bank = torch.randn(case.N, D, generator=generator)
    bank = (bank / bank.norm(dim=-1, keepdim=True)).to(device, bank_dtype or dtype)
    sign = torch.randint(2, (B, K), generator=generator) * 2 - 1
    size = 0.2 + 0.3 * torch.rand(B, K, generator=generator)  # of a position's norm
    weights = (sign * size * D**0.5).to(dtype)  # that all ways add the same
    if case.directions == "shared":
        weights = weights[:1].expand(B, K).contiguous()
    index = torch.arange(case.N).view(-1, K).expand(B, K).contiguous()
    position = (torch.arange(T, dtype=torch.int32) - T // 2).repeat(B, 1) if case.position else None
    slot = torch.arange(B, dtype=torch.int32).flip(0) if case.slot else None

    def moves(kind: str, b: int) -> list[Move]:
        if kind == "idle" or ("half" in kind and b % 2):
            return []
        pairs, verb = zip(index[b].tolist(), weights[b].tolist(), strict=True), kind.split(",")[0]
        return [Move(i, **VERBS[verb](k, w)) for k, (i, w) in enumerate(pairs)]

    rows = {kind: [moves(kind, b) for b in range(B)] for kind in kinds - {"off"}}
    order = -1 if case.slot else 1
    tables = {kind: compile_moves(bank, rows[kind][::order], capacity=K) for kind in rows}
    many = {kind: list(map(MoveTables, copies(t.packed, n))) for kind, t in tables.items()}
    tables = [{kind: many[kind][i] for kind in many} for i in range(n)]
    weight = 1 + 0.1 * torch.randn(D, generator=generator)
    streams = (torch.randn(n, B, T, D, dtype=dtype, device=device).unbind() for _ in range(2))
    norm = copies(weight.to(device, dtype), n)
    given = (position, slot, weights, index)
    rest = ([None] * n if t is None else copies(t.to(device), n) for t in given)
    fields = *streams, norm, copies(bank, n), [rows] * n, tables, *rest
    return [Inputs(*one) for one in zip(*fields, strict=True)]


def copies(tensor: Tensor, n: int) -> list[Tensor]:
    """n tensors with its contents, in one allocation, as well aligned as if each had its own."""
    size = -(-tensor.nbytes // 256) * 256 // tensor.itemsize
    many = tensor.new_empty(n, size)
    many[:, : tensor.numel()] = tensor.flatten()
    return [one[: tensor.numel()].view(tensor.shape) for one in many.unbind()]


def reference(inputs: Inputs, way: Way, times: int = 1) -> list[Tensor]:
    """What a way must give in float64, by the definition: one move after another, so many times."""
    h = inputs.x.double() + (inputs.delta.double() if way.fused else 0)
    for _ in range(times if way.kind != "off" else 0):
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


def verify_replay(way: Way, replay: Replay, sets: list[Inputs]) -> float:
    """Poison what a replay wrote, do it on a fresh x, and check the first and the last set.

    What is moved in place, so often in a replay that roundings add up, is called once instead.
    """
    errors = []
    for i in {0, max(replay.outputs)}:
        inputs, out, times = sets[i], replay.outputs[i], 1
        if isinstance(out, Tensor) and out.data_ptr() == inputs.x.data_ptr():
            times = len(range(i, replay.n_calls, len(replay.sets)))
        else:
            poison(out)
        if times > MOST:
            errors.append(verify(way, inputs))
            continue
        inputs.x.normal_()
        expected = reference(inputs, way, times)
        replay.replay()
        errors.append(check(way, inputs.x, replay.outputs[i], expected))
    return max(errors)
