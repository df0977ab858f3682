"""Memory, graphs, streams and threads, on a machine that may have no GPU: torch.cuda is a fake."""

import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from dispatch import Tape

from tinysteer.decoding import pool, step
from tinysteer.decoding.pool import CudaGraphs, DecodingPool
from tinysteer.decoding.sampling import Sampler

PROMPTS = ["short", "a somewhat longer prompt", "x"]
OPTIONS = {"chat": False, "max_new_tokens": 8}


class Gpus:
    """What of torch.cuda is used, of any number of GPUs, and a log of it."""

    def __init__(self):
        self.log, self.index, self.n_pools, self.capturing = [], 0, 0, []
        self.default = {0: self.Stream("caller's 0"), 1: self.Stream("caller's 1")}
        self.current = dict(self.default)

    def Stream(self, name=None):  # noqa: N802
        stream = SimpleNamespace(device=self.index, name=name or f"own {self.index}")
        stream.wait_stream = lambda other: self.log.append(f"{stream.name} waits for {other.name}")
        return stream

    def CUDAGraph(self):  # noqa: N802
        class Graph:
            def replay(graph):  # noqa: N805
                self.log.append(f"replay on {self.current_stream().name}")

        return Graph()

    def Event(self):  # noqa: N802
        return SimpleNamespace(
            record=lambda: self.log.append("told"), synchronize=lambda: self.log.append("waited")
        )

    def graph_pool_handle(self):
        self.n_pools += 1
        return self.n_pools

    def current_device(self):
        return self.index

    def current_stream(self):
        return self.current[self.index]

    @contextmanager
    def device(self, device):
        before, self.index = self.index, torch.device(device).index
        yield
        self.index = before

    @contextmanager
    def stream(self, stream):
        before, self.current[stream.device] = self.current[stream.device], stream
        yield
        self.current[stream.device] = before

    @contextmanager
    def graph(self, graph, handle, stream, capture_error_mode):
        assert stream.device == self.index
        assert not self.capturing, "two captures at once"
        self.capturing.append(graph)
        self.log.append(f"capture in {handle} on {stream.name}")
        yield
        self.capturing.remove(graph)


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.setattr(torch, "cuda", gpus := Gpus())
    return gpus


def test_graphs_share_a_pool_but_none_that_all_graphs_have_left(gpus):
    graphs = CudaGraphs()
    first = graphs(lambda: None)
    second = graphs(lambda: None)
    del first
    third = graphs(lambda: None)
    del second, third
    graphs(lambda: None)
    assert [line.split(" on ")[0] for line in gpus.log] == [
        *["capture in 1"] * 3,
        "capture in 2",
    ]


def test_a_capture_that_failed_leaves_no_pool_that_takes_no_other(gpus):
    graphs, runs = CudaGraphs(), []

    def scarce():
        runs.append(1)
        if len(runs) == 2:
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        graphs(scarce)
    gpus.capturing.clear()
    graphs(scarce)
    assert gpus.log == ["capture in 1 on own 0", "capture in 2 on own 0"]


def test_each_gpu_has_a_pool_and_a_stream_of_its_own(gpus):
    graphs, kept = CudaGraphs(), []
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        with graphs.on_stream(torch.device(device)):
            kept.append(graphs(lambda: None))
    captures = [line for line in gpus.log if "capture" in line]
    assert captures == [f"capture in {n} on own {i}" for n, i in ((1, 0), (2, 1), (1, 0))]


