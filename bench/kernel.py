"""The two kernels on a GPU: microseconds, percent of a copy, and what one writes without us.

    python bench/kernel.py [check | quick | decode | prefill | baselines | tuning]    or all
    python bench/kernel.py --with mine.py:function [KIND ...]

From a checkout that is not installed: PYTHONPATH=.:kernels python bench/kernel.py

--with puts function(x, bank, tables, position) of your own beside `steer`. x (B, T, D), float32 or
bfloat16, is moved in place or copied, and returned; bank (N, D) is of x's type or float32; tables
are `MoveTables` of B rows and K moves; position (B, T) int32 is 0 at the last prompt token. What
errs at the shapes of `check` is refused, with exit code 1; the rest is timed, on a CPU too. KINDs
are the moves that it can do: idle, adds, targets, half or mixed; all unless said.

"off" is add_steer_norm without edits, "idle" with tables in which no row has one; in "half" every
second row has, and "mixed" edits are of all kinds, with windows. "launched" are the kernels in
Triton's interpreter, in float32 alone: its casts to bfloat16 are wrong.

Every way is checked against float64 before it is timed and after, its results poisoned between.
The ways of one line are replayed in turn: bfloat16, positions given, inputs cold unless said. A
difference is to the line's first way, a 95 % interval; % is of the bandwidth of a copy in the same
run, for the bytes that any way must move. Where there is no GPU only `check` runs; then, with
TRITON_INTERPRET=1, the kernels run too, in the interpreter.
"""

import itertools
import runpy
import statistics
import sys
import time
from collections.abc import Iterator, Sequence

import baselines
import torch
from baselines import INTERPRETED, KERNELS_RUN
from cases import BF16, FP32, KINDS, LIMITS, Inputs, Shape, Way, make, verify, verify_graph
from ceilings import copy_bandwidth
from common import gpu, table, where
from ours import alone, fused, launched, precise, tiled
from timing import Graph, capture, measure, n_cold_sets, record
from tinysteer_kernels import MoveTables

WIDTHS = (1536, 2048, 2304, 3072, 3584, 8192)  # and 4096
STEERED = ("idle", *KINDS)
# Guessed before any run.
MINUTES = {"quick": 2, "decode": 4, "prefill": 4, "baselines": 6, "tuning": 4, "yours": 1}


# Right first.


def small(kinds: Sequence[str]) -> Iterator[tuple[Shape, Inputs]]:
    """Inputs at shapes that differ in all that matters, of three pairs of types each."""
    on_gpu = torch.cuda.is_available()
    D, counts, device = (2304, (1, 4, 16), "cuda") if on_gpu else (136, (1, 2, 8), "cpu")
    for (B, T), K in itertools.product(((1, 1), (3, 1), (2, 5)), counts):
        for directions in ("shared", "own"):
            shape = Shape(B, T, D, K, directions)
            for types in ((FP32, FP32), (BF16, BF16), (BF16, FP32)):
                yield shape, *make(shape, set(kinds), 1, *types, device)


def check() -> None:
    """All ways but torch.compile's, at small shapes, against float64."""
    on_gpu, errors = torch.cuda.is_available(), {}
    for shape, inputs in small(STEERED):
        dtype = inputs.x.dtype
        ways = [*map(fused, ("off", *STEERED)), *map(alone, STEERED)]
        if KERNELS_RUN and not on_gpu and dtype == FP32:  # in bfloat16 the interpreter errs
            ways += [way for kind in ("off", *STEERED) for way in launched(kind)]
        if dtype == inputs.bank.dtype:
            ways += [
                way._replace(name=f"{way.name}: {kind}" if way.kind == kind else way.name)
                for kind in ("adds", "targets")
                for of in (baselines.alone, baselines.fused)
                for way in of(shape, kind, compiling=False)
                if way.name != "one-vector kernel" or on_gpu or dtype == FP32
            ]
        for way in ways:
            name = f"{way.name}, add and norm" if way.fused else way.name
            seen = errors.setdefault(name, {dtype: [] for dtype in LIMITS})
            seen[dtype].append(verify(way, inputs))
    rows = [
        [name, *(f"{max(seen[dtype]):.1e}" if seen[dtype] else "" for dtype in LIMITS)]
        for name, seen in sorted(errors.items(), key=lambda item: "add and norm" in item[0])
    ]
    limits = [f"{str(dtype).split('.')[1]} (at most {LIMITS[dtype]:.0e})" for dtype in LIMITS]
    print(table(["worst relative error of a position", *limits], rows), end="\n\n")
    if on_gpu:
        check_graphs()


