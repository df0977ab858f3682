"""Random edits, a captured step at the end of a long text and replayed, and whole texts.

B  rows     T  positions     D  model width     K  edits of a row at one layer

An edit moves a row by 0.05 sqrt(D), or sets its projection to that: some percent of a stream whose
coordinates are about 1, as those of shapes.py's models are.
"""

import copy
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinysteer.decoding.pool import DecodingPool
from tinysteer.decoding.step import BROKEN, Batch, Capture, Decoding, Means, decode_tokens
from tinysteer.model.config import Config
from tinysteer.model.decoder import Decoder
from tinysteer.steering.batch import SteeringBuffers
from tinysteer.steering.edits import Direction, Edit

STEPS = 8  # of a replay, at most: as many as last REPLAY
REPLAY = 4e-3  # seconds
ALIKE = 0.1  # idle tables may round a sum of squares otherwise: less than this, after all layers

VERBS = {
    "adds": lambda direction, weight: direction.add(weight=weight),
    "targets": lambda direction, weight: direction.to_target(target=weight),
    "idle": lambda direction, weight: direction.add(weight=weight, where=(1 << 30, None)),  # never
}


def random_edits(
    decoder: Decoder, n_rows: int, n_lists: int, K: int, layers: Sequence[int], verb: str
) -> list[list[Edit]]:
    """n_lists lists of K edits at each of `layers`, each edit along a direction of its own.

    -> one of them for each row, in turn.
    """
    D, device = decoder.config.dim, decoder.embed.weight.device
    generator = torch.Generator(device).manual_seed(n_lists + K)
    u = torch.randn(n_lists, len(layers), K, D, generator=generator, device=device)
    u = (u / u.norm(dim=-1, keepdim=True)).cpu()
    weight, make = 0.05 * D**0.5, VERBS[verb]
    lists = [
        [
            make(Direction(layer, one, weight, weight, 0.0), weight)
            for layer, several in zip(layers, at_layers, strict=True)
            for one in several
        ]
        for at_layers in u
    ]
    return [lists[row % n_lists] for row in range(n_rows)]


