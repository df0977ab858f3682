"""The ops as PyTorch sees them: schemas, fakes, torch.compile, export, and CUDA graphs on a GPU."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tinysteer_kernels
import torch
import torch.nn.functional as F
from device import DEVICE
from dispatch import Calls
from test_steering import case
from tinysteer_kernels import Move, MoveTables, add_steer_norm, compile_moves, residual, steer
from tinysteer_kernels import steering as steering_module
from tinysteer_kernels.checks import check_residual, check_steering, check_stream
from tinysteer_kernels.decode import View, attend, gated
from tinysteer_kernels.devices import HAS_TRITON
from torch._subclasses.fake_tensor import FakeTensorMode

ROW = (Move(0, bias=2.0), Move(1, slope=1.0), Move(2, bias=1.0, first=1))


def inputs(T=3):
    """x, delta, weight, bank, tables, position, slot."""
    x, bank, tables, position = case(*ROW, B=2, T=T)
    slot = torch.tensor([1, -1], dtype=torch.int32, device=DEVICE)
    return x, torch.randn_like(x), torch.randn(16, device=DEVICE), bank, tables, position, slot


def decoder_end(x, delta, weight, bank, tables, position, slot):
    """Both ops between ordinary ones."""
    x = steer(x * 2, bank, tables, position)
    steering = {"bank": bank, "tables": tables, "position": position, "slot": slot}
    x, y = add_steer_norm(x, delta, weight, 1e-6, **steering)
    return x + 1, y * 2


@pytest.mark.parametrize("optional", [True, False], ids=["position and slot", "neither"])
def test_steer_keeps_the_rules_of_custom_ops(optional):
    x, _, _, bank, tables, *given = inputs()
    given = given if optional else (None, None)
    torch.library.opcheck(steering_module.steer_op, (x, bank, tables.packed, *given))


@pytest.mark.parametrize("steered", [True, False], ids=["steered", "plain"])
def test_add_steer_norm_keeps_the_rules_of_custom_ops(steered):
    x, delta, weight, bank, tables, position, slot = inputs()
    steering = (bank, tables.packed, position, slot) if steered else (None,) * 4
    arguments = x, delta, weight, 1e-6, 1.0, weight, *steering
    torch.library.opcheck(residual.add_steer_norm_op, arguments)


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


@pytest.mark.parametrize("trained", ["bank", "bank and weight"])
def test_torch_compile_takes_parameters(trained):
    """A bank that is one leaves no trace; a weight that is one has its gradient."""
    x, delta, weight, bank, *rest = inputs()
    bank = torch.nn.Parameter(bank)
    weight = torch.nn.Parameter(weight) if "weight" in trained else weight
    expected = decoder_end(x, delta, weight, bank, *rest)
    result = torch.compile(decoder_end, fullgraph=True)(x, delta, weight, bank, *rest)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert result[1].requires_grad == ("weight" in trained)
    if "weight" in trained:
        (result,) = torch.autograd.grad(result[1].sum(), weight)
        (expected,) = torch.autograd.grad(expected[1].sum(), weight)
        torch.testing.assert_close(result, expected)


class End(torch.nn.Module):
    def forward(self, x, delta, weight, bank, tables, position, slot):
        return decoder_end(x, delta, weight, bank, tables, position, slot)


def test_an_export_takes_tables_and_any_number_of_rows_and_can_be_saved(tmp_path):
    B = torch.export.Dim("B", min=1, max=64)
    first, none = {0: B}, None
    shapes = first, first, none, none, [first], first, first
    exported = torch.export.export(End(), inputs(), dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "end.pt2")
    loaded = torch.export.load(tmp_path / "end.pt2").module()
    x, bank, tables, position = case(*ROW, B=5)
    slot = torch.tensor([4, -1, 0, 2, 2], dtype=torch.int32, device=DEVICE)
    tensors = x, x.flip(0), torch.ones(16, device=DEVICE), bank, tables, position, slot
    for result, right in zip(loaded(*tensors), decoder_end(*tensors), strict=True):
        torch.testing.assert_close(result, right)


def on(tensors, move):
    return [MoveTables(move(t.packed)) if isinstance(t, MoveTables) else move(t) for t in tensors]


def test_fakes_have_the_shapes_of_results_and_need_no_values():
    mode, tensors = FakeTensorMode(), inputs()
    tensors = on(tensors, mode.from_tensor)
    with mode:
        x, y = decoder_end(*tensors)
    assert x.shape == y.shape == (2, 3, 16)


def test_meta_tensors_have_the_shapes_of_results():
    x, y = decoder_end(*on(inputs(), lambda tensor: tensor.to("meta")))
    assert x.shape == y.shape == (2, 3, 16)


VMAPPED = {
    "steer": lambda x, delta, weight, bank, tables, position, slot: steer(x, bank, tables),
    "add_steer_norm": lambda x, delta, weight, *_: add_steer_norm(x, delta, weight, 1e-6),
    "gated": lambda x, *_: gated(x, "silu"),
}


@pytest.mark.parametrize("name", VMAPPED)
def test_vmap_is_told_that_there_is_no_rule_and_what_to_do(name):
    x, delta, *rest = inputs()
    batch = torch.stack([x, x]), torch.stack([delta, delta])
    with pytest.raises(RuntimeError, match=rf"^{name} has no rule.*flatten\(0, 1\)"):
        torch.vmap(lambda x, delta: VMAPPED[name](x, delta, *rest))(*batch)


def test_gradients_of_torch_func_go_through_the_formula():
    x, delta, weight, *_ = inputs()
    norm = lambda x: add_steer_norm(x, delta, weight, 1e-6)[1].square().sum()  # noqa: E731
    expected = torch.autograd.grad(norm(x.requires_grad_()), x)[0]
    torch.testing.assert_close(torch.func.grad(norm)(x.detach()), expected)


def test_only_who_traces_pays_for_the_dispatcher(monkeypatch):
    """An eager call checks and runs; under a dispatch mode it is the op that is seen."""
    x, delta, weight, bank, tables, position, slot = inputs()
    calls = []
    for module, name in ((steering_module, "steer_op"), (residual, "add_steer_norm_op")):
        monkeypatch.setattr(module, name, lambda *_, name=name: calls.append(name) or (x, x))
    decoder_end(x, delta, weight, bank, tables, position, slot)
    assert not calls
    with Calls():
        decoder_end(x, delta, weight, bank, tables, position, slot)
    assert calls == ["steer_op", "add_steer_norm_op"]


@pytest.mark.skipif(not HAS_TRITON, reason="there is no Triton here")
@pytest.mark.parametrize("T", [1, 3])
def test_a_launch_reads_nothing_and_allocates_nothing_but_its_results(T, monkeypatch):
    x, delta, weight, bank, tables, position, slot = inputs(T)

    class Kernel:
        def __getitem__(self, grid):
            return lambda *positional, **named: None

    monkeypatch.setattr(steering_module, "steer_kernel", Kernel())
    monkeypatch.setattr(residual, "add_steer_norm_kernel", Kernel())
    with Calls() as calls:
        check_stream(x)
        check_steering(x, bank, tables, position, slot)
        steering_module.steer_launch(x, bank, tables, position, slot)
    assert calls.names == []
    with Calls() as calls:
        check_residual(x, delta, weight, None)
        steering = bank, tables, position, slot
        residual.add_steer_norm_launch(x, delta, weight, 1e-6, 0.0, None, *steering)
    assert calls.names == ["aten.new_empty.default"] * 2


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need TINYSTEER_TEST_DEVICE=cuda")
def test_a_captured_graph_follows_its_tables():
    tensors = x, _, _, bank, tables, _, slot = inputs(T=1)
    idle = compile_moves(bank, [[], []], capacity=4)
    active = MoveTables(tables.packed.clone())
    tables.copy_(idle)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        decoder_end(*tensors)  # compiles: nothing may be loaded while capturing
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = decoder_end(*tensors)
    other = compile_moves(bank, [[Move(2, bias=-3.0)], []], capacity=4)
    for contents in (idle, active, other, idle):
        tables.copy_(contents)
        slot.copy_(slot.flip(0))
        x.normal_()
        graph.replay()
        for result, right in zip(results, decoder_end(*tensors), strict=True):
            torch.testing.assert_close(result, right)


VENDORED = """
import torch
from outer.lib.tinysteer_kernels import Move, add_steer_norm, compile_moves, steer