def check_graphs() -> None:
    """A graph captured with idle tables does what they say at each replay, without allocating."""
    kinds = ("idle", "adds", "targets", "mixed", "half", "idle")
    for T in (1, 5):
        (inputs,) = make(Shape(4, T, 2304, 4, "own"), set(kinds), 1)
        tables = MoveTables(inputs.tables["idle"].packed.clone())
        live = inputs._replace(tables={"live": tables})
        for way in (alone("live"), fused("live")):
            graph = Graph(way.call, [(live,)], 1)
            for kind in (*kinds, "turned", *kinds):
                if kind == "turned":
                    live.bank.neg_()  # the one change that leaves the Gram matrices right
                    continue
                tables.copy_(inputs.tables[kind])
                x = live.x.normal_().clone()
                before = torch.cuda.memory_allocated()
                graph.replay()
                assert torch.cuda.memory_allocated() == before, "a replay allocates"
                replayed = torch.stack([t.clone() for t in as_tuple(graph.outputs[0])])
                live.x.copy_(x)  # which steer edits in place
                eager = torch.stack(as_tuple(way.call(live)))
                assert torch.equal(replayed, eager), f"{way.name}, T {T}: {kind} is not as eager"
    print("CUDA graphs: tables and bank changed between replays, every result as an eager call's\n")


def as_tuple(outputs) -> tuple[torch.Tensor, ...]:
    return (outputs,) if isinstance(outputs, torch.Tensor) else outputs


# Then fast.


class Part:
    """The lines of one part, each of several ways at one shape: checked, timed, written down."""

    def __init__(self, name: str):
        self.name, self.begin, self.lines = name, time.perf_counter(), []
        self.copy = copy_bandwidth()
        about = f"about {MINUTES[name]} minutes; a copy moves {self.copy / 1e9:.0f} GB/s"
        print(f"{name}: {about}", flush=True)

    def line(self, shape: Shape, ways: list[Way], warm: bool = False) -> None:
        torch.cuda.empty_cache()
        touched = min(shape.touched(way) for way in ways)
        sets = make(shape, {way.kind for way in ways}, 1 if warm else n_cold_sets(touched))
        errors, graphs = {}, {}
        for way in ways:
            try:
                errors[way.name] = verify(way, sets[0])
                ready = [(inputs, *way.prepare(inputs)) for inputs in sets]
                graphs[way.name] = capture(way.call, ready)
            except Exception as error:  # one baseline's failure should not cost the others' numbers
                if way is ways[0]:
                    raise
                print(f"{way.name} at {shape} is left out: {error!r:.500}", flush=True)
        times, clock, line = measure(graphs), gpu("clocks.sm"), []
        for way in (way for way in ways if way.name in graphs):
            seen, graph = times[way.name], graphs[way.name]
            error = max(errors[way.name], verify_graph(way, graph, sets))
            gbs = 1e-3 * shape.traffic(way) / seen.us
            result = {"part": self.name, **shape._asdict(), "dtype": "bfloat16", "way": way.name}
            result |= {"kind": way.kind, "fused": way.fused, "warm": warm} | seen._asdict()
            result |= {"gbs": gbs, "percent": 1e11 * gbs / self.copy, "copy_gbs": self.copy / 1e9}
            result |= {"sets_mb": len(graph.outputs) * shape.touched(way) / 1e6}
            result |= {"calls": graph.n_calls, "error": error, "sm_mhz": clock}
            line.append(record("kernel", **result))
        self.lines.append(line)
        elapsed = time.perf_counter() - self.begin
        print(f"{elapsed:4.0f} s  {' '.join(map(str, shape))}", file=sys.stderr, flush=True)

    def show(self) -> None:
        """A table for each choice of ways: a row a shape, or a row a way if those are more."""
        tables = {}
        for line in self.lines:
            tables.setdefault(tuple(seen["way"] for seen in line), []).append(line)
        for names, lines in tables.items():
            heads = ["B T D K: us", *names]
            rows = [[described(line[0]), *cells(line)] for line in lines]
            if len(names) > len(lines):
                heads, *rows = zip(heads, *rows, strict=True)
            print(table(heads, rows), end="\n\n")
        print(f"{self.name}: {(time.perf_counter() - self.begin) / 60:.1f} minutes\n", flush=True)


