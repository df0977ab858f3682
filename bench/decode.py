"""A decoding step of whole models on a GPU: milliseconds, percent of the limit, what steering adds.

    python bench/decode.py [check | llama | models | baselines]

or all. From a checkout that is not installed: PYTHONPATH=.:kernels python bench/decode.py

Models have their real shapes and random weights, in bfloat16; steps are tinysteer.stepping's, as
captured CUDA graphs. A row's cache holds `context` columns of random keys and values, and the step
runs at the last of them. The ways of one line are replayed in turn, a few steps at a time, and a
difference is to the line's first way, "off", with its 95 % interval. "idle" has tables in which no
edit ever acts; in "one layer" the middle one has one target; else every layer has K edits a row,
the same for all rows or, "own", along other directions in each.

GB/s are gpt-fast's: bytes of the weights that a step reads, times steps a second. The limit is
those bytes and the cache's over the bandwidth of a copy in the same run. What a way chooses must be
finite and what the same step gives without a graph; edits must change the last state of each row,
and other edits another graph's result without another capture.

`baselines` times whole texts: see rivals.py. Where there is no GPU only `check` runs.
"""

import copy
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from ceilings import copy_bandwidth
from common import gpu, table, where
from stepped import (
    SHAPES,
    cache_bytes,
    draw,
    finish,
    random_edits,
    random_prompts,
    shrunk,
    weight_bytes,
)
from timing import Times, measure, record
from torch import Tensor

from tinysteer.edits import Edit
from tinysteer.model import Decoder
from tinysteer.stepping import BROKEN, Capture, Step, cuda_graph

BATCHES = (1, 8, 64, 256)
SHORT, LONG = 512, 4096  # columns
REPLAYS = 60  # of each way, in each of two passes
STEPS = 8  # of a replay, at most: as many as last REPLAY
REPLAY = 4e-3  # seconds
ALIKE = 0.05  # idle tables may round a sum of squares otherwise: this much, after all layers


class Machine(NamedTuple):
    """Where steps run, and what captures, times and writes down."""

    device: str
    dtype: torch.dtype
    capture: Capture
    measure: Callable[..., dict[str, Times]]
    record: Callable[..., dict]


