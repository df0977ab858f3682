"""The one way in which benches time: many calls a replay, replays in turn, medians and intervals.

A call is a function of one set of inputs, a tuple. What is timed has n_calls, `replay()` and,
before that and untimed, `reset()`: a Replay, or what behaves like one. On a GPU it is a CUDA graph
that goes round enough sets that none is left in the L2 cache when its turn comes again (cold), or
calls on one set over and over (warm), events outside the graph; on a CPU it is a loop.
"""

import functools
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.machine import DEVICE, ON_GPU

REPLAYS = 100  # in each of two passes, unless said
WARM_UP = 0.3  # seconds: an idle card has lowered its clock
SHORTEST, LONGEST = 2e3, 12e3  # a replay, in microseconds
MOST = 6000  # sets of inputs
PREDICTED = Path(__file__).parent / "results/predicted.json"


class Replay:
    """n_calls of `call`, on each set in turn; captured on a GPU. outputs: the last on each set."""

    def __init__(self, call: Callable, sets: list[tuple], n_calls: int):
        self.call, self.sets, self.n_calls, self.outputs = call, sets, n_calls, {}
        self.graph = None
        if ON_GPU:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # what is compiled, loaded or allocated once is, before
                for inputs in sets[:3]:
                    call(*inputs)
            torch.cuda.current_stream().wait_stream(aside)
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                self.replay()
            self.graph = captured

    def reset(self) -> None:
        """What a replay needs beforehand: nothing."""

    def replay(self) -> None:
        if self.graph is not None:
            return self.graph.replay()
        for i in range(self.n_calls):
            self.outputs[i % len(self.sets)] = self.call(*self.sets[i % len(self.sets)])
        return None


def cache_size() -> float:
    """Bytes of the L2 cache; of a CPU's caches nobody asks."""
    return torch.cuda.get_device_properties(0).L2_cache_size if ON_GPU else math.inf


def n_cold_sets(touched: float) -> int:
    """How many sets of `touched` bytes are more than three L2 caches, and 200 MB; on a CPU 1.

    A replay holds no more calls than MOST: of small inputs fewer sets, which stay in the cache.
    """
    return min(math.ceil(max(200e6, 3.2 * cache_size()) / touched), MOST) if ON_GPU else 1


def sized(call: Callable, sets: list[tuple]) -> Replay:
    """The replay to time: once round the sets at least, if that is not too long.

    A slow call comes round fewer sets, which is to its advantage: they may stay in the cache.
    """
    us = min(replays({"": Replay(call, sets, 20 if ON_GPU else 3)}, 3)[""])
    most, n = max(4 if ON_GPU else 1, int(LONGEST / us)), len(sets)
    wanted = max(n, math.ceil(SHORTEST / us))
    return Replay(call, sets, min(math.ceil(wanted / n) * n, most))  # as many on each set


def replays(timed: Mapping, n: int) -> dict[str, list[float]]:
    """Microseconds a call in each of n replays, all in turn: A B A B."""
    spans = {name: [] for name in timed}
    for _ in range(n):
        for name, one in timed.items():
            one.reset()
            begin = now()
            one.replay()
            spans[name].append((begin, now()))
    if ON_GPU:
        torch.cuda.synchronize()
    us = (lambda a, b: 1e3 * a.elapsed_time(b)) if ON_GPU else (lambda a, b: 1e6 * (b - a))
    return {n: [us(*span) / timed[n].n_calls for span in pairs] for n, pairs in spans.items()}


def now():
    """An event of the GPU, or the CPU's clock."""
    if not ON_GPU:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Times(NamedTuple):
    """Microseconds of one way among others, with 95 % intervals of both passes."""

    us: float  # a call, median
    us_low: float
    us_high: float
    again: float  # median of the second pass
    more: float  # than the first way
    low: float
    high: float


def measure(timed: Mapping, n: int = REPLAYS) -> dict[str, Times]:
    """Two passes of n replays of each, and each one's difference to the first."""
    begin = time.perf_counter()
    while time.perf_counter() < begin + WARM_UP:
        replays(timed, 1)
    first, second = replays(timed, n), replays(timed, n)
    both = {name: first[name] + second[name] for name in timed}
    base = both[next(iter(timed))]
    return {
        name: Times(
            *difference(times, [0.0] * len(times)),
            quantiles(second[name], 0.5)[0],
            *difference(times, base),
        )
        for name, times in both.items()
    }


def quantiles(times: list[float], *qs: float) -> list[float]:
    values, at = (torch.tensor(numbers, dtype=torch.float64) for numbers in (times, qs))
    return values.quantile(at).tolist()


def difference(a: list[float], b: list[float], n: int = 2000) -> tuple[float, float, float]:
    """median(a) - median(b) of interleaved replays, and its 95 % bootstrap interval.

    Replays are drawn in pairs: a clock that drifts, drifts for both.
    """
    pairs = torch.tensor([a, b], dtype=torch.float64)  # (2, replays)
    draws = torch.randint(len(a), (n, len(a)), generator=torch.Generator().manual_seed(0))
    a_medians, b_medians = pairs[:, draws].quantile(0.5, dim=-1)
    low, high = quantiles((a_medians - b_medians).tolist(), 0.025, 0.975)
    return quantiles(a, 0.5)[0] - quantiles(b, 0.5)[0], low, high


@functools.cache
def copy_bandwidth(n_bytes: int = 2**28) -> float:
    """Bytes a second, read and written: what every percentage of a bench is of.

    One H200 copied 2**30 bytes at two thirds of this rate, and 2**26 as fast.
    """
    source, target = (torch.randn(n_bytes // 4, device=DEVICE) for _ in range(2))
    copy = sized(lambda a, b: b.copy_(a), [(source, target)])
    us = measure({"copy": copy}, REPLAYS if ON_GPU else 10)["copy"].us
    assert torch.equal(source, target)
    return 2e6 * n_bytes / us


def predicted(what: str, case: str, copy: float, scaled: bool) -> list[float]:
    """Low and high, as results/predictions*.md have it; scaled by this card's copy (bytes/s).

    What waits does not move bytes, and is not scaled. Empty where nothing was said, and on a CPU.
    """
    told = json.loads(PREDICTED.read_text(encoding="utf-8"))
    scale = 1e9 * told["copy_gbs"] / copy if scaled else 1.0
    return [scale * time for time in told[what].get(case, ())] if ON_GPU else []


def poison(outputs: Tensor | tuple[Tensor, ...]) -> None:
    """NaN everywhere, so that what is not written anew shows."""
    for out in [outputs] if isinstance(outputs, Tensor) else outputs:
        out.fill_(torch.nan)