def described(seen: dict) -> str:
    notes = [seen["directions"]] * (seen["directions"] == "own") + ["warm"] * seen["warm"]
    return " ".join([*(str(seen[size]) for size in "BTDK"), *notes])


def cells(line: list[dict]) -> list[str]:
    """Microseconds, with the difference to the first in a decoding step, else the percentage."""
    if line[0]["T"] > 1:
        return [f"{seen['us']:.2f} {seen['percent']:.0f} %" for seen in line]
    first, *rest = line
    more = [f"{seen['us']:.2f} {seen['low']:+.2f}..{seen['high']:+.2f}" for seen in rest]
    return [f"{first['us']:.2f}", *more]


def quick(part: Part) -> None:
    """What a reader wants to know first: README's table."""
    ways = [fused(kind) for kind in ("off", "idle", "adds", "targets")]
    for B in (1, 8, 64, 256):
        part.line(Shape(B, 1, 4096, 4), ways)
    part.line(Shape(64, 1, 4096, 4, "own"), ways)
    part.line(Shape(64, 1, 4096, 16), ways)
    for K in (1, 4, 16):
        alones = [alone("adds"), alone("targets")]
        part.line(Shape(1, 8192, 4096, K), [fused("off"), fused("adds"), fused("targets"), *alones])
    shape = Shape(64, 1, 4096, 4)
    part.line(shape, [alone("adds"), *baselines.alone(shape, "adds", compiling=True)])
    ours = [fused("targets"), fused("off")]
    part.line(shape, [*ours, *baselines.fused(shape, "targets", compiling=True)])


def decode(part: Part) -> None:
    """What steering adds to the add and norm that are there anyway; then steer by itself."""
    ways = [fused(kind) for kind in ("off", "idle", "adds", "targets")]
    for B in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        part.line(Shape(B, 1, 4096, 4), ways)
    for B in (1, 16, 256):
        part.line(Shape(B, 1, 4096, 4), ways, warm=True)
    for B in (16, 64, 256):
        part.line(Shape(B, 1, 4096, 4, "own"), ways)
    for B in (8, 256):
        for K in (1, 2, 8, 16):
            part.line(Shape(B, 1, 4096, K), ways)
        for D in WIDTHS:
            part.line(Shape(B, 1, D, 4), ways)
    part.line(Shape(64, 1, 4096, 4), [fused(kind) for kind in ("off", "half", "mixed")])
    for B in (1, 16, 256):
        part.line(Shape(B, 1, 4096, 4), [alone("adds"), alone("targets")])


def prefill(part: Part) -> None:
    """How near the kernels come to a copy."""
    ways = [fused("off"), fused("adds"), fused("targets"), alone("adds"), alone("targets")]
    for B, T in ((1, 512), (1, 2048), (1, 8192), (1, 32768), (8, 1024)):
        part.line(Shape(B, T, 4096, 4), [*ways, fused("idle"), alone("idle")])
    part.line(Shape(8, 1024, 4096, 4), [*map(fused, ("half", "mixed")), alone("half")])
    part.line(Shape(8, 1024, 4096, 4, "own"), ways)
    for K in (1, 2, 8, 16):
        part.line(Shape(1, 8192, 4096, K), ways)
    for D in WIDTHS:
        for K in (1, 4, 16):
            part.line(Shape(1, 32768, D, K), ways)


def against_baselines(part: Part) -> None:
    """Edits alone, then the whole of add, edits and norm; compiled anew for each shape."""
    if baselines.Liger is None:
        print("Liger is not installed: its fused add and norm is left out")

    def line(shape: Shape, ours: list[Way], theirs, kind: str) -> None:
        torch._dynamo.reset()
        part.line(shape, [*ours, *theirs(shape, kind, compiling=True)])

    decoding = [(B, 1, K) for B in (1, 64) for K in (1, 4)]
    for B, T, K in [*decoding, (1, 8192, 1), (1, 8192, 4), (1, 8192, 16)]:
        shape = Shape(B, T, 4096, K)
        for kind in ("adds", "targets"):
            line(shape, [alone(kind)], baselines.alone, kind)
        line(shape, [fused("targets"), fused("off"), fused("idle")], baselines.fused, "targets")
    for B, K in ((64, 1), (64, 4), (256, 4)):
        shape = Shape(B, 1, 4096, K, "own")
        line(shape, [alone("adds")], baselines.alone, "adds")
        line(shape, [fused("targets"), fused("off")], baselines.fused, "targets")


