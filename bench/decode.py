"""A decoding step of whole models on a GPU: milliseconds, percent of the limit, what steering adds.

    python bench/decode.py [check | quick | llama | models | baselines]

or all. From a checkout that is not installed: PYTHONPATH=.:kernels python bench/decode.py

Models have their real shapes and random weights, in bfloat16; steps are tinysteer.decoding's, as
captured CUDA graphs. A row's cache holds `context` columns of random keys and values, and the step
runs at the last of them. The ways of one line are replayed in turn, a few steps at a time, and a
difference is to "off", with its 95 % interval. "idle" has edits everywhere that never act; "one
layer", the middle one, has one that adds; else every layer has K edits a row, the same for all rows
or, "own", along other directions in each.

GB/s are gpt-fast's: bytes of the weights that a step reads, times steps a second. The limit is
those bytes and the cache's over the bandwidth of a copy in the same run. "ready" are seconds from
weights on the GPU to the first captured step, "peak" is the memory then. What a way chooses must be
finite and is held against the same step without a graph; edits must change the last state of each
row, and at batch 8 a graph must take other edits as they come, without another capture.

`baselines` times whole texts: see rivals.py. Where there is no GPU only `check` runs.
"""

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from ceilings import copy_bandwidth
from common import gpu, table, where
from shapes import SHAPES, cache_bytes, draw, shrunk, weight_bytes
from stepped import IDLE, OFF, ONE, Replay, Way, change, every, placed, steps_a_replay, verify
from timing import Times, measure, record

from tinysteer.decoding.pool import CudaGraphs
from tinysteer.decoding.step import Capture
from tinysteer.model.decoder import Decoder

LLAMA = "Llama-3.1-8B"
MODELS = ("Mistral-7B-v0.3", "Phi-3-mini-4k", "Gemma-2-2B", "Gemma-2-9B", "SmolLM2-135M")
BATCHES = (1, 8, 64, 256)
SHORT, LONG = 512, 4096  # columns
REPLAYS = 60  # of each way, in each of two passes
OWN = every(4, "targets", own=True)
FEW = [OFF, IDLE, ONE, every(4, "targets"), OWN]


def many(B: int) -> list[Way]:
    """All that there is; one row alone has but its own."""
    owns, verbs = (False, True) if B > 1 else (True,), ("adds", "targets")
    ways = [every(K, verb, own) for own in owns for K in (1, 4, 8) for verb in verbs]
    return [OFF, IDLE, ONE, *ways]


class Machine(NamedTuple):
    """Where steps run, and what captures them, times them and writes that down."""

    device: str
    capture: Capture
    measure: Callable[..., dict[Way, Times]]
    record: Callable[..., dict]


class Part:
    """The lines of one part, each of several ways at one model, batch and context."""

    def __init__(self, name: str, machine: Machine, copy_rate: float):
        self.name, self.machine, self.copy_rate = name, machine, copy_rate
        self.begin, self.lines = time.perf_counter(), []

    def line(self, model: str, decoder: Decoder, B: int, context: int, ways: list[Way]) -> None:
        title = f"{model}, batch {B}, context {context}"
        config, weight = decoder.config, decoder.embed.weight
        cache = 2 * B * context * config.n_layers * config.n_kv_heads * config.head_dim
        gc.collect()
        if weight.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            if cache * weight.itemsize > torch.cuda.mem_get_info()[0] - 8e9:
                gb = cache * weight.itemsize / 1e9
                return print(f"{title}: left out, its cache takes {gb:.0f} GB", flush=True)
        try:
            self.lines.append(self.timed(model, decoder, B, context, ways))
        except Exception as error:  # one line's failure should not cost the others' numbers
            if self.name == "check":
                raise
            print(f"{title}: left out, {error!r:.500}", flush=True)
        print(f"{time.perf_counter() - self.begin:4.0f} s  {title}", file=sys.stderr, flush=True)
        return None

    def timed(self, model: str, decoder: Decoder, B: int, context: int, ways: list[Way]) -> list:
        """What `record` makes of each way."""
        begin, changed = time.perf_counter(), 1.0
        step = placed(decoder, B, context, self.machine.capture)
        replays = {OFF: Replay(step, [])}
        ready = time.perf_counter() - begin
        memory = torch.cuda.max_memory_reserved() / 1e9 if step.device.type == "cuda" else 0.0
        for way in ways[1:]:
            edits = way.edits(decoder, B)
            replays[way] = Replay(step, edits)
            if B == 8 and way == OWN:
                changed = change(replays[way], edits, edits[::-1])
        checked, n_calls = verify(replays), steps_a_replay(replays[OFF])
        for replay in replays.values():
            replay.n_calls = n_calls
        times, clock = self.machine.measure(replays, REPLAYS), gpu("clocks.sm")
        again, weights, off = verify(replays), weight_bytes(decoder), times[OFF].us
        total = weights + cache_bytes(decoder, B, context - (n_calls - 1) / 2)
        limit, line = 1e6 * total / self.copy_rate, []
        for way in ways:
            t, (moved, same) = times[way], checked[way]
            result = {"part": self.name, "model": model, "B": B, "context": context}
            result |= {"way": way.name, "K": way.K, "verb": way.verb, "own": way.own}
            result |= {"layers": len(way.layers(decoder)) if way.K else 0} | t._asdict()
            shares = zip(("percent_more", "percent_low", "percent_high"), t[-3:], strict=True)
            result |= {name: 100 * us / off for name, us in shares}
            result |= {"tokens_s": 1e6 * B / t.us, "gbs": 1e-3 * weights / t.us}
            result |= {"gbs_cache": 1e-3 * total / t.us, "percent": 100 * limit / t.us}
            result |= {"limit_us": limit, "copy_gbs": self.copy_rate / 1e9, "steps": n_calls}
            result |= {"ready_s": ready, "capture_s": replays[way].seconds, "memory_gb": memory}
            result |= {"moved": moved, "same": min(same, again[way][1], changed), "sm_mhz": clock}
            line.append(self.machine.record("decode", **result))
        return line

    def tables(self) -> str:
        """A row a model, batch and context; then what each way adds there."""
        heads = ["", "batch", "context", "ms/step", "tokens/s", "GB/s", "with cache", "% of limit"]
        heads += ["ready, s", "peak, GB", "as without a graph"]
        rows, added = [], {}
        for line in self.lines:
            off, *steered = line
            rows.append([off["model"], off["B"], off["context"], f"{off['us'] / 1e3:.3f}"])
            rows[-1] += [f"{off[key]:.0f}" for key in ("tokens_s", "gbs", "gbs_cache", "percent")]
            rows[-1] += [f"{off['ready_s']:.1f}", f"{off['memory_gb']:.1f}"]
            rows[-1] += [f"{100 * min(seen['same'] for seen in line):.0f} %"]
            for seen in steered:
                at = f"{off['model']}, {off['B']} x {off['context']}"
                added.setdefault(seen["way"], {})[at] = more(seen)
        titles = list(dict.fromkeys(at for cells in added.values() for at in cells))
        cells = [[at, *(of_way.get(at, "") for of_way in added.values())] for at in titles]
        other = ["% more, interval, us a layer", *added]
        if len(added) > len(titles):
            other, *cells = (list(row) for row in zip(other, *cells, strict=True))
        return f"{table(heads, rows)}\n\n{table(other, cells)}"


