"""The ops as PyTorch sees them: schemas, fakes, torch.compile, and CUDA graphs where a GPU is."""

import pytest
import torch
from device import DEVICE
from dispatch import Calls
from test_edits import case
from tinysteer_kernels import Edit, add_steer_norm, compile_edits, residual, steer
from tinysteer_kernels import edits as editing
from tinysteer_kernels.checks import check_edits, check_surroundings
from tinysteer_kernels.devices import HAS_TRITON
from torch._subclasses.fake_tensor import FakeTensorMode

ROW = (Edit(0, bias=2.0), Edit(1, slope=1.0), Edit(2, bias=1.0, first=1))


def inputs(T=3):
    """x, delta, weight, bank, edits, position."""
    x, bank, edits, position = case(*ROW, B=2, T=T)
    return x, torch.randn_like(x), torch.randn(16, device=DEVICE), bank, edits, position


def decoder_end(x, delta, weight, bank, edits, position):
    """Both ops between ordinary ones."""
    x = steer(x * 2, bank, edits, position)
    x, y = add_steer_norm(x, delta, weight, 1e-6, bank=bank, edits=edits, position=position)
    return x + 1, y * 2


@pytest.mark.parametrize("with_position", [True, False], ids=["position", "no position"])
def test_steer_keeps_the_rules_of_custom_ops(with_position):
    x, _, _, bank, edits, position = inputs()
    torch.library.opcheck(editing.op, (x, bank, list(edits), position if with_position else None))


@pytest.mark.parametrize("steered", [True, False], ids=["steered", "plain"])
def test_add_steer_norm_keeps_the_rules_of_custom_ops(steered):
    x, delta, weight, bank, edits, position = inputs()
    steering = (bank, list(edits), position) if steered else (None, [], None)
    torch.library.opcheck(residual.op, (x, delta, weight, 1e-6, 1.0, weight, *steering))


def test_torch_compile_takes_both_whole():
    tensors = inputs()
    expected = decoder_end(*tensors)
    compiled = torch.compile(decoder_end, fullgraph=True)
    for result, right in zip(compiled(*tensors), expected, strict=True):
        torch.testing.assert_close(result, right)
    tensors[4].bias.mul_(3.0)  # a table's contents are no constant of the graph
    for result, right in zip(compiled(*tensors), decoder_end(*tensors), strict=True):
        torch.testing.assert_close(result, right)


def test_both_stay_in_the_graph_that_a_backend_gets():
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compile(decoder_end, backend=backend, fullgraph=True)(*inputs())
    assert "tinysteer_kernels.steer.default" in seen
    assert "tinysteer_kernels.add_steer_norm.default" in seen


def test_fakes_have_the_shapes_of_results_and_need_no_values():
    tensors = inputs()
    with FakeTensorMode() as mode:
        fake = [
            type(t)(*map(mode.from_tensor, t)) if isinstance(t, tuple) else mode.from_tensor(t)
            for t in tensors
        ]
        x, y = decoder_end(*fake)
    assert x.shape == y.shape == (2, 3, 16)


@pytest.mark.skipif(not HAS_TRITON, reason="there is no Triton here")
@pytest.mark.parametrize("T", [1, 3])
def test_a_launch_reads_nothing_and_allocates_nothing_but_its_results(T, monkeypatch):
    x, delta, weight, bank, edits, position = inputs(T)

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: None

    monkeypatch.setattr(editing, "steer_kernel", Kernel())
    monkeypatch.setattr(residual, "add_steer_norm_kernel", Kernel())
    with Calls() as calls:
        check_edits(x, bank, edits, position)
        editing.launch(x, bank, edits, position)
    assert calls.names == []
    with Calls() as calls:
        check_surroundings(x, delta, weight, None)
        residual.launch(x, delta, weight, 1e-6, 0.0, None, bank, edits, position)
    assert calls.names == ["aten.new_empty.default"] * 2


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need TINYSTEER_TEST_DEVICE=cuda")
def test_a_captured_graph_follows_its_tables():
    tensors = x, _, _, bank, tables, _ = inputs(T=1)
    idle = compile_edits(bank, [[], []], capacity=4)
    active = tables._replace(**{k: v.clone() for k, v in tables._asdict().items()})
    tables.copy_(idle)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        decoder_end(*tensors)  # compiles: nothing may be loaded while capturing
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = decoder_end(*tensors)
    other = compile_edits(bank, [[Edit(2, bias=-3.0)], []], capacity=4)
    for contents in (idle, active, other, idle):
        tables.copy_(contents)
        x.normal_()
        graph.replay()
        for result, right in zip(results, decoder_end(*tensors), strict=True):
            torch.testing.assert_close(result, right)