class Way(NamedTuple):
    """How a step is steered."""

    name: str
    K: int = 0
    verb: str = "targets"
    own: bool = False  # directions of its own for each row
    one: bool = False  # layer, the middle one

    def layers(self, decoder: Decoder) -> list[int]:
        n = decoder.config.n_layers
        return [n // 2] if self.one else [*range(n)]

    def edits(self, decoder: Decoder, B: int) -> list[list[Edit]]:
        if not self.K:
            return []
        n_lists = B if self.own else 1
        return random_edits(decoder, B, n_lists, self.K, self.layers(decoder), self.verb)


OFF, IDLE, ONE = Way("off"), Way("idle", 4, "idle"), Way("one layer", 1, "adds", one=True)


def every(K: int, verb: str, own: bool = False) -> Way:
    return Way(f"K {K}, {verb}{', own' * own}", K, verb, own)


def placed(decoder: Decoder, B: int, context: int, capture: Capture) -> Decoding:
    """A step whose B rows are never done, with `context` columns of random keys and values."""
    step = Decoding(decoder, B, context, Means(capture))
    start = torch.zeros(B, dtype=torch.long)
    step.begin(Batch(random_prompts(decoder.config, B, 1), start, [context - 1] * B))
    step.left.fill_(1 << 60)
    for kept in (*step.cache.k, *step.cache.v):
        kept.normal_()
    return step


class Replay:
    """A placed step with one way's edits, as timing.measure wants a graph: n_calls steps a replay.

    It shares the cache and all else with `step`, and keeps tables and graphs of its own. A replay
    ends at the cache's last column.
    """

    def __init__(self, step: Decoding, edits: list[list[Edit]]):
        self.step, self.n_calls = copy.copy(step), 1
        self.first = random_prompts(step.decoder.config, step.rows, 1).to(step.device)
        sizes = step.decoder.config.n_layers, step.rows
        self.step.steering = SteeringBuffers(step.decoder.embed.weight, *sizes, fixed=True)
        self.step.graphs = {}
        begin = time.perf_counter()
        self.step.steer(edits)
        self.chosen()
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
        return self.step.decoder(self.step.tokens, self.step.cache, self.step.steering.seam)[:, 0]

    def chosen(self) -> Tensor:
        """What one replayed step chooses, (B,)."""
        self.reset()
        self.step()
        return self.step.chosen.clone()


def steps_a_replay(off: Replay) -> int:
    """So many that a replay lasts about REPLAY seconds."""
    for _ in range(4):
        finish(off.step.decoder)
        begin = time.perf_counter()
        off.chosen()
        finish(off.step.decoder)
        seconds = time.perf_counter() - begin
    return min(STEPS, 1 + int(REPLAY / seconds))


def agreement(replay: Replay) -> tuple[Tensor, float]:
    """The state without the graph, (B, D), and the share of tokens that the graph chooses by it."""
    state = replay.state()
    expected = replay.step.decoder.logits(state[:, None])[:, 0].argmax(-1)
    chosen = replay.chosen()
    assert state.isfinite().all(), "the state is not finite"
    assert (chosen > BROKEN).all(), "the logits are not finite"
    return state.float(), float((chosen == expected).float().mean())


def verify(ways: dict[Way, Replay]) -> dict[Way, tuple[float, float]]:
    """Of each way how far it moves its least moved row, and the share of tokens as without a graph.

    AssertionError for what is not finite, edits without effect and idle ones with any.
    """
    checked, (off, _) = {}, agreement(ways[OFF])
    for way, replay in ways.items():
        state, same = agreement(replay)
        moved = (state - off).norm(dim=-1) / off.norm(dim=-1)
        if way in (OFF, IDLE):
            assert moved.max() < ALIKE, f"{way.name} moves a row by {moved.max():.2g}"
        else:
            assert moved.min() > 1e-3, f"{way.name} moves a row by {moved.min():.2g}"
        checked[way] = float(moved.min()), same
    return checked


def change(replay: Replay, one: list[list[Edit]], other: list[list[Edit]]) -> float:
    """Other edits and back, in the one graph there is: the share of tokens as without it."""
    seen = []
    for edits in (other, one):
        replay.step.steer(edits)
        seen.append(agreement(replay))
    (a, a_same), (b, b_same) = seen
    assert len(replay.step.graphs) == 1, "edits asked for another graph"
    assert (a - b).norm() > 1e-3 * b.norm(), "other edits change nothing"
    return min(a_same, b_same)


class Run(NamedTuple):
    """A batch's whole texts, and when they came."""

    ids: Tensor  # (B, n_tokens) int64
    first: float  # seconds to the first tokens: tables, prompts
    whole: float  # seconds to the last ones


@torch.inference_mode()
def run(
    pool: DecodingPool,
    prompts: Tensor,
    n_tokens: int,
    edits: Sequence[Sequence[Edit]] = (),
    graph: bool = True,
) -> Run:
    """prompts (B, T), each row as long: as `generation.decode` does, but for making text of it."""
    (B, T), chosen = prompts.shape, []
    finish(pool.decoder)
    begin = time.perf_counter()
    with pool.take(B, T + n_tokens, graph) as step:
        start = torch.zeros(B, dtype=torch.long)
        batch = Batch(prompts, start, [n_tokens] * B)
        for tokens, _ in decode_tokens(step, batch, lambda n: edits):
            chosen.append(tokens)
            if len(chosen) == 1:
                first = time.perf_counter() - begin
    return Run(torch.tensor(chosen).T, first, time.perf_counter() - begin)


def random_prompts(config: Config, B: int, T: int) -> Tensor:
    """(B, T) int64."""
    generator = torch.Generator().manual_seed(B + T)
    return torch.randint(config.vocab_size, (B, T), generator=generator)


def finish(decoder: Decoder) -> None:
    """Wait for all that its device has been asked to do."""
    if decoder.embed.weight.is_cuda:
        torch.cuda.synchronize()