class Way(NamedTuple):
    """How a line's step is steered."""

    name: str
    K: int = 0
    verb: str = "targets"
    own: bool = False  # directions of its own for each row
    one: bool = False  # layer, the middle one

    def layers(self, decoder: Decoder) -> list[int]:
        n = decoder.config.n_layers
        return [n // 2] if self.one else [*range(n)]

    def edits(self, decoder: Decoder, B: int, verb: str = "") -> list[list[Edit]]:
        layers, n_lists = self.layers(decoder), B if self.own else 1
        verb = verb or self.verb
        return random_edits(decoder, B, n_lists, self.K, layers, verb) if self.K else []


OFF, IDLE, ONE = Way("off"), Way("idle", 1, "idle", one=True), Way("one layer", 1, one=True)


def every(K: int, verb: str, own: bool = False) -> Way:
    return Way(f"K {K}, {verb}{', own' * own}", K, verb, own)


FEW = [OFF, IDLE, ONE, every(4, "targets"), every(4, "targets", own=True)]


def many(B: int) -> list[Way]:
    """All that there is; one row alone has but its own."""
    owns = (False, True) if B > 1 else (True,)
    verbs = ("adds", "targets")
    ways = [every(K, verb, own) for own in owns for K in (1, 4, 8) for verb in verbs]
    return [OFF, IDLE, ONE, *ways]


class Replay:
    """A step with one way's edits, as timing.measure wants a graph: n_calls steps a replay.

    It shares the cache and all else with `step`, and keeps tables and graphs of its own.
    """

    def __init__(self, step: Step, edits: list[list[Edit]]):
        self.step, self.n_calls, self.first = copy.copy(step), 1, step.tokens.clone()
        self.step.steering, self.step.graphs, self.step.edits = {}, {}, None
        begin = time.perf_counter()
        self.step.steer(edits)
        self.reset()
        self.step()
        finish(step.decoder)
        self.seconds = time.perf_counter() - begin  # tables, a run, its capture

    def reset(self) -> None:
        self.step.cache.column.fill_(self.step.length - self.n_calls)
        self.step.tokens.copy_(self.first)

    def replay(self) -> None:
        for _ in range(self.n_calls):
            self.step()

    def state(self) -> Tensor:
        """What the head would read after one step without a graph, (B, D)."""
        self.reset()
        return self.step.decoder(self.step.tokens, self.step.cache, self.step.seam)[:, 0]

    def chosen(self) -> Tensor:
        """What one replayed step chooses, (B,)."""
        self.reset()
        self.step()
        return self.step.chosen.clone()


def placed(decoder: Decoder, B: int, context: int, capture: Capture) -> Step:
    """A step whose B rows are never done, with `context` columns of random keys and values."""
    step = Step(decoder, B, context, capture)
    start = torch.zeros(B, dtype=torch.long)
    step.begin(random_prompts(decoder.config, B, 1), start, [context - 1] * B)
    step.left.fill_(1 << 60)
    for kept in (*step.cache.k, *step.cache.v):
        kept.normal_()
    return step


def steps_a_replay(off: Replay) -> int:
    off.replay()
    finish(off.step.decoder)
    begin = time.perf_counter()
    for _ in range(3):
        off.reset()
        off.replay()
    finish(off.step.decoder)
    return min(STEPS, 1 + int(3 * REPLAY / (time.perf_counter() - begin)))


def verify(ways: dict[str, Replay], acting: set[str]) -> dict[str, tuple[float, float]]:
    """Of each way how far it moves its least moved row, and the share of tokens as without a graph.

    AssertionError for what is not finite, an edit without effect and an idle one with any.
    """
    seen, off = {}, next(iter(ways.values())).state().float()
    for name, way in ways.items():
        state = way.state()
        expected = way.step.decoder.logits(state[:, None])[:, 0].argmax(-1)
        chosen = way.chosen()
        assert state.isfinite().all() and (chosen > BROKEN).all(), f"{name}: not finite"
        moved = (state.float() - off).norm(dim=-1) / off.norm(dim=-1)
        if name in acting:
            assert moved.min() > 1e-3, f"{name} moves a row by {moved.min():.2g}"
        else:
            assert moved.max() < ALIKE, f"{name} moves a row by {moved.max():.2g}"
        seen[name] = float(moved.min()), float((chosen == expected).float().mean())
    return seen


def change(replay: Replay, one: list[list[Edit]], other: list[list[Edit]]) -> None:
    """Other edits and back: other tokens and the same again, from the one graph there is."""
    said = [replay.chosen()]
    for edits in (other, one):
        replay.step.steer(edits)
        said.append(replay.chosen())
    assert len(replay.step.graphs) == 1, "edits asked for another graph"
    assert not torch.equal(said[0], said[1]), "other edits change nothing"
    assert torch.equal(said[0], said[2]), "the same edits do not give the same"


class Part:
    """The lines of one part, each of several ways at one model, batch and context."""

    def __init__(self, name: str, machine: Machine, copy_rate: float):
        self.name, self.machine, self.copy_rate = name, machine, copy_rate
        self.begin, self.lines = time.perf_counter(), []

    def line(self, model: str, decoder: Decoder, B: int, context: int, ways: list[Way]) -> None:
        title = f"{model}, batch {B}, context {context}"
        gc.collect()
        if decoder.embed.weight.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            whole = 2 * context * B * decoder.config.n_layers * decoder.embed.weight.itemsize
            whole *= decoder.config.n_kv_heads * decoder.config.head_dim
            if whole > torch.cuda.mem_get_info()[0] - 6e9:
                return print(f"{title}: left out, its cache takes {whole / 1e9:.0f} GB", flush=True)
        try:
            self.lines.append(self.timed(model, decoder, B, context, ways))
        except Exception as error:  # one line's failure should not cost the others' numbers
            if self.machine.device == "cpu":
                raise
            print(f"{title}: left out, {error!r:.500}", flush=True)
        print(f"{time.perf_counter() - self.begin:4.0f} s  {title}", file=sys.stderr, flush=True)
        return None

    def timed(self, model: str, decoder: Decoder, B: int, context: int, ways: list[Way]) -> list:
        begin = time.perf_counter()
        step = placed(decoder, B, context, self.machine.capture)
        replays = {OFF.name: Replay(step, [])}
        ready = time.perf_counter() - begin
        for way in ways[1:]:
            edits = way.edits(decoder, B)
            replays[way.name] = Replay(step, edits)
            if B == 8 and way == every(4, "targets", own=True):
                change(replays[way.name], edits, way.edits(decoder, B, "adds"))
        acting = {way.name for way in ways if way not in (OFF, IDLE)}
        seen = verify(replays, acting)
        n_calls = steps_a_replay(replays[OFF.name])
        for replay in replays.values():
            replay.n_calls = n_calls
        times, clock = self.machine.measure(replays, REPLAYS), gpu("clocks.sm")
        again = verify(replays, acting)
        weights = weight_bytes(decoder)
        total = weights + cache_bytes(decoder, B, context - (n_calls - 1) / 2)
        off, line = times[OFF.name].us, []
        for way in ways:
            t, (moved, same) = times[way.name], seen[way.name]
            result = {"part": self.name, "model": model, "B": B, "context": context}
            result |= {"way": way.name, "K": way.K, "verb": way.verb, "own": way.own}
            result |= {"layers": len(way.layers(decoder)) * bool(way.K)} | t._asdict()
            result |= {"percent_more": 100 * t.more / off, "percent_low": 100 * t.low / off}
            result |= {"percent_high": 100 * t.high / off, "tokens_s": 1e6 * B / t.us}
            result |= {"gbs": 1e-3 * weights / t.us, "gbs_cache": 1e-3 * total / t.us}
            result |= {"limit_us": 1e6 * total / self.copy_rate, "copy_gbs": self.copy_rate / 1e9}
            result |= {"percent": 1e8 * total / self.copy_rate / t.us, "steps": n_calls}
            result |= {"ready_s": ready, "capture_s": replays[way.name].seconds}
            result |= {"memory_gb": peak(decoder), "sm_mhz": clock, "moved": moved}
            line.append(self.machine.record("decode", **result, same=min(same, again[way.name][1])))
        return line

    def tables(self) -> str:
        """A row a model, batch and context; then, by way, what steering adds to each."""
        heads = ["", "B", "context", "ms/step", "tokens/s", "GB/s", "with cache", "% of limit"]
        heads += ["ready s", "peak GB", "as without a graph"]
        rows, steered = [], {}
        for line in self.lines:
            off = line[0]
            rows.append([off["model"], off["B"], off["context"], f"{off['us'] / 1e3:.3f}"])
            rows[-1] += [f"{off[key]:.0f}" for key in ("tokens_s", "gbs", "gbs_cache", "percent")]
            rows[-1] += [f"{off['ready_s']:.1f}", f"{off['memory_gb']:.1f}"]
            rows[-1].append(f"{100 * min(seen['same'] for seen in line):.0f} %")
            for seen in line[1:]:
                at = f"{off['model']}, {off['B']} x {off['context']}"
                steered.setdefault(at, {})[seen["way"]] = added(seen)
        ways = list(dict.fromkeys(way for cells in steered.values() for way in cells))
        cells = [[way, *(at.get(way, "") for at in steered.values())] for way in ways]
        heads_more = ["% more, us a steered layer", *steered]
        if len(steered) > len(ways):
            heads_more, *cells = (list(row) for row in zip(heads_more, *cells, strict=True))
        return table(heads, rows) + "\n\n" + table(heads_more, cells)


def added(seen: dict) -> str:
    percent = f"{seen['percent_more']:+.2f} ({seen['percent_low']:+.2f}..{seen['percent_high']:+.2f})"
    return f"{percent}, {seen['more'] / seen['layers']:+.2f}"


def peak(decoder: Decoder) -> float:
    """GB that PyTorch took for a line at most, the model included."""
    return torch.cuda.max_memory_reserved() / 1e9 if decoder.embed.weight.is_cuda else 0.0


def llama(part: Part) -> None:
    decoder = drawn("Llama-3.1-8B")
    for B in BATCHES:
        part.line("Llama-3.1-8B", decoder, B, SHORT, many(B))
    for B in BATCHES:
        part.line("Llama-3.1-8B", decoder, B, LONG, FEW)


def models(part: Part) -> None:
    for model in ("Mistral-7B-v0.3", "Phi-3-mini-4k", "Gemma-2-2B", "Gemma-2-9B", "SmolLM2-135M"):
        decoder = drawn(model)
        for B in BATCHES:
            part.line(model, decoder, B, SHORT, FEW)
        for B in (1, 64):
            part.line(model, decoder, B, LONG, FEW)
        del decoder


def drawn(model: str) -> Decoder:
    gc.collect()
    return draw(SHAPES[model], "cuda", torch.bfloat16)


def baselines(part: Part) -> None:
    import rivals

    decoder = drawn("Llama-3.1-8B")
    part.lines = [rivals.compare("Llama-3.1-8B", decoder, B, part.machine.record) for B in (1, 64)]
    part.tables = lambda: rivals.rows(part.lines)


PARTS = {"llama": llama, "models": models, "baselines": baselines}
MINUTES = {"llama": 7, "models": 7, "baselines": 6}  # guessed before any run


def check() -> None:
    """All ways of all models and baselines, at tiny shapes in float32; on a CPU graphs are tapes."""
    import rivals

    device, capture, timer = "cuda", cuda_graph, measure
    if not torch.cuda.is_available():
        sys.path.append(str(Path(__file__).parents[1] / "tests"))
        from dispatch import Tape

        device, capture, timer = "cpu", Tape, untimed
    machine = Machine(device, torch.float32, capture, timer, lambda file, **result: result)
    part = Part("check", machine, 1e12)
    for model, shape in SHAPES.items():
        decoder = draw(shrunk(shape), device, torch.float32)
        for B in (1, 8):
            part.line(model, decoder, B, 64, many(B) if model == "Llama-3.1-8B" else FEW)
    assert len(part.lines) == 2 * len(SHAPES), "a line is missing"
    assert all(seen["same"] == 1 for line in part.lines for seen in line), part.tables()
    decoder = draw(shrunk(SHAPES["Llama-3.1-8B"]), device, torch.float32)
    lines = [rivals.compare("tiny", decoder, B, machine.record, capture, tiny=True) for B in (1, 3)]
    assert all(seen["same"] == 1 for line in lines for seen in line), rivals.rows(lines)
    n_ways = sum(len(line) for line in part.lines)
    print(f"{n_ways} replayed steps and {sum(map(len, lines))} whole texts are as they should be\n")


def untimed(graphs: dict[str, Replay], n: int) -> dict[str, Times]:
    for graph in graphs.values():
        graph.reset()
        graph.replay()
    return dict.fromkeys(graphs, Times(1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0))


@torch.inference_mode()
def main() -> None:
    names = sys.argv[1:] or ["check", *PARTS]
    if len(sys.argv) > 2 or not {"check", *PARTS}.issuperset(names):
        sys.exit(__doc__)
    print(where(), end="\n\n", flush=True)
    if not torch.cuda.is_available():
        check()
        return print("No GPU is here: all was checked on the CPU, nothing was timed.")
    for name in names:
        if name == "check":
            check()
            continue
        machine = Machine("cuda", torch.bfloat16, cuda_graph, measure, record)
        part = Part(name, machine, copy_bandwidth())
        about = f"about {MINUTES[name]} minutes; a copy moves {part.copy_rate / 1e9:.0f} GB/s"
        print(f"{name}: {about}", flush=True)
        PARTS[name](part)
        print(part.tables(), end="\n\n")
        print(f"{name}: {(time.perf_counter() - part.begin) / 60:.1f} minutes\n", flush=True)
    return None


if __name__ == "__main__":
    main()
