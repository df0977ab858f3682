"""One decode step whose state stays on the device: captured once, then replayed.

A step reads the tokens that the last one chose, runs the decoder, chooses the next ones and notes
which rows are done, all in tensors of fixed shape and place. So on a GPU it becomes a CUDA graph,
which serves every batch, every edit and every seed that fits its sizes; sizes are rounded up, so
that few graphs do. The host looks at tokens only to make text of them, one step behind the device.
On a CPU the same step runs as it is.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tinysteer_kernels.decode import use_kernels
from torch import Tensor

from tinysteer.decoding.sampling import Sampler
from tinysteer.model.cache import Cache
from tinysteer.model.decoder import Decoder
from tinysteer.steering.batch import Rows, SteeringBuffers
from tinysteer.text.tokenizer import pad

NOTHING, BROKEN = -1, -2  # in a token's place: its row is done; its logits are not finite

Capture = Callable[[Callable[[], None]], Callable[[], None]]  # runs it -> what runs it again


class Batch(NamedTuple):
    """Prompts to be decoded together."""

    tokens: Tensor  # (B, T), padded on the left
    start: Tensor  # (B,) the column that each begins at
    limits: Sequence[int]  # of new tokens, one a row
    stop_ids: frozenset[int] = frozenset()
    sampler: Sampler | None = None  # None: greedy
    kernels: bool = True  # on a GPU by the kernels; False: by PyTorch's operations

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], decoder: Decoder, *rest, **named) -> "Batch":
        """Of lists of token ids, and the other fields."""
        return cls(*pad(prompts, decoder.multiple), *rest, **named)

    @property
    def length(self) -> int:
        """The columns that it needs."""
        return self.tokens.shape[1] + max(self.limits)


@dataclass(frozen=True)
class Means:
    """What a pool lends to a step."""

    capture: Capture | None = None  # None: the step runs as it is
    around: Callable[[torch.device], AbstractContextManager] = torch.cuda.device  # all GPU work
    clear: Callable[[], None] = lambda: None  # makes room where memory is too short


class Variant(NamedTuple):
    """What of a captured step is no tensor's content, besides its rows and columns."""

    size: tuple[int, int]  # of the tables: see `SteeringBuffers`
    sampling: str  # Sampler.kind, or "greedy"
    kernels: bool  # see `Batch`


def on_its_stream(method: Callable) -> Callable:
    """Streams, events and graphs are the current GPU's: work there is done in what it gave."""

    @functools.wraps(method)
    def inside(self, *arguments, **options):
        if self.device.type != "cuda":
            return method(self, *arguments, **options)
        with self.means.around(self.device):
            return method(self, *arguments, **options)

    return inside


def twice(attempt: Callable, between: Callable[[], None]):
    """What it returns; where memory is too short it is tried once more, after `between`."""
    try:
        return attempt()
    except torch.OutOfMemoryError:
        pass  # the error holds on to the tensors of the first attempt: be rid of it before
    between()
    return attempt()


def weights_key(decoder: Decoder) -> int:
    """What changes when weights move, as they do when others take their place."""
    return hash(tuple((p.device, p.data_ptr(), p.dtype) for p in decoder.parameters()))