def more(seen: dict) -> str:
    percent = [f"{seen[f'percent_{which}']:+.2f}" for which in ("more", "low", "high")]
    return f"{percent[0]} ({percent[1]}..{percent[2]}) {seen['more'] / seen['layers']:+.2f}"


def drawn(model: str) -> Decoder:
    gc.collect()
    return draw(SHAPES[model], "cuda", torch.bfloat16)


def quick(part: Part) -> str:
    """What a reader wants to know first."""
    decoder = drawn(LLAMA)
    for B in (1, 64):
        part.line(LLAMA, decoder, B, SHORT, FEW)
    return part.tables()


def llama(part: Part) -> str:
    decoder = drawn(LLAMA)
    for B in BATCHES:
        part.line(LLAMA, decoder, B, SHORT, many(B))
    for B in BATCHES:
        part.line(LLAMA, decoder, B, LONG, FEW)
    return part.tables()


def models(part: Part) -> str:
    for model in MODELS:
        decoder = drawn(model)
        for B in BATCHES:
            part.line(model, decoder, B, SHORT, FEW)
        for B in (1, 64):
            part.line(model, decoder, B, LONG, FEW)
        del decoder
    return part.tables()


def baselines(part: Part) -> str:
    import rivals

    return rivals.rows(rivals.compare(LLAMA, SHAPES[LLAMA], drawn(LLAMA), (1, 64), record))


PARTS = {"quick": quick, "llama": llama, "models": models, "baselines": baselines}
MINUTES = {"quick": 2, "llama": 6, "models": 6, "baselines": 6}  # guessed before any run


def check() -> None:
    """All models, ways and baselines at tiny shapes in float32. On a CPU graphs are tapes."""
    import rivals

    def untimed(replays: dict[Way, Replay], n: int) -> dict[Way, Times]:
        for replay in replays.values():
            replay.reset()
            replay.replay()
        return dict.fromkeys(replays, Times(1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0))

    def unwritten(file: str, **result) -> dict:
        return result

    machine = Machine("cuda", CudaGraphs(), measure, unwritten)
    if not torch.cuda.is_available():
        sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))
        from dispatch import Tape

        machine = Machine("cpu", Tape, untimed, unwritten)
    part = Part("check", machine, 1e12)
    for model in (LLAMA, *MODELS):
        decoder = draw(shrunk(SHAPES[model]), machine.device, torch.float32)
        for B in (1, 8):
            part.line(model, decoder, B, 64, many(B) if model == LLAMA else FEW)
    text = part.tables()
    assert all(result["same"] == 1 for line in part.lines for result in line), text
    shape = shrunk(SHAPES[LLAMA])
    decoder = draw(shape, machine.device, torch.float32)
    batches, least = ((3,), 1.0) if machine.device == "cpu" else ((1, 3), 0.5)  # other roundings
    lines = rivals.compare("tiny", shape, decoder, batches, unwritten, machine.capture, strict=True)
    text = rivals.rows(lines)
    assert all(result["same"] >= least for result in lines), text
    n_ways = sum(map(len, part.lines))
    print(f"{n_ways} replayed steps and {len(lines)} whole texts are as they should be\n")


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
        part = Part(name, Machine("cuda", CudaGraphs(), measure, record), copy_bandwidth())
        about = f"about {MINUTES[name]} minutes; a copy moves {part.copy_rate / 1e9:.0f} GB/s"
        print(f"{name}: {about}", flush=True)
        print(PARTS[name](part), end="\n\n")
        print(f"{name}: {(time.perf_counter() - part.begin) / 60:.1f} minutes\n", flush=True)
    return None


if __name__ == "__main__":
    main()
