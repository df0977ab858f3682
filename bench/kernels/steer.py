"""The two kernels beside what one writes without them: right against float64, then microseconds.

    python -m bench.kernels.steer --quick              README's table, and what a compiler gives
    python -m bench.kernels.steer --part NAME          one of the parts below; without, all
    python -m bench.kernels.steer --shape 64,1,4096,4 --kind targets --dtype bfloat16
    python -m bench.kernels.steer --with mine.py:function [--kind adds]

--with puts function(x, bank, tables, position) of your own beside `steer`. x (B, T, D), float32 or
bfloat16, is moved in place or copied, and returned; bank (N, D) is of x's type or float32; tables
are `MoveTables` of B rows and K moves; position (B, T) int32 is 0 at the last prompt token. What
errs at the shapes of the check is refused, with exit code 1; the rest is timed. --kind says what it
can do, where that is not all: idle, adds, targets, mixed, or one of these with ", half idle".

"off" is add_steer_norm without edits, "idle" with tables in which no row has one; in "half idle"
every second row has, and "mixed" moves are of all kinds, with windows.

Every way is checked against float64 before it is timed and after, its results poisoned between;
what moves x in place many times a replay is called anew for the second check.
The ways of one line are replayed in turn. A difference is to the line's first way, a 95 % interval;
% is of a copy's bandwidth in the same run, for the bytes that any way must move. On a CPU `steer`
is PyTorch's formula. See bench/README.md for how to read the rest.
"""

import itertools
import os
import re
import runpy
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path

import torch

from bench.kernels import static
from bench.kernels.cases import KINDS, LIMITS, Case, Inputs, Way, make, verify, verify_replay
from bench.kernels.plot import plot
from bench.kernels.ways import (
    INTERPRETED,
    compiled,
    fused_rivals,
    interpreted,
    ours,
    ours_fused,
    rivals,
)
from bench.machine import ON_GPU, Lines, Part, gpu, parser, run_parts, table, where
from bench.timing import (
    REPLAYS,
    Times,
    cache_size,
    copy_bandwidth,
    measure,
    n_cold_sets,
    predicted,
    sized,
)

STEPS = list(map(ours_fused, ("off", "idle", "adds", "targets")))
FILLS = [*map(ours_fused, ("off", "adds", "targets")), ours("adds"), ours("targets")]
MANY, FEWER = (REPLAYS, 10) if ON_GPU else (15, 5)  # replays a pass: fewer where lines are many
LONG = 8192 if ON_GPU else 512  # positions
WIDTHS = (4096, 8192, 576, 2048) if ON_GPU else (576, 2048)
DTYPE = Case._field_defaults["dtype"]

# Right first.


def small(kinds: Sequence[str]) -> Iterator[tuple[Case, Inputs]]:
    """Inputs that differ in all that matters, of several pairs of types, all given or left out."""
    D, counts = (2304, (1, 4, 16)) if ON_GPU else (136, (1, 2, 8))
    types = (torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)
    for (B, T), K in itertools.product(((1, 1), (3, 1), (2, 5)), counts):
        for directions in ("shared", "own"):
            for dtype, bank_dtype in types:
                case = Case(B, T, D, K, directions, f"{dtype}".removeprefix("torch."))
                yield case, *make(case, set(kinds), 1, bank_dtype)
    for position, slot in ((False, False), (True, True), (False, True)):
        case = Case(3, 1 + 4 * position, D, 4, "own", "float32", position, slot)
        yield case, *make(case, set(kinds), 1)
    yield (case := Case(2, 5, D, 4, "own", "float16")), *make(case, set(kinds), 1)


def check() -> None:
    """All ways but torch.compile's, in small cases, against float64."""
    worst: dict[str, dict] = {}
    for case, inputs in small(KINDS):
        mine = [*map(ours_fused, ("off", *KINDS)), *map(ours, KINDS)]
        ways = [(way, "") for way in mine]
        if INTERPRETED and case.dtype == "float32":
            ways += [(way, "interpreted: ") for way in mine]
        if inputs.x.dtype == inputs.bank.dtype:
            for kind, of in itertools.product(("adds", "targets"), (rivals, fused_rivals)):
                ways += [(way, f"{way.kind}: ") for way in of(case, kind, compiling=False)]
        for way, prefix in ways:
            errors = worst.setdefault(f"{prefix}{way.name}{', add and norm' * way.fused}", {})
            with interpreted() if prefix.startswith("inter") else nullcontext():
                errors[case.dtype] = max(errors.get(case.dtype, 0.0), verify(way, inputs))
    types = {f"{dtype}".removeprefix("torch."): limit for dtype, limit in LIMITS.items()}
    rows = [
        [name, *(f"{errors[t]:.1e}" if t in errors else "" for t in types)]
        for name, errors in sorted(worst.items(), key=lambda item: "add and norm" in item[0])
    ]
    heads = [f"{t} (at most {limit:.0e})" for t, limit in types.items()]
    print(table(["worst relative error of a position", *heads], rows), end="\n\n", flush=True)