class Decoding:
    """A batch that is being decoded: `begin` runs its prompts, each call a step.

    Without a capture it is made for one batch and runs as it is. With it the sizes are those of
    the graphs: later batches may have fewer rows and need fewer columns. Where memory is too short
    for the prompts or for a graph, they are tried once more after `means.clear`;
    torch.OutOfMemoryError if that fails too.
    """

    def __init__(self, decoder: Decoder, rows: int, length: int, means: Means = Means()):
        self.decoder, self.means, self.key = decoder, means, weights_key(decoder)
        self.rows, self.length, self.device = rows, length, decoder.embed.weight.device
        self._allocate(rows, length)
        self.samplers: dict[str, Sampler] = {}
        self.graphs: dict[Variant, Callable[[], None]] = {}

    @on_its_stream  # whose memory this is, so that it may be freed while a step is under way
    def _allocate(self, rows: int, length: int) -> None:
        decoder, fixed = self.decoder, self.means.capture is not None
        with torch.device(decoder.embed.weight.device):
            self.tokens = torch.zeros(rows, 1, dtype=torch.long)
            self.chosen, self.left = torch.zeros(2, rows, dtype=torch.long)  # left: still allowed
            self.logprobs = torch.zeros(rows)  # of what was chosen
            self.stops = torch.zeros(decoder.config.vocab_size, dtype=torch.bool)
            start = torch.full((rows,), length)
        self.host = itertools.cycle([self._pinned() for _ in range(self.lag + 2)])
        self.cache = Cache(decoder, start, 1, length)
        self.steering = SteeringBuffers(decoder.embed.weight, decoder.config.n_layers, rows, fixed)

    def _pinned(self) -> list[Tensor]:
        """Where a step's choices arrive on the host. Made once: memory that is freed while another
        thread captures would leave a mark in that graph.
        """
        pin = self.tokens.is_cuda
        like = self.chosen, self.logprobs
        return [torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=pin) for t in like]

    @property
    def lag(self) -> int:
        """Steps that run ahead of what is read."""
        return int(self.device.type == "cuda")

    @on_its_stream
    def begin(self, batch: Batch, edits: Rows = ()) -> None:
        """Run a batch's prompts and choose what follows each. Rows beyond its own hold nothing."""
        (n, T), spare = batch.tokens.shape, self.rows - len(batch.tokens)
        assert spare >= 0, (n, self.rows)
        assert batch.length <= self.length, (batch.length, self.length)
        limits = torch.tensor([*batch.limits, *[0] * spare], device="cpu")
        start = torch.cat((batch.start, torch.full((spare,), self.length, device="cpu")))

        def run() -> None:
            self.cache.begin(start, T, T - start + limits)
            self.left.copy_(limits)
            self.stops.zero_()[[i for i in batch.stop_ids if i < len(self.stops)]] = True
            self.batch = batch._replace(sampler=self._sampler(batch.sampler))
            self.steering.copy_(edits, anew=True)
            part = self.cache.part(n)
            with use_kernels(batch.kernels):
                tokens = batch.tokens.to(self.tokens.device)
                h = self.decoder.prefill(tokens, part, self.steering.part(n))
                self.cache.resume(part, fixed=self.means.capture is not None)
                self._choose(torch.cat((h, h.new_zeros(spare, *h.shape[1:]))))

        twice(run, self.means.clear)

    @on_its_stream
    def steer(self, edits: Rows) -> None:
        """Edits for the steps to come, a list a row: other tables' contents, no other graph."""
        self.steering.copy_(edits)

    def _sampler(self, new: Sampler | None) -> Sampler | None:
        if new and self.means.capture:
            if new.kind not in self.samplers:
                self.samplers[new.kind] = new.empty(self.rows, self.length)
            return self.samplers[new.kind].copy_(new)
        if new:
            new.step.zero_()  # a first attempt may have drawn
        return new

    @on_its_stream
    def __call__(self) -> None:
        """One token more for each row that is not done."""
        if self.means.capture is None:
            return self._run()
        kind = self.batch.sampler.kind if self.batch.sampler else "greedy"
        variant = Variant(self.steering.size, kind, self.batch.kernels)
        if variant in self.graphs:
            self.graphs[variant]()
        else:
            self.graphs[variant] = self._captured(self.means.capture)
        return None

    def _captured(self, capture: Capture) -> Callable[[], None]:
        """The step run and captured. What a run that broke off has changed is put back."""
        state = [self.tokens, self.chosen, self.logprobs, self.left]
        state += [self.cache.start, self.cache.column]
        state += [self.batch.sampler.step] if self.batch.sampler else []
        before = [tensor.clone() for tensor in state]

        def restart() -> None:
            self.means.clear()
            for tensor, old in zip(state, before, strict=True):
                tensor.copy_(old)

        return twice(lambda: capture(self._run), restart)

    def _run(self) -> None:
        with use_kernels(self.batch.kernels):
            self._choose(self.decoder(self.tokens, self.cache, self.steering.seam))

    def _choose(self, h: Tensor) -> None:
        """h (B, 1, D) after the last norm -> the next tokens, and what rows may still get."""
        logits = self.decoder.logits(h)[:, -1]
        lowest, highest = logits.aminmax(dim=-1)
        finite = (highest - lowest).isfinite()
        token = self.batch.sampler(logits) if self.batch.sampler else logits.argmax(-1)
        self.logprobs.copy_(logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1))
        self.tokens.copy_(token[:, None])
        seen = token.where(finite, BROKEN).where(self.left > 0, NOTHING)
        self.chosen.copy_(seen)
        self.left.sub_(1).masked_fill_(self.stops[token] | (seen < 0), 0)
        self.cache.end(self.left == 0)

    @on_its_stream
    def end(self, row: int) -> None:
        """The host has seen enough of a row."""
        self.left[row] = 0

    @on_its_stream
    def read(self) -> Callable[[], tuple[list[int], list[float]]]:
        """The last tokens chosen and their log-probabilities, a row each, on their way to the
        host: call the result to wait for them.

        A row that is done has NOTHING there, one whose logits are not finite BROKEN.
        """
        n, (chosen, logprobs) = len(self.batch.tokens), next(self.host)
        chosen.copy_(self.chosen, non_blocking=True)
        logprobs.copy_(self.logprobs, non_blocking=True)
        arrived = torch.cuda.Event() if self.chosen.is_cuda else None
        if arrived:
            arrived.record()

        def wait() -> tuple[list[int], list[float]]:
            if arrived:
                arrived.synchronize()
            return chosen[:n].tolist(), logprobs[:n].tolist()

        return wait


def decode_tokens(
    decoding: Decoding, batch: Batch, edits: Callable[[int], Rows]
) -> Iterator[tuple[list[int], list[float]]]:
    """What each step chose, a token a row, and its log-probability as the model is steered.

    edits: how many tokens were chosen so far -> the edits for the next, a list a row. On a GPU
    the step after it is on its way before a token is read. NOTHING, BROKEN as for `read`.
    """
    decoding.begin(batch, edits(0))
    waiting = deque([decoding.read()])
    for n in range(1, max(batch.limits)):
        if len(waiting) > decoding.lag:
            yield waiting.popleft()()
        decoding.steer(edits(n))
        decoding()
        waiting.append(decoding.read())
    for read in waiting:
        yield read()