def test_two_threads_never_capture_at_once_nor_use_a_stream_that_is_captured(gpus):
    graphs, errors, kept = CudaGraphs(), [], []

    def capture():
        try:
            kept.append(graphs(lambda: time.sleep(0.01)))
            with graphs.on_stream(torch.device("cuda:0")):
                time.sleep(0.015)
                assert not gpus.capturing
        except AssertionError as error:
            errors.append(error)

    threads = [threading.Thread(target=capture) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(kept) == 4


class OnAGpu(step.Decoding):
    """A step that takes itself to be on a GPU, for the fake."""

    device = property(lambda self: torch.device("cuda:1"), lambda self, device: None)


def test_all_work_is_on_the_pools_stream_which_waits_and_is_waited_for(model, gpus, monkeypatch):
    monkeypatch.setattr(pool, "Decoding", OnAGpu)
    decodings = DecodingPool(model.decoder)
    decodings.capture = decodings.graphs
    prefill, choose = model.decoder.prefill, OnAGpu._choose
    told = lambda what: gpus.log.append(f"{what} on {gpus.current_stream().name}")  # noqa: E731
    monkeypatch.setattr(model.decoder, "prefill", lambda *a: (told("prompts"), prefill(*a))[1])
    monkeypatch.setattr(OnAGpu, "_choose", lambda self, x: (told("choice"), choose(self, x))[1])
    allocate = step.Cache
    monkeypatch.setattr(step, "Cache", lambda *a: (told("memory"), allocate(*a))[1])

    def logged(call, *arguments):
        gpus.log.clear()
        call(*arguments)
        first, *inside, last = gpus.log
        assert (first, last) == ("own 1 waits for caller's 1", "caller's 1 waits for own 1")
        assert (gpus.index, gpus.current) == (0, gpus.default)
        return inside

    with decodings.take(1, 40) as taken:
        assert gpus.log == [
            "own 1 waits for caller's 1",
            "memory on own 1",
            "caller's 1 waits for own 1",
        ]
        begin = [step.Batch(torch.tensor([[5, 6, 7]]), torch.tensor([0]), [4]), [[]]]
        assert logged(taken.begin, *begin) == ["prompts on own 1", "choice on own 1"]
        captured = ["choice on own 1", "capture in 1 on own 1", "choice on own 1"]
        assert logged(taken) == captured
        assert logged(taken) == ["replay on own 1"]
        assert logged(taken.read) == logged(taken.end, 0) == []
    assert decodings.captured == 1


class OnACard(torch.Tensor):
    is_cuda = True


def test_tokens_are_read_into_the_hosts_memory_and_waited_for(model, gpus, monkeypatch):
    taken = step.Decoding(model.decoder, 2, 40)
    batch = step.Batch(torch.tensor([[5, 6], [7, 8]]), torch.tensor([0, 0]), [4, 4])
    taken.begin(batch, [[], []])
    expected = taken.read()()
    taken.chosen = taken.chosen.as_subclass(OnACard)
    wait = taken.read()
    assert gpus.log == ["told"]
    assert wait() == expected
    assert gpus.log == ["told", "waited"]


def test_weights_at_the_same_address_of_another_gpu_are_others():
    def key(device):
        weight = SimpleNamespace(
            device=torch.device(device), dtype=torch.float32, data_ptr=lambda: 64
        )
        return step.weights_key(SimpleNamespace(parameters=lambda: [weight]))

    assert key("cuda:0") == key("cuda:0") != key("cuda:1")


class Scarce:
    """Stands for a function: does its work, then lacks memory, as often as is said."""

    def __init__(self, function, times):
        self.function, self.times = function, times

    def __call__(self, *arguments):
        result = self.function(*arguments)
        self.times -= 1
        if self.times >= 0:
            raise torch.OutOfMemoryError
        return result


def in_prompts(model, monkeypatch, times):
    monkeypatch.setattr(model.decoder, "prefill", Scarce(model.decoder.prefill, times))


def in_draws(model, monkeypatch, times):
    scarce = Scarce(Sampler.__call__, times)
    monkeypatch.setattr(Sampler, "__call__", lambda self, logits: scarce(self, logits))


def in_capture(model, monkeypatch, times):
    model.pool.capture = Scarce(Tape, times)


def in_first_run(model, monkeypatch, times):
    whole = model.decoder.forward
    scarce = Scarce(whole, times)
    forward = lambda x, *a: (whole if x.shape[1] > 1 else scarce)(x, *a)  # noqa: E731
    monkeypatch.setattr(model.decoder, "forward", forward)


SHORTAGES = {
    "in the prompts": in_prompts,
    "in the first draws": in_draws,
    "in a first run": in_first_run,
    "in a capture": in_capture,
}


@pytest.mark.parametrize("shortage", SHORTAGES)
def test_a_shortage_of_memory_clears_the_pool_and_is_tried_again(shortage, model, monkeypatch):
    options = OPTIONS | {"temperature": 1.5, "seed": [3, 1, 4]}
    text = model.complete(PROMPTS, **options)
    model.pool = DecodingPool(model.decoder, capture=Tape)
    model.complete(PROMPTS[:1], **OPTIONS)  # a step that waits
    assert [waiting.rows for waiting in model.pool.free] == [1]
    SHORTAGES[shortage](model, monkeypatch, 1)
    assert model.complete(PROMPTS, **options) == text
    assert [waiting.rows for waiting in model.pool.free] == [3]
    monkeypatch.undo()
    model.pool = DecodingPool(model.decoder, capture=Tape)
    SHORTAGES[shortage](model, monkeypatch, 2)
    with pytest.raises(torch.OutOfMemoryError):
        model.complete(PROMPTS, **options)


def test_a_step_without_a_graph_draws_anew_after_a_shortage(model, monkeypatch):
    options = OPTIONS | {"temperature": 1.5, "seed": [3, 1, 4]}
    text = model.complete(PROMPTS, **options)
    in_draws(model, monkeypatch, 1)
    assert model.complete(PROMPTS, **options) == text


def test_what_is_read_arrives_in_memory_made_once(model):
    taken = step.Decoding(model.decoder, 2, 40)
    batch = step.Batch(torch.tensor([[5, 6], [7, 8]]), torch.tensor([0, 0]), [9, 9])
    made = {t.data_ptr() for pair in [next(taken.host) for _ in range(9)] for t in pair}
    taken.begin(batch, [[], []])
    reads = [taken.read()]
    for _ in range(taken.lag + 1):
        taken()
        reads.append(taken.read())
    tokens = [read()[0] for read in reads]
    assert tokens[0] != tokens[1]  # none was written over before it was waited for
    assert len(made) == 2 * (taken.lag + 2)


def test_steps_are_dropped_only_while_no_other_thread_can_capture(model):
    """Memory that is freed then would leave a mark in the graph."""
    decodings, owned = DecodingPool(model.decoder, capture=Tape), []

    class Waiting:
        key, rows, length = 0, 9, 9

        def __del__(self):
            owned.append(decodings.graphs.lock._is_owned())

    decodings.free = [Waiting()]
    with decodings.take(1, 40):
        assert owned == [True]  # of other weights
    decodings.free += [Waiting(), Waiting()]
    for waiting in decodings.free[1:]:
        waiting.key = decodings.free[0].key
    del waiting
    with decodings.take(3, 40):
        assert owned == [True] * 3
    decodings.free = [Waiting()]
    decodings.clear()
    assert owned == [True] * 4
