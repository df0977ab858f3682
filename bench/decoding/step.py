"""A decoding step of whole models: milliseconds, percent of the limit, and what steering adds.

    python -m bench.decoding.step [--quick | --part NAME] [--json FILE]

Models have their real shapes and random weights, steps are tinysteer.decoding's: on a GPU in
bfloat16 as captured CUDA graphs; on a CPU as they are, in float32, of SmolLM2-135M alone. A row's
cache holds `context` columns of random keys and values, and the step runs at the last of them. The
ways of one table are replayed in turn, and a difference is to "off", with its 95 % interval. "idle"
has edits everywhere that never act; "one layer", the middle one, has one that adds; else every
layer has K edits a row, the same for all rows or, "own", along other directions in each. All are
checked before and after: see `verify`. A step is ready when it is captured, weights in place. GB/s
are gpt-fast's: bytes of the weights that a step reads, times steps a second. The limit is those
bytes and the cache's over the bandwidth of a copy in the same run.
"""

import copy
import gc
import itertools
import time
from functools import partial

import torch

from bench.decoding import shapes
from bench.decoding.configs import configs
from bench.decoding.rivals import ways_of
from bench.decoding.shapes import IDLE, LLAMA, OFF, ONE, OWN, SMOLLM2, TYPE, Way
from bench.decoding.texts import compare
from bench.machine import ON_GPU, Lines, Part, parser, run_parts, table, where
from bench.timing import copy_bandwidth, measure, predicted, replays
from tests.helpers.dispatch import Tape
from tinysteer.decoding.pool import CudaGraphs
from tinysteer.decoding.step import BROKEN, Batch, Capture, Decoding, Means
from tinysteer.model.decoder import Decoder
from tinysteer.steering.batch import Rows, SteeringBuffers

MODELS = ("Mistral-7B-v0.3", "Phi-3-mini-4k", "Gemma-2-2B", "Gemma-2-9B", SMOLLM2)
SAME = 0.9 if ON_GPU else 1.0  # of the tokens as without a graph
CAPTURE = CudaGraphs() if ON_GPU else None
REPLAYS = 60 if ON_GPU else 15  # of each way, in each of two passes
LASTING, STEPS = 4e3, 8  # a replay: microseconds; steps, at most
SHARED = [Way(f"K {K}, {verb}", K, verb) for K in (1, 4, 8) for verb in ("adds", "targets")]
EACH = [way._replace(name=f"{way.name}, own", lists=OWN) for way in SHARED]
FEW, MANY = [OFF, IDLE, ONE, SHARED[3], EACH[3]], [OFF, IDLE, ONE, *SHARED, *EACH]
ALIKE, MOVED = 0.1, 1e-3  # a row moves by less for idle edits, which may round otherwise; by more


def placed(decoder: Decoder, B: int, context: int, capture: Capture | None) -> Decoding:
    """A step whose B rows are never done, with `context` columns of random keys and values."""
    step = Decoding(decoder, B, context, Means(capture))
    start, prompts = torch.zeros(B, dtype=torch.long), shapes.random_prompts(decoder, B, 1)
    step.begin(Batch(prompts, start, [context - 1] * B))
    step.left.fill_(1 << 60)
    for kept in (*step.cache.k, *step.cache.v):
        kept.normal_()
    return step


class Replay:
    """A placed step with one way's edits, as `bench.timing` wants it: n_calls steps a replay.

    It shares the cache and all else with `step`, and keeps tables and graphs of its own. A replay
    ends at the cache's last column. Without a capture the step runs as it is.
    """

    def __init__(self, step: Decoding, edits: Rows):
        self.step, self.n_calls, self.first = copy.copy(step), 1, step.batch.tokens.to(step.device)
        like, n_layers = step.decoder.embed.weight, step.decoder.config.n_layers
        self.captured = step.means.capture is not None
        self.step.steering = SteeringBuffers(like, n_layers, step.rows, fixed=self.captured)
        self.step.graphs = {}
        self.step.steer(edits)
        self.reset()
        self.replay()

    def reset(self) -> None:
        column, cache = self.step.length - self.n_calls, self.step.cache
        cache.column.fill_(column)
        cache.filled = 0 if self.captured else column  # a captured step sees all columns anyway
        self.step.tokens.copy_(self.first)

    def replay(self) -> None:
        for _ in range(self.n_calls):
            self.step()


def verify(taken: dict[Way, Replay]) -> None:
    """Each is finite and chooses as without a graph; edits move each row, idle ones none."""
    off = None
    for way, replay in taken.items():
        step = replay.step
        replay.reset()
        step()
        chosen = step.chosen.clone()
        replay.reset()
        h = step.decoder(step.tokens, step.cache, step.steering.seam)
        same = (chosen == step.decoder.logits(h)[:, 0].argmax(-1)).float().mean()
        assert h.isfinite().all() & (chosen > BROKEN).all(), f"{way.name} is not finite"
        assert same >= SAME, f"{way.name} chooses {same:.0%} of the tokens as without a graph"
        off = h if off is None else off
        moved = (h - off).float().norm(dim=-1) / off.float().norm(dim=-1)
        right = moved.max() < ALIKE if way in (OFF, IDLE) else moved.min() > MOVED
        assert right, f"{way.name} moves its rows by {moved.min():.2g} to {moved.max():.2g}"