bank, x = torch.eye(2, 8), torch.zeros(1, 1, 8)
tables = compile_moves(bank, [[Move(1, bias=2.0)]])


def both(x):
    x = steer(x + 0, bank, tables)
    return add_steer_norm(x, x, x[0, 0], 1e-6, bank=bank, tables=tables)[0]


right = 6 * bank[1]
assert torch.equal(both(x)[0, 0], right)
seen = []
backend = lambda graph, _: seen.extend(str(n.target) for n in graph.graph.nodes) or graph.forward
assert torch.equal(torch.compile(both, backend=backend, fullgraph=True)(x)[0, 0], right)
assert "outer_lib_tinysteer_kernels.steer.default" in seen
import tinysteer_kernels  # beside which the other still works

assert torch.equal(both(x)[0, 0], right)
"""


def test_the_package_can_live_below_another_one(tmp_path):
    package = Path(tinysteer_kernels.__file__).parent
    shutil.copytree(package, tmp_path / "outer/lib/tinysteer_kernels")
    script = tmp_path / "script.py"
    script.write_text(VENDORED)
    run = {"capture_output": True, "text": True, "check": False, "cwd": tmp_path}
    done = subprocess.run([sys.executable, script], **run)
    assert done.returncode == 0, done.stderr


def test_the_front_door_shows_steering_alone():
    names = {"PADDING", "Move", "MoveTables", "add_steer_norm", "compile_moves", "naive", "steer"}
    assert set(tinysteer_kernels.__all__) == names
    modules = {path.stem for path in Path(tinysteer_kernels.__file__).parent.rglob("*.py")}
    functions = {n for n in names if callable(getattr(tinysteer_kernels, n))}
    assert not modules & (functions | {"attend", "gated", "rms_norm", "use_kernels"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_derivatives_are_the_backward_ones(dtype):
    bank = F.normalize(torch.randn(2, 6), dim=-1)
    tables = compile_moves(bank, [[Move(0, slope=1.0), Move(1, bias=2.0, slope=0.5)]])
    weight = torch.randn(6)

    def whole(x):
        x = x.float()
        h, y = add_steer_norm(x, 2 * x, weight, 1e-6, bank=bank, tables=tables)
        return gated(torch.cat((steer(h.clone(), bank, tables), y), dim=-1), "silu").to(dtype)

    x = torch.randn(1, 2, 6, dtype=dtype)
    backward = torch.func.jacrev(whole)(x)
    assert backward.abs().max() > 0.1
    torch.testing.assert_close(torch.func.jacfwd(whole)(x), backward, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not HAS_TRITON, reason="there is no Triton here")
def test_autograd_is_told_of_what_a_launch_writes(monkeypatch):
    monkeypatch.setattr(steering_module, "fits", lambda *_: True)
    bank = F.normalize(torch.randn(1, 8, device=DEVICE), dim=-1)
    x, w = torch.randn(1, 3, 8, device=DEVICE), torch.randn(8, requires_grad=True, device=DEVICE)
    y = x * w
    steer(x, bank, compile_moves(bank, [[Move(0, bias=3.0)]]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_no_directions_and_no_rows_move_nothing():
    x, bank = torch.randn(2, 1, 8), torch.zeros(0, 8)
    before = x.clone()
    steer(x, bank, compile_moves(bank, [[], []], capacity=4))
    bank, nobody = torch.eye(1, 8), torch.full((2,), -1, dtype=torch.int32)
    steer(x, bank, compile_moves(bank, [], capacity=4), slot=nobody)
    assert torch.equal(x, before)


def test_norms_of_heads_can_be_trained_while_compiled():
    qkv, caches = torch.randn(1, 1, 3 * 8), [torch.randn(1, 1, 4, 8) for _ in range(2)]
    column = torch.zeros(1, dtype=torch.long)
    view = View(torch.ones(1, 1, 1, 8), torch.zeros(1, 1, 1, 8), column, column, 4)
    weight = torch.ones(8, requires_grad=True)

    def attended(qkv):
        k, v = (cache.clone() for cache in caches)
        return attend(qkv, k, v, view, scale=1.0, q_weight=weight, k_weight=weight)

    grads = []
    for way in (attended, torch.compile(attended, backend="aot_eager")):
        weight.grad = None
        (way(qkv) ** 2).sum().backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("activation", "width"), [("relu", 8), ("silu", 7), (None, 8)])
def test_an_activation_or_a_width_that_gated_lacks_is_refused(activation, width):
    with pytest.raises(ValueError, match=r"gated takes silu, gelu, .* an even width, not"):
        gated(torch.ones(1, 2, width), activation)


def test_an_empty_bank_moves_nothing():
    x = torch.randn(2, 3, 8)
    tables = compile_moves(torch.empty(0, 8), [[], []], capacity=2)
    assert torch.equal(steer(x.clone(), torch.empty(0, 8), tables), x)