# Then fast.


class Bench(Lines):
    """Lines of several ways in one case: checked, timed, written down, and then shown."""

    def __init__(self, file: str | None, dtype: str = DTYPE):
        super().__init__(file)
        self.dtype, self.unshown = dtype, []
        self.copy, self.begin = copy_bandwidth(), time.perf_counter()
        print(f"{self.dtype} unless said; a copy moves {self.copy / 1e9:.1f} GB/s\n", flush=True)

    def line(self, case: Case, ways: Sequence[Way], warm: bool = False, n: int = MANY) -> None:
        """n: replays a pass. A way that fails is left out, but for the first."""
        case = case._replace(dtype=self.dtype) if case.dtype == DTYPE else case
        if ON_GPU:
            torch.cuda.empty_cache()
        touched, first = min(way.touched(case) for way in ways), ways[0]
        n_sets = 1 if warm else n_cold_sets(touched)
        sets, warm = make(case, {w.kind for w in ways}, n_sets), n_sets * touched < cache_size()
        errors, timed, line = {}, {}, []
        for way in ways:
            with self.leaving_out(way, case, first):
                errors[way.name] = verify(way, sets[0])
                timed[way.name] = sized(way.call, [(i, *way.prepare(i)) for i in sets])
        times, clock = measure(timed, n), gpu("clocks.sm")
        for way in [way for way in ways if way.name in timed]:
            with self.leaving_out(way, case, first):
                error = max(errors[way.name], verify_replay(way, timed[way.name], sets))
                result = self.result(case, way, times[way.name], first)
                result |= {"warm": warm, "replays": n, "error": error, "sm_mhz": clock}
                result |= {"n_sets": len(timed[way.name].outputs), "calls": timed[way.name].n_calls}
                line.append(self.write(**result, host_us=host(way, sets[0])))
        self.unshown.append((f"{case}{' warm' * (ON_GPU and line[0]['warm'])}", line))
        seconds = time.perf_counter() - self.begin
        print(f"{seconds:4.0f} s  {case}: {cells(line)}", file=sys.stderr, flush=True)

    def result(self, case: Case, way: Way, t: Times, first: Way) -> dict:
        moved, told = way.traffic(case), f"{case} {way.name}"
        result = case._asdict() | {"way": way.name, "kind": way.kind, "fused": way.fused}
        result |= t._asdict() | {"first": first.kind == "off", "bytes": moved}
        result |= {"gbs": 1e-3 * moved / t.us, "percent": 1e8 * moved / t.us / self.copy}
        told = predicted("kernels, us", told, self.copy, scaled=case.T > 1)
        return result | {"copy_gbs": self.copy / 1e9, "predicted": told}

    @contextmanager
    def leaving_out(self, way: Way, case: Case, first: Way) -> Iterator[None]:
        """One rival's failure should not cost the others' numbers."""
        try:
            yield
        except Exception as error:
            if way is first:
                raise
            print(f"{way.name} at {case} is left out: {error!r:.500}", flush=True)

    def show(self) -> None:
        """A table for each choice of ways: a row a case, or a row a way if those are more."""
        tables: dict[tuple, list] = {}
        for title, line in self.unshown:
            tables.setdefault(tuple(one["way"] for one in line), []).append((title, line))
        for names, lines in tables.items():
            heads = ["B T D K: us", *names, *["host, us"] * ON_GPU]
            rows = [[title, *cells(line)] for title, line in lines]
            if len(names) > len(lines):
                heads, *rows = zip(heads, *rows, strict=True)
            print(table(heads, rows), end="\n\n", flush=True)
        self.unshown.clear()


