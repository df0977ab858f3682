"""Microseconds on a GPU: CUDA graphs of many calls, replayed in turn, and results as JSON lines.

A call is a function of one set of inputs, a tuple. Its graph goes round enough sets that none is
left in the L2 cache when its turn comes again (cold), or calls on one set over and over (warm).
Events stand outside the graph, and a replay is so long that the gap before it does not count.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from common import environment
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
REPLAYS = 100  # in each of two passes, unless said
WARM_UP = 0.3  # seconds: an idle card has lowered its clock
SHORTEST, LONGEST = 2e3, 12e3  # a replay, in microseconds


class Graph:
    """n_calls of `call`, on each set in turn, captured. outputs: the last call's on each set."""

    def __init__(self, call: Callable, sets: list, n_calls: int):
        self.n_calls, self.outputs = n_calls, {}
        self.sets = sets  # the graph knows only where they are
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is compiled, loaded or allocated once is, before
            for inputs in sets[:3]:
                call(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for i in range(n_calls):
                self.outputs[i % len(sets)] = call(*sets[i % len(sets)])

    def reset(self) -> None:
        """What a replay needs beforehand, untimed: nothing."""

    def replay(self) -> None:
        self.graph.replay()


def n_cold_sets(touched: float) -> int:
    """How many sets of `touched` bytes are more than three L2 caches, and 200 MB."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return math.ceil(max(200e6, 3.2 * cache) / touched)


def capture(call: Callable, sets: list) -> Graph:
    """The graph to time: once round the sets at least, if one replay is not too long for that.

    A slow call comes round fewer sets, which is to its advantage: they may stay in the cache.
    """
    probe = Graph(call, sets, 20)
    us = min(replays({"": probe}, 3)[""])
    return Graph(call, sets, calls_for(us, len(sets)))


def calls_for(us: float, n_sets: int) -> int:
    """How many calls of `us` microseconds a graph holds: 20 and more of those below 100."""
    most = max(4, int(LONGEST / us))
    wanted = max(4, n_sets, math.ceil(SHORTEST / us))
    rounds = math.ceil(wanted / n_sets) * n_sets  # as many on each set
    return min(rounds, most)


def replays(graphs: dict[str, Graph], n: int) -> dict[str, list[float]]:
    """Microseconds a call in each of n replays, the graphs in turn: A B A B."""
    events = {name: [] for name in graphs}
    for _ in range(n):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.reset()
            start.record()
            graph.replay()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: [1e3 * start.elapsed_time(end) / graphs[name].n_calls for start, end in pairs]
        for name, pairs in events.items()
    }


class Times(NamedTuple):
    """Of one graph among others. Differences are to the first of them, 95 % interval."""

    us: float  # a call, median of the first pass
    p10: float
    p90: float
    again: float  # median of the second pass
    more: float  # than the first graph: both passes' medians
    low: float
    high: float


def measure(graphs: dict[str, Graph], n: int = REPLAYS) -> dict[str, Times]:
    """Two passes of n replays of each graph, and each one's difference to the first."""
    begin = time.perf_counter()
    while time.perf_counter() < begin + WARM_UP:
        replays(graphs, 1)
    first, second = replays(graphs, n), replays(graphs, n)
    base = next(iter(graphs))
    return {
        name: Times(
            *quantiles(first[name], 0.5, 0.1, 0.9),
            *quantiles(second[name], 0.5),
            *difference(first[name] + second[name], first[base] + second[base]),
        )
        for name in graphs
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


def record(file: str, **result: str | float | None) -> dict:
    """Append a line to bench/results: where and when it was made, and the result."""
    line = environment() | {k: rounded(v) for k, v in result.items()}
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{file}.jsonl", "a") as lines:
        lines.write(json.dumps(line) + "\n")
    return line


def rounded(value):
    """Five digits of a float: more are noise."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def poison(outputs: Tensor | tuple[Tensor, ...]) -> None:
    """NaN everywhere, so that what is not written anew shows."""
    for out in [outputs] if isinstance(outputs, Tensor) else outputs:
        out.fill_(torch.nan)
