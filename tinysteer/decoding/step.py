"""One decode step whose state stays on the device: captured once, then replayed.

A step reads the tokens that the last one chose, runs the decoder, chooses the next ones and notes
which rows are done, all in tensors of fixed shape and place. So on a GPU it becomes a CUDA graph,
which serves every batch, every edit and every seed that fits its sizes; sizes are rounded up, so
that few graphs do. The host looks at tokens only to make text of them, one step behind the device.
On a CPU the same step runs as it is.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from tinysteer_kernels.decode import use_kernels
from torch import Tensor

from tinysteer.decoding.sampling import Sampler
from tinysteer.model.cache import Cache
from tinysteer.model.decoder import Decoder
from tinysteer.model.decoder import Seam, unsteered
from tinysteer.steering.batch import (
    SteeringBuffers,
    depth,
    direction_key,
    distinct,
    seam,
    signature,
)
from tinysteer.steering.edits import Edit

NOTHING, BROKEN = -1, -2  # in a token's place: its row is done; its logits are not finite
EDITS = 4  # of a row at one layer that a captured step has room for, at least
DIRECTIONS = 64  # in a captured step's bank, at least

Capture = Callable[[Callable[[], None]], Callable[[], None]]  # runs it -> what runs it again


class Variant(NamedTuple):
    """What of a captured step is no tensor's content, besides its rows and columns."""

    edits: int  # of a row at one layer, at most; 0: nothing is steered
    directions: int  # in the bank, at most
    sampling: str  # Sampler.kind, or "greedy"
    kernels: bool  # by the kernels; False: by PyTorch's operations


def on_its_stream(method: Callable) -> Callable:
    """Streams, events and graphs are the current GPU's: work there is done in what it gave."""

    @functools.wraps(method)
    def inside(self, *arguments, **options):
        if self.device.type != "cuda":
            return method(self, *arguments, **options)
        with self.around(self.device):
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


def rounded(n: int) -> int:
    """Up to a power of two."""
    return 1 << (n - 1).bit_length()


def weights_key(decoder: Decoder) -> int:
    """What changes when weights move, as they do when others take their place."""
    return hash(tuple((p.device, p.data_ptr(), p.dtype) for p in decoder.parameters()))


