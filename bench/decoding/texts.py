"""Whole texts: made by several ways in turn, checked, timed.

Times are wall-clock: to the first tokens, which takes the prompts and the edits compiled into
tables; of a step from there on; and of the whole, divided by its steps. "Speed" is the first way's
time over a way's, with its 95 % interval.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.decoding.shapes import TYPE, Way
from bench.machine import ON_GPU, Lines, table
from bench.timing import difference
from tests.helpers.dispatch import Tape
from tinysteer.decoding.pool import DecodingPool
from tinysteer.decoding.step import Batch, decode_tokens
from tinysteer.model.decoder import Decoder
from tinysteer.steering.batch import Rows


class Run(NamedTuple):
    """A batch's whole texts, and when they came."""

    ids: Tensor  # (B, n_tokens) int64
    first: float  # seconds to the first tokens
    whole: float  # seconds to the last ones


KINDS = {
    "first": lambda run: run.first,
    "steps": lambda run: (run.whole - run.first) / (run.ids.shape[1] - 1),
    "whole": lambda run: run.whole / run.ids.shape[1],
}
HEADS = ["", "tokens as expected", "first, ms", "speed", "a step, ms", "speed"]
HEADS += ["a step of the whole, ms", "speed"]


def pool_of(decoder: Decoder, taped: bool) -> DecodingPool:
    """Of CUDA graphs; on a CPU of none, or of tapes in their place."""
    return DecodingPool(decoder, Tape if taped and not ON_GPU else None)


def run(pool: DecodingPool, prompts: Tensor, n_tokens: int, edits: Rows = (), graph=True) -> Run:
    """prompts (B, T), each row as long: as `generation.decode` does, but for making text of it."""
    (B, T), chosen = prompts.shape, []
    if ON_GPU:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    with pool.take(B, T + n_tokens, graph) as step:
        batch = Batch(prompts, torch.zeros(B, dtype=torch.long), [n_tokens] * B)
        for tokens, _ in decode_tokens(step, batch, lambda n: edits):
            chosen.append(tokens)
            if len(chosen) == 1:
                first = time.perf_counter() - begin
    return Run(torch.tensor(chosen).T, first, time.perf_counter() - begin)


def compare(
    lines: Lines, ways: dict[Way, Callable], rounds: int, expected: dict | None = None, **case
) -> str:
    """Run each way, a function that gives a Run, once; then time them in turn -> a table.

    expected: tokens that a way's are held against, by default those of the first with as many
    edits; in float32, on a CPU, they must be the same. AssertionError for tokens that are none, and
    for edits that leave all texts as they were. On a GPU a way that fails is left out.
    """
    ids, rows = {}, []
    for way, texts in ways.items():
        try:
            ids[way] = texts().ids
        except Exception as error:  # which should not cost the others' numbers
            if not ON_GPU:
                raise
            print(f"{way.name} is left out: {error!r:.500}\n", flush=True)
    runs, base = {way: [] for way in ids}, next(iter(ids))
    expected = expected or {way: ids[next(w for w in ids if w.K == way.K)] for way in ids}
    for way in [*ids] * rounds:
        runs[way].append(ways[way]())
    for way, of_way in runs.items():
        assert (ids[way] >= 0).all(), f"{way.name}: logits are not finite"
        assert not way.K or (ids[way] != ids[base]).any(), f"{way.name} changes no text"
        same = min(float((one.ids == expected[way]).float().mean()) for one in of_way)
        assert ON_GPU or same == 1, f"{way.name}: {same:.0%} of the tokens are as expected"
        case |= {"way": way.name, "K": way.K, "lists": way.lists, "same": same, "dtype": TYPE}
        rows.append([way.name, f"{same:.0%}"])
        for kind, seconds in KINDS.items():
            a, b = ([seconds(one) for one in each] for each in (of_way, runs[base]))
            us, low, high = (1e6 * s for s in difference(a, [0.0] * rounds))
            a, b = ([math.log(s) for s in each] for each in (a, b))
            speed, slow, fast = (math.exp(ratio) for ratio in difference(b, a))
            result = case | {"kind": kind, "us": us, "us_low": low, "us_high": high}
            lines.write(**result, speed=speed, speed_low=slow, speed_high=fast)
            rows[-1] += [f"{us / 1e3:.2f}", f"{speed:.3f} ({slow:.3f}..{fast:.3f})"]
    return table(HEADS, rows)
