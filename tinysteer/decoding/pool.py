"""Captured steps, kept for the batches to come: their sizes, their graphs, their memory."""

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from tinysteer.decoding.step import Capture, Decoding, Means, twice, weights_key
from tinysteer.model.decoder import Decoder
from tinysteer.steering.batch import rounded

SHORTEST = 256  # columns of a captured step's cache, at least
KEPT = 2  # captured steps that wait for another batch: a whole one, and a list's last, smaller one


class CudaGraphs:
    """Captures steps, and lends each GPU's stream that all work of theirs is done on.

    Graphs share their memory, so they are replayed by turns: on one stream, in order. One thread
    at a time, as a stream that is captured takes into the graph whatever it is asked to do.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self.streams = defaultdict(torch.cuda.Stream)  # of each GPU
        self.pools: dict[int, tuple] = {}  # of each GPU: a handle, the graphs that live in it

    @contextmanager
    def on_stream(self, device: torch.device) -> Iterator[None]:
        """In it a GPU's own stream is the current one: after the caller's, which then waits for it.

        So a caller's tensors may be read in it and freed behind it.
        """
        with self.lock, torch.cuda.device(device):
            own = self.streams[torch.cuda.current_device()]
            callers = torch.cuda.current_stream()
            own.wait_stream(callers)
            try:
                with torch.cuda.stream(own):
                    yield
            finally:
                callers.wait_stream(own)

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run it on the current GPU and capture it -> what replays it there."""
        with self.lock:
            run()  # what is compiled, loaded or allocated only once, is before
            device, graph = torch.cuda.current_device(), torch.cuda.CUDAGraph()
            handle, graphs = self.pools.get(device, (None, ()))
            living = [*graphs]  # none may go before this one is captured
            if not living:  # PyTorch takes no pool again whose graphs are all gone
                handle, graphs = torch.cuda.graph_pool_handle(), weakref.WeakSet()
                self.pools[device] = handle, graphs
            settings = {"stream": self.streams[device], "capture_error_mode": "thread_local"}
            with torch.cuda.graph(graph, handle, **settings):
                run()
            graphs.add(graph)
        return graph.replay


def rounded_rows(n: int) -> int:
    """Up to 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: at most a third of a step's rows are idle."""
    whole = rounded(n)
    return whole * 3 // 4 if whole > 2 and n <= whole * 3 // 4 else whole


class DecodingPool:
    """A decoder's captured steps, kept for the batches to come. `captured` counts graphs.

    capture: how to make one; default CUDA graphs of a decoder on a GPU, and none elsewhere.
    """

    def __init__(self, decoder: Decoder, capture: Capture | None = None):
        self.decoder, self.capture, self.captured = decoder, capture, 0
        self.graphs = CudaGraphs()
        self.free: list[Decoding] = []
        self.lock = threading.Lock()

    def clear(self) -> None:
        """Let go of the steps that wait, and of their memory."""
        with self.graphs.lock, self.lock:
            self.free.clear()

    @contextmanager
    def take(self, rows: int, length: int, graph: bool = True) -> Iterator[Decoding]:
        """A step with room for so many rows and columns, for one batch alone at a time.

        torch.OutOfMemoryError where memory is too short even without those that wait.
        """
        if not graph or not (self.capture or self.decoder.embed.weight.is_cuda):
            yield self._made(rows, length, Means(clear=self.clear))
            return
        rows, context = rounded_rows(rows), self.decoder.config.context_length
        length = max(min(rounded(max(length, SHORTEST)), context), length)
        step = self._kept(rows, length)
        means = Means(self._captured, self.graphs.on_stream, self.clear)
        step = step or self._made(rows, length, means)
        try:
            yield step
        finally:
            with self.graphs.lock, self.lock:  # none is freed while another thread captures
                self.free = [step, *self.free][:KEPT]

    def _kept(self, rows: int, length: int) -> Decoding | None:
        key = weights_key(self.decoder)
        with self.graphs.lock, self.lock:
            self.free = [step for step in self.free if step.key == key]
            sizes = [(step.rows, step.length) for step in self.free]
            if (rows, length) in sizes:
                return self.free.pop(sizes.index((rows, length)))
            del self.free[KEPT - 1 :]  # before there is another cache beside theirs
        return None

    def _made(self, rows: int, length: int, means: Means) -> Decoding:
        return twice(lambda: Decoding(self.decoder, rows, length, means), self.clear)

    def _captured(self, run: Callable[[], None]) -> Callable[[], None]:
        replay = (self.capture or self.graphs)(run)
        self.captured += 1
        return replay
