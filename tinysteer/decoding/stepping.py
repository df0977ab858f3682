"""One decode step whose state stays on the device: captured once, then replayed.

A step reads the tokens that the last one chose, runs the decoder, chooses the next ones and notes
which rows are done, all in tensors of fixed shape and place. So on a GPU it becomes a CUDA graph,
which serves every batch, every edit and every seed that fits its sizes; sizes are rounded up, so
that few graphs do. The host looks at tokens only to make text of them, one step behind the device.
On a CPU the same step runs as it is.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from tinysteer_kernels.decode import use_kernels
from torch import Tensor

from tinysteer.decoding.sampling import Sampler
from tinysteer.model.decoder import Cache, Decoder, Seam, unsteered
from tinysteer.steering.batch import Fixed, alike, depth, direction_key, distinct, seam
from tinysteer.steering.edits import Edit

NOTHING, BROKEN = -1, -2  # in a token's place: its row is done; its logits are not finite
EDITS = 4  # of a row at one layer that a captured step has room for, at least
SHORTEST = 256  # columns of a captured step's cache, at least
DIRECTIONS = 64  # in a captured step's bank, at least
KEPT = 2  # captured steps that wait for another batch: a whole one, and a list's last, smaller one

Capture = Callable[[Callable[[], None]], Callable[[], None]]  # runs it -> what runs it again


class CudaGraphs:
    """Captures on the current device. Graphs share their memory: they are replayed by turns."""

    def __init__(self):
        self.lock, self.places = threading.Lock(), {}  # of each GPU: pool, stream, living graphs

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        device = torch.cuda.current_device()
        with self.lock:  # a pool takes one capture at a time
            pool, stream, living = self.places.get(device, (None, None, ()))
            if not living:  # a pool whose graphs are all gone takes no other
                pool, living = torch.cuda.graph_pool_handle(), weakref.WeakSet()
                stream = stream or torch.cuda.Stream()
                self.places[device] = pool, stream, living
            run()  # what is compiled, loaded or allocated only once, is before
            graph = torch.cuda.CUDAGraph()
            settings = {"stream": stream, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(graph, pool, **settings):
                run()
            living.add(graph)
        return graph.replay


class Variant(NamedTuple):
    """What of a captured step is no tensor's content, besides its rows and columns."""

    edits: int  # of a row at one layer, at most; 0: nothing is steered
    directions: int  # in the bank, at most
    sampling: str  # Sampler.kind, or "greedy"
    fused: bool  # by the kernels; False: by PyTorch's operations


def on_its_device(method: Callable) -> Callable:
    """Streams, events and graphs are the current GPU's: have it be the step's own."""

    @functools.wraps(method)
    def inside(self, *arguments, **options):
        if self.device.type != "cuda":
            return method(self, *arguments, **options)
        with torch.cuda.device(self.device):
            return method(self, *arguments, **options)

    return inside


def place_of(decoder: Decoder) -> int:
    """What changes when weights move, as they do when others take their place."""
    return hash(tuple((p.data_ptr(), p.dtype) for p in decoder.parameters()))