def time_ways(lines: Lines, case: dict, ways: list[Way], rate: float) -> str:
    """Time the ways to take a step -> a table. rate: of a copy, GB/s; 0 where it is not known."""
    model, B, context = case["model"], case["B"], case["context"]
    decoder = shapes.random_decoder(model)
    begin = time.perf_counter()
    step = placed(decoder, B, context, CAPTURE)
    taken = {OFF: Replay(step, [])}
    replays(taken, 1)  # which waits for it
    ready = time.perf_counter() - begin
    taken |= {way: Replay(step, way.edits(decoder, B)) for way in ways[1:]}
    verify(taken)
    us = min(replays(taken, 3)[OFF])
    for replay in taken.values():
        replay.n_calls = min(STEPS, 1 + int(LASTING / us))
    times, (weights, cache) = measure(taken, REPLAYS), shapes.bytes_read(decoder, B, context)
    verify(taken)
    limit, rows = 1e-3 * (weights + cache) / (rate or torch.inf), []  # limit: microseconds
    told = predicted("steps, ms", f"{model} {B} {context}", 1e9 * rate, scaled=bool(rate))
    case |= {"limit_us": limit, "copy_gbs": rate, "predicted_ms": told, "ready_s": ready}
    for way, t in times.items():
        lines.write(**case, way=way.name, K=way.K, lists=way.lists, **t._asdict())
        percent = [100 * us / times[OFF].us for us in (t.more, t.low, t.high)]
        added = "{:+.2f} ({:+.2f}..{:+.2f})".format(*percent) if way.K else ""
        layer = f"{t.more / len(way.layers(decoder)):+.2f}" if way.K else ""
        row = [way.name, f"{t.us / 1e3:.3f}", added, layer, f"{1e6 * B / t.us:.0f}"]
        row += [f"{1e-3 * weights / t.us:.0f}", f"{limit / t.us:.0%}" if rate else ""]
        rows.append([*row, "..".join(f"{ms:.2f}" for ms in told) if way == OFF else ""])
    heads = ["", "ms a step", "% more", "us a layer", "tokens/s", "GB/s", "of the limit"]
    rows = table([*heads, "predicted, ms, by this card's copy"], rows)
    return f"{model}, batch {B}, context {context}: ready in {ready:.1f} s\n\n{rows}\n"


def steps(part: str, models, plan: list[tuple], lines: Lines) -> None:
    """The tables of a plan, (batch, context, ways), for each model; one that fails is left out."""
    rate = copy_bandwidth() / 1e9 if ON_GPU else 0.0
    for model, (B, context, ways) in itertools.product(models, plan):
        case = {"part": part, "model": model, "B": B, "context": context, "dtype": TYPE}
        gc.collect()
        torch.cuda.empty_cache()
        try:
            print(time_ways(lines, case, ways, rate), flush=True)
        except Exception as error:  # which should not cost the others' numbers
            if not ON_GPU:
                raise
            print(f"{model}, batch {B}, context {context}: left out, {error!r:.500}\n", flush=True)


def texts(lines: Lines) -> None:
    for B in (1, 64):
        result = compare(lines, ways_of(LLAMA, B), 5, part="texts", model=LLAMA, B=B)
        print(f"{LLAMA}, batch {B}\n\n{result}\n", flush=True)


def check(lines: Lines) -> None:
    """All models, ways and rivals; graphs are tapes on a CPU."""
    for model, B in itertools.product((LLAMA, *MODELS), (1, 8)):
        step = placed(shapes.random_decoder(model, tiny=True), B, 64, CAPTURE or Tape)
        verify({way: Replay(step, way.edits(step.decoder, B)) for way in MANY})
    configs(Lines(), tiny=True)
    compare(Lines(), ways := ways_of(LLAMA, 3, tiny=True), 2)
    print(f"{1 + len(MODELS)} models, {len(MANY)} steps, {len(ways)} whole texts: all are right\n")


ASKED = "what does a step of a whole model cost, and steering in it?"
PARTS = {"check": Part("is every way right, at tiny shapes?", 0.5, check)}
if ON_GPU:
    few, long = ([(B, context, FEW) for B in (1, 8, 64, 256)] for context in (512, 4096))
    many = [(1, 512, MANY[:-6]), *((B, 512, MANY) for B in (8, 64, 256)), *long]
    PARTS |= {
        "quick": Part(ASKED, 0.5, partial(steps, "quick", [LLAMA], few[::2])),
        "llama": Part("in more ways and sizes?", 6, partial(steps, "llama", [LLAMA], many)),
        "models": Part("of other models?", 6, partial(steps, "models", MODELS, few + long[::2])),
        "texts": Part("and whole texts, by the ways of rivals.py?", 6, texts),
    }
else:
    few = [(1, 128, FEW), (8, 128, FEW)]
    PARTS["quick"] = Part(ASKED, 1, partial(steps, "quick", [SMOLLM2], few))
PARTS["configs"] = Part("what do many configurations in one batch cost?", 3, configs)


@torch.inference_mode()
def main() -> None:
    chosen = parser(__doc__, PARTS).parse_args()
    print(where(), end="\n\n", flush=True)
    run_parts(PARTS, chosen.part, Lines(chosen.json))


if __name__ == "__main__":
    main()
