"""Many vectors and many configurations in one batch: EasySteer's experiment with our decoder.

    python bench/many_configs.py

From a checkout that is not installed: PYTHONPATH=.:kernels python bench/many_configs.py

The shape is DeepSeek-R1-Distill-Qwen-1.5B's (28 layers of width 1536) with random weights in
bfloat16; 256 rows with 16 random tokens each get 128 new ones, greedily, as `model.complete` does
it but for making text of them: prompts run, steps captured, tokens read one step behind. Vectors
are added with weights that are not 0. A configuration has a vector of its own at every layer, and
the rows take the configurations in turn; one is the same as "every layer", which shows the spread.

Times are wall-clock, medians of rounds in which the ways come in turn: of the whole, which begins
with the edits compiled into tables, and of the steps alone, from the first tokens to the last. A
ratio is unsteered time over steered time, with its 95 % interval. EasySteer's are of tokens/s with
another GPU and engine (vLLM, one RTX PRO 6000, scale 0; its experiment/efficiency/README.md of
2026-08-06): only ratios compare. Where there is no GPU all is checked at a tiny shape on the CPU.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from common import gpu, table, where
from shapes import SHAPES, draw, shrunk
from stepped import Run, random_edits, random_prompts, run
from timing import difference, record

from tinysteer.decoding.pool import DecodingPool
from tinysteer.model.decoder import Decoder
from tinysteer.steering.edits import Edit

MODEL = "R1-Distill-1.5B"
B, PROMPT, N_TOKENS = 256, 16, 128
ROUNDS = 11


class Way(NamedTuple):
    """theirs: tokens/s steered and, in the same of EasySteer's tables, unsteered."""

    name: str
    n_lists: int  # configurations; 0: nothing is steered
    K: int = 1  # vectors at each layer
    one: bool = False  # layer
    theirs: tuple[int, int] | None = None

    def edits(self, decoder: Decoder, rows: int) -> list[list[Edit]]:
        n, n_lists = decoder.config.n_layers, self.n_lists
        layers = [n // 2] if self.one else range(n)
        return random_edits(decoder, rows, n_lists, self.K, layers, "adds") if n_lists else []


WAYS = [
    Way("nothing", 0),
    Way("one layer", 1, one=True, theirs=(29622, 33217)),
    Way("every layer", 1, theirs=(25310, 33217)),
    Way("3 vectors at every layer", 1, 3, theirs=(8483, 33217)),
    Way("1 configuration", 1, theirs=(23211, 30633)),
    Way("8 configurations", 8, theirs=(19923, 30633)),
    Way("32 configurations", 32, theirs=(15851, 30633)),
    Way("64 configurations", 64, theirs=(11082, 30633)),
    Way("128 configurations", 128, theirs=(8733, 30633)),
    Way("256 configurations", 256, theirs=(5620, 30633)),
    Way("256 configurations of 3 vectors", 256, 3),
]


def first_texts(
    pool: DecodingPool, prompts: torch.Tensor, n_tokens: int
) -> tuple[dict[Way, list[list[Edit]]], dict[Way, torch.Tensor], dict[Way, float]]:
    """Of each way its edits, the tokens (B, n_tokens) of a first run, the share as without a graph.

    AssertionError for tokens that are none, and for edits that leave all texts as they were.
    """
    edits = {way: way.edits(pool.decoder, len(prompts)) for way in WAYS}
    said = {way: run(pool, prompts, n_tokens, edits[way]).ids for way in WAYS}
    same = {}
    for way, ids in said.items():
        assert (ids >= 0).all(), f"{way.name}: logits are not finite"
        assert way is WAYS[0] or (ids != said[WAYS[0]]).any(), f"{way.name} changes no text"
        launched = run(pool, prompts, n_tokens, edits[way], graph=False).ids
        same[way] = float((launched == ids).float().mean())
    return edits, said, same


def rounds(
    pool: DecodingPool, prompts: torch.Tensor, n_tokens: int, edits: dict, n: int
) -> dict[Way, list[Run]]:
    """n runs of each way, in turn. AssertionError where one of them captures a graph."""
    runs, captured = {way: [] for way in WAYS}, pool.captured
    for _ in range(n):
        for way in WAYS:
            runs[way].append(run(pool, prompts, n_tokens, edits[way]))
            assert pool.captured == captured, f"{way.name} was captured again"
    return runs


def results(
    runs: dict[Way, list[Run]], said: dict, same: dict, record: Callable[..., dict]
) -> list[dict]:
    """What is written down of each way."""
    base, clock, lines = runs[WAYS[0]], gpu("clocks.sm"), []
    rows, n_tokens = base[0].ids.shape
    parts = {
        "whole": (lambda one: one.whole, rows * n_tokens),
        "steps": (lambda one: one.whole - one.first, rows * (n_tokens - 1)),
    }
    for way, of_way in runs.items():
        result = {"model": MODEL, "B": rows, "tokens": n_tokens, "way": way.name}
        result |= {"configurations": way.n_lists, "K": way.K * bool(way.n_lists), "one": way.one}
        for name, (seconds, tokens) in parts.items():
            ours, plain = ([seconds(one) for one in each] for each in (of_way, base))
            median, unsteered = statistics.median(ours), statistics.median(plain)
            _, low, high = difference(ours, plain)
            result |= {f"{name}_s": median, f"{name}_tokens_s": tokens / median}
            result |= {f"{name}_ratio": unsteered / median}
            result |= {f"{name}_low": unsteered / (unsteered + high)}
            result |= {f"{name}_high": unsteered / (unsteered + low)}
        result |= {"first_ms": 1e3 * statistics.median(one.first for one in of_way)}
        result |= {"theirs": way.theirs and way.theirs[0] / way.theirs[1]}
        again = min(float((one.ids == said[way]).float().mean()) for one in of_way)
        result |= {"same": same[way], "again": again, "sm_mhz": clock}
        lines.append(record("many_configs", **result))
    return lines


def shown(found: list[dict]) -> str:
    """The table of the results."""

    def ratio(r: dict, part: str) -> str:
        value, low, high = (r[f"{part}_{which}"] for which in ("ratio", "low", "high"))
        return f"{value:.3f} ({low:.3f}..{high:.3f})"

    rows = [
        [
            r["way"],
            f"{r['first_ms']:.0f}",
            f"{r['whole_tokens_s']:.0f}",
            ratio(r, "whole"),
            f"{r['steps_tokens_s']:.0f}",
            ratio(r, "steps"),
            "" if r["theirs"] is None else f"{r['theirs']:.2f}",
            f"{100 * r['same']:.0f} %",
            f"{100 * r['again']:.0f} %",
        ]
        for r in found
    ]
    heads = ["steered", "first, ms", "whole: tokens/s", "ratio", "steps: tokens/s", "ratio"]
    return table([*heads, "EasySteer's", "tokens as without a graph", "as again"], rows)


def check() -> None:
    """All ways at a tiny shape in float32, captured on tapes: every token as without them."""
    sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))
    from dispatch import Tape

    decoder = draw(shrunk(SHAPES[MODEL]), "cpu", torch.float32)
    pool, prompts = DecodingPool(decoder, Tape), random_prompts(decoder.config, 12, 5)
    edits, said, same = first_texts(pool, prompts, 10)
    assert set(same.values()) == {1.0}, same
    lines = results(rounds(pool, prompts, 10, edits, 2), said, same, lambda _, **result: result)
    text = shown(lines)
    assert all(r["again"] == 1 for r in lines), text
    print(f"{len(WAYS)} ways: tokens as without a graph and again, {pool.captured} graphs\n")


@torch.inference_mode()
def main() -> None:
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    print(where(), end="\n\n", flush=True)
    if not torch.cuda.is_available():
        check()
        return print("No GPU is here: all was checked on the CPU, nothing was timed.")
    begin = time.perf_counter()
    decoder = draw(SHAPES[MODEL], "cuda", torch.bfloat16)
    pool, prompts = DecodingPool(decoder), random_prompts(decoder.config, B, PROMPT)
    run(pool, prompts, N_TOKENS)
    ready = time.perf_counter() - begin
    edits, said, same = first_texts(pool, prompts, N_TOKENS)
    print(f"{ready:.1f} s to the end of the first texts, weights drawn", flush=True)
    print(f"{time.perf_counter() - begin:.0f} s to the end of every way's", flush=True)
    runs = rounds(pool, prompts, N_TOKENS, edits, ROUNDS)
    print("", shown(results(runs, said, same, record)), sep="\n", end="\n\n")
    gb, minutes = torch.cuda.max_memory_reserved() / 1e9, (time.perf_counter() - begin) / 60
    print(f"{pool.captured} graphs, {gb:.1f} GB at the peak, {minutes:.1f} minutes")
    return None


if __name__ == "__main__":
    main()