def cells(line: list[dict]) -> list[str]:
    """Microseconds, with the difference to the first in a decoding step, else the percentage.

    Bold is the fastest of several that do the same. In brackets: predicted. On a GPU the last is
    the host's time for the first.
    """
    texts = []
    for n, one in enumerate(line):
        same = itemgetter("kind", "fused")
        alike = [other["us"] for other in line if same(other) == same(one)]
        best = len(alike) > 1 and one["us"] == min(alike)
        text = f"{one['us']:,.0f}" if one["us"] >= 100 else f"{one['us']:.3g}"
        text = f"**{text}**" if best else text
        if one["T"] > 1:
            text += f" {one['percent']:.0f} %"
        elif n:
            digits = 0 if one["us"] >= 100 else 2
            text += f" {one['low']:+,.{digits}f}..{one['high']:+,.{digits}f}"
        if one["predicted"]:
            text += " ({:+.3g}..{:+.3g})".format(*one["predicted"])
        texts.append(text)
    return [*texts, f"{line[0]['host_us']:.1f}"] if ON_GPU else texts


def host(way: Way, inputs: Inputs, n: int = 20) -> float | None:
    """Microseconds of the host for an eager call that it does not wait for; on a CPU None."""
    if not ON_GPU:
        return None
    ready, times = way.prepare(inputs), []
    for _ in range(10):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(n):
            way.call(inputs, *ready)
        times.append(1e6 * (time.perf_counter() - begin) / n)
    return statistics.median(times)


def quick(bench: Bench) -> None:
    """What a reader wants to know first."""
    for B in (1, 8, 64, 256):
        bench.line(Case(B, 1, 4096, 4), STEPS)
    bench.line(Case(64, 1, 4096, 4, "own"), STEPS)
    for K in (1, 16):
        bench.line(Case(64, 1, 4096, K), STEPS)
    for K in (1, 4, 16):
        bench.line(Case(1, LONG, 4096, K), FILLS)
    bench.show()
    for case in [Case(64, 1, 4096, 4), Case(64, 1, 4096, 4, "own")]:
        against(bench, case, ("adds",))
    against(bench, Case(64, 1, 4096, 4), ("targets",))
    if not ON_GPU:
        by_compiler(bench)


def by_compiler(bench: Bench) -> None:
    print(static.floors(), static.machine_code(), sep="\n\n", end="\n\n", flush=True)


def against(bench: Bench, case: Case, kinds: Iterable[str]) -> None:
    """Ours and all rivals, alone and with add and norm; compiled anew for each case."""
    for kind in kinds:
        torch._dynamo.reset()
        compiled.cache_clear()
        bench.line(case, [ours(kind), *rivals(case, kind, compiling=True)])
        both = [ours_fused("off"), ours_fused(kind)]
        bench.line(case, [*both, *fused_rivals(case, kind, compiling=True)])
    bench.show()


def decode(bench: Bench, directions: str = "shared") -> None:
    """One position a row: every batch, number of moves, width, kind and share of idle rows."""
    ways = [*map(ours_fused, ("off", *KINDS)), *map(ours, ("adds", "targets", "mixed"))]
    whole = [way for way in ways if "half" not in way.kind]
    for D, B, K in itertools.product(WIDTHS, (1, 8, 64, 256), (1, 4, 16)):
        bench.line(Case(B, 1, D, K, directions), ways if B > 1 else whole, n=FEWER)
    bench.show()


def prefill(bench: Bench) -> None:
    """Several positions: every length, and the shortest by 8 rows too."""
    for D, T, K in itertools.product(WIDTHS, sorted({LONG, 512, 4}), (1, 4, 16)):
        for B in (1, 8) if T < 8192 else (1,):
            bench.line(Case(B, T, D, K), [*FILLS, ours_fused("idle"), ours_fused("mixed")], n=FEWER)
    bench.line(Case(8, 512, WIDTHS[0], 4, "own"), FILLS)
    bench.show()


def baselines(bench: Bench) -> None:
    """Beside those of `quick`, adds and targets; mixed moves by --shape."""
    one, own = Case(64, 1, 4096, 4), Case(64, 1, 4096, 4, "own")
    cases = one._replace(B=1), one._replace(K=1), one._replace(D=576), own, own._replace(B=256)
    for case in (*cases, Case(1, LONG, 4096, 4)):
        against(bench, case, ("adds", "targets"))


def types(bench: Bench) -> None:
    """Types of numbers, and the arguments that may be left out; then what is warm."""
    case = Case(64, 1, 4096, 4)
    for dtype in ("bfloat16", "float16", "float32"):
        bench.line(case._replace(dtype=dtype), STEPS)
    for B, T in ((64, 1), (1, LONG)):
        for position, slot in ((False, False), (True, True), (False, True)):
            bench.line(case._replace(B=B, T=T, position=position, slot=slot), STEPS)
    for B in (1, 64, 256):
        bench.line(case._replace(B=B), STEPS, warm=True)
    bench.show()