def tuning(part: Part) -> None:
    """Other tiles, and a bank in float32, beside what the launchers choose."""
    for B in (1, 64):
        way = fused("targets")
        others = [tiled(way, 1, K, warps) for K in (1, 2, 4) for warps in (4, 8, 16)]
        part.line(Shape(B, 1, 4096, 4), [way, precise(way), *others])
    for way, D in ((fused("targets"), 4096), (fused("targets"), 2048), (alone("targets"), 4096)):
        tiles = ((1, 1), (2, 1), (4, 1), (1, 4))
        others = [tiled(way, T, K, warps) for T, K in tiles for warps in (4, 8, 16)]
        part.line(Shape(1, 8192, D, 4), [way, precise(way), *others])


PARTS = {
    "quick": quick,
    "decode": decode,
    "prefill": prefill,
    "baselines": against_baselines,
    "tuning": tuning,
}


# One's own.


def against(name: str, kinds: Sequence[str]) -> None:
    """A reader's "mine.py:function": refused where it is wrong, else timed beside `steer`."""
    file, _, function = name.rpartition(":")
    function = runpy.run_path(file)[function]
    pairs = {kind: [alone(kind), alone(kind, function, "yours")] for kind in kinds}
    for shape, inputs in small(kinds):
        for _, yours in pairs.values():
            try:
                verify(yours, inputs)
            except AssertionError as error:
                sys.exit(f"{name} is refused at {shape}, {inputs.x.dtype}: {error}")
    print(f"{name} is right: {', '.join(kinds)}, at all shapes of `check`\n", flush=True)
    pairs = {kind: pairs[kind] for kind in kinds if kind in ("adds", "targets")} or pairs
    if not torch.cuda.is_available():
        return on_cpu(pairs)
    part = Part("yours")
    for ways, B in itertools.product(pairs.values(), (1, 8, 64, 256)):
        part.line(Shape(B, 1, 4096, 4), ways)
    return part.show()


def on_cpu(pairs: dict[str, list[Way]]) -> None:
    """The formula of `steer` and a reader's function, call by call in turn."""
    if INTERPRETED:
        return print("Triton interprets kernels here: nothing was timed.")
    rows = []
    for kind, D, B in itertools.product(pairs, (576, 2048), (1, 8, 64)):
        (inputs,) = make(Shape(B, 1, D, 4), {kind}, 1, FP32, device="cpu")
        times = [], []
        for way, seen in [*zip(pairs[kind], times, strict=True)] * 100:
            start = time.perf_counter()
            way.call(inputs)
            seen.append(1e6 * (time.perf_counter() - start))
        ours, yours = map(statistics.median, times)
        rows.append([f"{B} 1 {D} 4 {kind}", f"{ours:.1f}", f"{yours:.1f}", f"{yours / ours:.2f}"])
    print(table(["B T D K: us, float32", "steer's formula", "yours", "ratio"], rows))
    return print("\nMedians of 100 calls in turn. No GPU is here, so no kernel of ours ran.")


def main() -> None:
    names = sys.argv[1:] or ["check", *PARTS]
    yours = names[0] == "--with" and ":" in (*names, "")[1] and set(names[2:]).issubset(STEERED)
    if not yours and (len(sys.argv) > 2 or not {"check", *PARTS}.issuperset(names)):
        sys.exit(__doc__)
    print(where(), end="\n\n", flush=True)
    if yours:
        return against(names[1], names[2:] or STEERED)
    if not torch.cuda.is_available():
        check()
        return print("No GPU is here: all was checked on the CPU, nothing was timed.")
    for name in names:
        if name == "check":
            check()
            continue
        part = Part(name)
        PARTS[name](part)
        part.show()
    return None


if __name__ == "__main__":
    main()