class Step:
    """A batch that is being decoded: `begin` runs its prompts, each call a step.

    Without `capture` it is made for one batch and runs as it is. With it the sizes are those of
    the graphs: later batches may have fewer rows and need fewer columns.
    """

    def __init__(self, decoder: Decoder, rows: int, length: int, capture: Capture | None = None):
        self.decoder, self.capture = decoder, capture
        self.rows, self.length = rows, length
        self.device, self.dtype = decoder.embed.weight.device, decoder.embed.weight.dtype
        self.place = place_of(decoder)
        self.lag = int(self.device.type == "cuda")  # steps that run ahead of what is read
        with torch.device(self.device):
            self.tokens = torch.zeros(rows, 1, dtype=torch.long)
            self.chosen, self.left = torch.zeros(2, rows, dtype=torch.long)  # left: still allowed
            self.stops = torch.zeros(decoder.config.vocab_size, dtype=torch.bool)
        self.cache = Cache(decoder, torch.full((rows,), length), 1, length)
        self.steering: dict[tuple[int, int], Fixed] = {}
        self.samplers: dict[str, Sampler] = {}
        self.graphs: dict[Variant, Callable[[], None]] = {}

    @on_its_device
    def begin(
        self,
        tokens: Tensor,
        start: Tensor,
        limits: Sequence[int],
        stop_ids: frozenset[int] = frozenset(),
        edits: Sequence[Sequence[Edit]] = (),
        sampler: Sampler | None = None,
        fused: bool = True,
    ) -> None:
        """Run prompts (n, T) from column start (n,) on and choose what follows each.

        limits: of new tokens, one a row. Rows beyond n hold nothing.
        """
        (n, T), spare = tokens.shape, self.rows - len(tokens)
        assert spare >= 0, (n, self.rows)
        assert T + max(limits) <= self.length, (T, limits, self.length)
        limits = torch.tensor([*limits, *[0] * spare])
        start = torch.cat((start, torch.full((spare,), self.length)))
        self.cache.begin(start, T, T - start + limits)
        self.left.copy_(limits)
        self.stops.zero_()[[i for i in stop_ids if i < len(self.stops)]] = True
        self.n, self.fused, self.edits = n, fused, None
        self.sampler = self._sampler(sampler)
        self.steer(edits)
        with use_kernels(fused):
            part, steer = self.cache.part(n), self.seam
            steer = steer.part(n) if isinstance(steer, Fixed) else steer
            x = self.decoder.prefill(tokens.to(self.device), part, steer)
            self.cache.filled = part.filled
            if self.capture is not None:  # from here on the columns are counted on the device
                self.cache.filled, self.cache.block = 0, self.length
            self._choose(torch.cat((x, x.new_zeros(spare, *x.shape[1:]))))

    @on_its_device
    def steer(self, edits: Sequence[Sequence[Edit]]) -> None:
        """Edits for the steps to come, a list a row: other tables' contents, no other graph."""
        if self.edits is None or not alike(edits, self.edits):
            self.seam, self.size = self._steering(edits)
            self.edits = edits

    def _steering(self, edits: Sequence[Sequence[Edit]]) -> tuple[Seam, tuple[int, int]]:
        if not any(edits):
            return unsteered, (0, 0)
        if self.capture is None:
            return seam(edits, self.device, self.dtype), (0, 0)
        capacity, spare = rounded(max(depth(edits), EDITS)), self.rows - len(edits)
        directions = {direction_key(edit.direction) for row in distinct(edits) for edit in row}
        size = capacity, rounded(max(len(directions), DIRECTIONS))
        if size not in self.steering:
            sizes = self.decoder.config, self.rows, *size
            self.steering[size] = Fixed(*sizes, self.device, self.dtype)
        self.steering[size].copy_([*edits, *[[]] * spare])
        return self.steering[size], size

    def _sampler(self, new: Sampler | None) -> Sampler | None:
        if new is None or self.capture is None:
            return new
        if new.kind not in self.samplers:
            self.samplers[new.kind] = new.empty(self.rows, self.length)
        return self.samplers[new.kind].copy_(new)

    @on_its_device
    def __call__(self) -> None:
        """One token more for each row that is not done."""
        if self.capture is None:
            return self._run()
        kind = self.sampler.kind if self.sampler else "greedy"
        variant = Variant(*self.size, kind, self.fused)
        if variant in self.graphs:
            self.graphs[variant]()
        else:
            self.graphs[variant] = self.capture(self._run)
        return None

    def _run(self) -> None:
        with use_kernels(self.fused):
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

    @on_its_device
    def end(self, row: int) -> None:
        """The host has seen enough of a row."""
        self.left[row] = 0

    @on_its_device
    def read(self) -> Callable[[], list[int]]:
        """The last tokens chosen, on their way to the host: call the result to wait for them.

        A row that is done has NOTHING there, one whose logits are not finite BROKEN.
        """
        chosen = self.chosen[: self.n]
        if not chosen.is_cuda:
            return chosen.clone().tolist
        host = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
        host.copy_(chosen, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def wait() -> list[int]:
            arrived.synchronize()
            return host.tolist()

        return wait


def rounded(n: int) -> int:
    """Up to a power of two."""
    return 1 << (n - 1).bit_length()


def rounded_rows(n: int) -> int:
    """Up to 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: at most a third of a step's rows are idle."""
    whole = rounded(n)
    return whole * 3 // 4 if whole > 2 and n <= whole * 3 // 4 else whole


class Steps:
    """A decoder's captured steps, kept for the batches to come. `captured` counts graphs.

    capture: how to make one, of a decoder that is not on a GPU; default not at all.
    """

    def __init__(self, decoder: Decoder, capture: Capture | None = None):
        self.decoder, self.captured = decoder, 0
        self.graphs: Capture = capture or CudaGraphs()
        self.anywhere = capture is not None
        self.free: list[Step] = []
        self.lock = threading.Lock()

    def clear(self) -> None:
        """Let go of the steps that wait, and of their memory."""
        with self.lock:
            self.free.clear()

    @contextmanager
    def take(self, rows: int, length: int, graph: bool = True) -> Iterator[Step]:
        """A step with room for so many rows and columns, for one batch alone at a time."""
        if not graph or not (self.anywhere or self.decoder.embed.weight.is_cuda):
            yield Step(self.decoder, rows, length)
            return
        rows, context = rounded_rows(rows), self.decoder.config.context_length
        length = max(min(rounded(max(length, SHORTEST)), context), length)
        step = self._kept(rows, length) or self._made(rows, length)
        try:
            yield step
        finally:
            with self.lock:
                self.free = [step, *self.free][:KEPT]

    def _kept(self, rows: int, length: int) -> Step | None:
        place = place_of(self.decoder)
        with self.lock:
            self.free = [step for step in self.free if step.place == place]
            for i, step in enumerate(self.free):
                if (step.rows, step.length) == (rows, length):
                    return self.free.pop(i)
            del self.free[KEPT - 1 :]  # before there is another cache beside theirs
        return None

    def _made(self, rows: int, length: int) -> Step:
        try:
            return Step(self.decoder, rows, length, self._capture)
        except torch.OutOfMemoryError:
            self.clear()
            return Step(self.decoder, rows, length, self._capture)

    def _capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        return self.graphs(run)