class Decoding:
    """A batch that is being decoded: `begin` runs its prompts, each call a step.

    Without `capture` it is made for one batch and runs as it is. With it the sizes are those of
    the graphs: later batches may have fewer rows and need fewer columns. around: a GPU -> what
    all its work there is done in. clear: makes room where memory is too short for the prompts or
    for a graph, which are then tried once more; torch.OutOfMemoryError if that fails too.
    """

    def __init__(
        self,
        decoder: Decoder,
        rows: int,
        length: int,
        capture: Capture | None = None,
        around: Callable[[torch.device], AbstractContextManager] = torch.cuda.device,
        clear: Callable[[], None] = lambda: None,
    ):
        self.decoder, self.capture, self.around, self.clear = decoder, capture, around, clear
        self.rows, self.length = rows, length
        self.device = decoder.embed.weight.device
        self.key = weights_key(decoder)
        self.lag = int(self.device.type == "cuda")  # steps that run ahead of what is read
        self._allocate()
        self.steering: dict[tuple[int, int], SteeringBuffers] = {}
        self.samplers: dict[str, Sampler] = {}
        self.graphs: dict[Variant, Callable[[], None]] = {}

    @on_its_stream  # whose memory this is, so that it may be freed while a step is under way
    def _allocate(self) -> None:
        weight, rows = self.decoder.embed.weight, self.rows
        with torch.device(weight.device):
            self.tokens = torch.zeros(rows, 1, dtype=torch.long)
            self.chosen, self.left = torch.zeros(2, rows, dtype=torch.long)  # left: still allowed
            self.stops = torch.zeros(self.decoder.config.vocab_size, dtype=torch.bool)
            start = torch.full((rows,), self.length)
        self.cache = Cache(self.decoder, start, 1, self.length)

    @on_its_stream
    def begin(
        self,
        tokens: Tensor,
        start: Tensor,
        limits: Sequence[int],
        stop_ids: frozenset[int] = frozenset(),
        edits: Sequence[Sequence[Edit]] = (),
        sampler: Sampler | None = None,
        kernels: bool = True,
    ) -> None:
        """Run prompts (n, T) from column start (n,) on and choose what follows each.

        limits: of new tokens, one a row. Rows beyond n hold nothing.
        """
        (n, T), spare = tokens.shape, self.rows - len(tokens)
        assert spare >= 0, (n, self.rows)
        assert T + max(limits) <= self.length, (T, limits, self.length)
        limits = torch.tensor([*limits, *[0] * spare], device="cpu")
        start = torch.cat((start, torch.full((spare,), self.length, device="cpu")))

        def run() -> None:
            self.cache.begin(start, T, T - start + limits)
            self.left.copy_(limits)
            self.stops.zero_()[[i for i in stop_ids if i < len(self.stops)]] = True
            self.n, self.kernels, self.edits = n, kernels, None
            self.sampler = self._sampler(sampler)
            if self.sampler:
                self.sampler.step.zero_()  # a first attempt may have drawn
            self._steer(edits, signature(edits))
            with use_kernels(kernels):
                part, steer = self.cache.part(n), self.seam
                steer = steer.part(n) if isinstance(steer, SteeringBuffers) else steer
                x = self.decoder.prefill(tokens.to(self.tokens.device), part, steer)
                self.cache.filled = part.filled
                if self.capture is not None:  # from here on the columns are counted on the device
                    self.cache.filled, self.cache.block = 0, self.length
                self._choose(torch.cat((x, x.new_zeros(spare, *x.shape[1:]))))

        twice(run, self.clear)

    def steer(self, edits: Sequence[Sequence[Edit]]) -> None:
        """Edits for the steps to come, a list a row: other tables' contents, no other graph."""
        new = signature(edits)
        if self.edits is None or new != self.signature:
            on_its_stream(Decoding._steer)(self, edits, new)

    def _steer(self, edits: Sequence[Sequence[Edit]], new: tuple) -> None:
        self.seam, self.size = self._steering(edits)
        self.edits, self.signature = edits, new  # which speaks of memory that the edits keep

    def _steering(self, edits: Sequence[Sequence[Edit]]) -> tuple[Seam, tuple[int, int]]:
        if not any(edits):
            return unsteered, (0, 0)
        if self.capture is None:
            return seam(edits, self.decoder.embed.weight), (0, 0)
        capacity, spare = rounded(max(depth(edits), EDITS)), self.rows - len(edits)
        directions = {direction_key(edit.direction) for row in distinct(edits) for edit in row}
        size = capacity, rounded(max(len(directions), DIRECTIONS))
        if size not in self.steering:
            sizes = self.decoder.config.n_layers, self.rows, *size
            self.steering[size] = SteeringBuffers(self.decoder.embed.weight, *sizes)
        self.steering[size].copy_([*edits, *[[]] * spare])
        return self.steering[size], size

    def _sampler(self, new: Sampler | None) -> Sampler | None:
        if new is None or self.capture is None:
            return new
        if new.kind not in self.samplers:
            self.samplers[new.kind] = new.empty(self.rows, self.length)
        return self.samplers[new.kind].copy_(new)

    @on_its_stream
    def __call__(self) -> None:
        """One token more for each row that is not done."""
        if self.capture is None:
            return self._run()
        kind = self.sampler.kind if self.sampler else "greedy"
        variant = Variant(*self.size, kind, self.kernels)
        if variant in self.graphs:
            self.graphs[variant]()
        else:
            self.graphs[variant] = self._captured()
        return None

    def _captured(self) -> Callable[[], None]:
        """The step run and captured. What a run that broke off has changed is put back."""
        state = [self.tokens, self.chosen, self.left, self.cache.start, self.cache.column]
        state += [self.sampler.step] if self.sampler else []
        before = [tensor.clone() for tensor in state]

        def restart() -> None:
            self.clear()
            for tensor, old in zip(state, before, strict=True):
                tensor.copy_(old)

        return twice(lambda: self.capture(self._run), restart)

    def _run(self) -> None:
        with use_kernels(self.kernels):
            self._choose(self.decoder(self.tokens, self.cache, self.seam))

    def _choose(self, x: Tensor) -> None:
        """x (B, 1, D) after the last norm -> the next tokens, and what rows may still get."""
        logits = self.decoder.logits(x)[:, -1]
        lowest, highest = logits.aminmax(dim=-1)
        finite = (highest - lowest).isfinite()
        token = logits.argmax(-1) if self.sampler is None else self.sampler(logits)
        self.tokens.copy_(token[:, None])
        seen = token.where(finite, BROKEN).where(self.left > 0, NOTHING)
        self.chosen.copy_(seen)
        self.left.sub_(1).masked_fill_(self.stops[token] | (seen < 0), 0)
        # A row that is done is padding from now on: not edited, and it looks at nothing.
        self.cache.start.masked_fill_(self.left == 0, self.length)

    @on_its_stream
    def end(self, row: int) -> None:
        """The host has seen enough of a row."""
        self.left[row] = 0

    @on_its_stream
    def read(self) -> Callable[[], list[int]]:
        """The last tokens chosen, on their way to the host: call the result to wait for them.

        A row that is done has NOTHING there, one whose logits are not finite BROKEN.
        """
        chosen = self.chosen[: self.n]
        if not chosen.is_cuda:
            return chosen.clone().tolist
        host = torch.empty(chosen.shape, dtype=chosen.dtype, device="cpu", pin_memory=True)
        host.copy_(chosen, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def wait() -> list[int]:
            arrived.synchronize()
            return host.tolist()

        return wait