PARTS = {  # minutes on one H100: quick was measured, the others are made of its lines' times
    "quick": Part("what do four moves cost, and what would one write without us?", 3, quick),
    "decode": Part("what do moves add to one position's add and norm, in every size?", 5, decode),
    "own": Part("and along directions of each row's own?", 5, partial(decode, directions="own")),
    "prefill": Part("how near do the kernels come to a copy?", 4, prefill),
    "baselines": Part("and eager, compiled, embedding_bag, baddbmm, other kernels?", 5, baselines),
    "types": Part("do float16, float32, slots, missing positions or a cache matter?", 2, types),
    "compiler": Part("what must move, and what does Triton make of the kernels?", 1, by_compiler),
}

# One's own.


def against_yours(options, cases: Iterable[Case]) -> None:
    """A reader's "mine.py:function": refused where it is wrong, else timed beside `steer`."""
    name, kinds = options.yours, options.kind or KINDS
    file, _, function = name.rpartition(":")
    if not Path(file).is_file():
        sys.exit(f"--with {name}: there is no file {file!r}; write FILE.py:FUNCTION")
    function = runpy.run_path(file).get(function) or sys.exit(f"--with {name}: {file} has none")
    pairs = {kind: [ours(kind), ours(kind, function, "yours")] for kind in kinds}
    for case, inputs in small(kinds):
        for _, yours in pairs.values() if case.position and not case.slot else ():
            try:
                verify(yours, inputs)
            except Exception as error:
                sys.exit(f"{name} is refused at {case!r}, {inputs.x.dtype}: {error or error!r}")
    print(f"{name} is right: {', '.join(kinds)}, in all cases of the check\n", flush=True)
    if INTERPRETED:
        return print("Triton interprets kernels here, whose time says nothing.")
    pairs = {kind: pairs[kind] for kind in kinds if kind in ("adds", "targets")} or pairs
    bench = Bench(options.json, options.dtype)
    for ways, case in itertools.product(pairs.values(), cases):
        bench.line(case, ways)
    return bench.show()


def case_of(options) -> Case:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){3}", options.shape):
        sys.exit(f"--shape {options.shape}: give four whole numbers B,T,D,K, such as 64,1,4096,4")
    sizes, own = map(int, options.shape.split(",")), "own" if options.own else "shared"
    return Case(*sizes, own, options.dtype, not options.no_position, options.slot)


@torch.inference_mode()
def main() -> None:
    one = parser(__doc__, PARTS)
    one.add_argument("--shape", metavar="B,T,D,K", help="one case, all ways")
    one.add_argument("--kind", action="append", choices=KINDS, help="of its moves (all verbs)")
    one.add_argument("--dtype", choices=[f"{d}"[6:] for d in LIMITS], default=DTYPE)
    one.add_argument("--own", action="store_true", help="directions of its own for each row")
    one.add_argument("--slot", action="store_true", help="rows of the tables named by slots")
    one.add_argument("--no-position", action="store_true", help="all tokens stand at 0")
    one.add_argument("--with", dest="yours", metavar="FILE.py:FUNCTION", help="your own kernel")
    one.add_argument("--plot", metavar="PNG", help="a picture of what was timed")
    options = one.parse_args()
    if options.plot and not find_spec("matplotlib"):
        one.error('--plot needs matplotlib: pip install "tinysteer[plot]"')
    if options.part and (options.shape or options.yours):
        one.error("a part has its own cases: leave out --shape and --with, or --quick and --part")
    if options.plot and (options.yours or options.part == "compiler"):
        one.error("--plot draws what parts and --shape time of add_steer_norm")
    if (options.own or options.slot or options.no_position) and not options.shape:
        one.error("--own, --slot and --no-position go with --shape")
    if options.kind and not (options.shape or options.yours):
        one.error("--kind goes with --shape or --with")
    if not ON_GPU and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    print(where(), end="\n\n", flush=True)
    if options.yours:
        usual = [Case(B, 1, D, 4) for D in WIDTHS for B in (1, 8, 64)]
        return against_yours(options, [case_of(options)] if options.shape else usual)
    check()
    bench = Bench(options.json, options.dtype)
    if options.shape:
        bench.part, case = "shape", case_of(options)
        for kind in options.kind or ("adds", "targets", "mixed"):
            against(bench, case, (kind,))
    else:
        run_parts(PARTS, options.part, bench)
    return plot(bench.kept, options.plot) if options.plot else None


if __name__ == "__main__":
    main()
