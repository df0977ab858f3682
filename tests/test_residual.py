"""`add_steer_norm`, the PyTorch formula and the kernel, against its three steps."""

import math

import pytest
import torch
from device import DEVICE
from test_steering import DTYPES, by_formula, case, check_error, random_case
from tinysteer_kernels import Move, add_steer_norm, compile_moves, residual, steer
from tinysteer_kernels.decode import rms_norm
from tinysteer_kernels.devices import HAS_TRITON
from tinysteer_kernels.naive import steer_naive

EPS = 1e-6
WAYS = {"formula": residual.add_steer_norm_reference} | (
    {"kernel": residual.add_steer_norm_launch} if HAS_TRITON else {}
)
# family -> offset of its norms, whether delta has a norm of its own
FAMILIES = {"llama": (0.0, False), "gemma": (1.0, False), "gemma 2": (1.0, True)}


@pytest.fixture(params=WAYS)
def run(request):
    """The op without its checks."""
    way = WAYS[request.param]

    def run(x, delta, weight, post, offset, bank=None, tables=None, position=None, slot=None):
        return way(x, delta, weight, EPS, offset, post, bank, tables, position, slot)

    return run


def surroundings(x, family, seed=0):
    """delta, weight, post_weight or None, offset for x of a family."""
    offset, post_norm = FAMILIES[family]
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(x.shape, generator=generator).to(DEVICE, x.dtype)
    weight, post = (
        (torch.randn(x.shape[-1], generator=generator) + 1 - offset).to(DEVICE, x.dtype)
        for _ in range(2)
    )
    return delta, weight, post if post_norm else None, offset


def exact_norm(h, weight, offset):
    """In float64."""
    return h * (h.square().mean(-1, keepdim=True) + EPS).rsqrt() * (offset + weight.double())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(2000, 2020))
def test_it_equals_its_steps_in_float64(run, seed, family):
    """x rounds where the steps round, so the exact ones start from each rounded value."""
    x, bank, rows, position = random_case(seed, widths=(64, 100, 576, 2304, 4096))
    delta, weight, post, offset = surroundings(x, family, seed)
    step = delta if post is None else rms_norm(delta, post, EPS, offset)
    expected = steer_naive(x + step, bank, rows, position)
    tables = compile_moves(bank, rows)
    new, y = run(
        x, delta, weight, post, offset, bank, tables if tables.index.numel() else None, position
    )
    check_error(new, expected, x.dtype)
    exact = exact_norm(new.double(), weight, offset)
    assert (y.double() - exact).norm() <= 2 * DTYPES[x.dtype] * exact.norm()  # Llama rounds twice


def same_up_to_a_rare_ulp(result, expected):
    """Sums of squares in another order differ by 1e-7, which rounding shows once in thousands."""
    wrong = result != expected
    assert wrong.float().mean() <= 2e-3
    torch.testing.assert_close(result, expected, atol=0, rtol=2 * torch.finfo(result.dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_without_moves_is_what_the_unfused_steps_give(run, family, dtype):
    x, *_ = case(B=2, T=5, D=576, dtype=dtype)
    delta, weight, post, offset = surroundings(x, family)
    step = delta if post is None else rms_norm(delta, post, EPS, offset)
    new, y = run(x, delta, weight, post, offset)
    if post is None:
        assert torch.equal(new, x + step)
    else:
        same_up_to_a_rare_ulp(new, x + step)
    same_up_to_a_rare_ulp(y, rms_norm(new, weight, EPS, offset))


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_idle_moves_change_no_bit(run, family, T):
    idle = [Move(), Move(0, bias=0.0), Move(1, bias=3.0, first=9), Move()]
    x, bank, tables, position = case(*idle, B=2, T=T, D=64, dtype=torch.bfloat16)
    x[0, 0, :4] = -0.0
    around = surroundings(x, family)
    around[0][0, 0, :4] = -0.0  # delta
    steered = run(x, *around, bank, tables, position)
    for a, b in zip(steered, run(x, *around), strict=True):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("T", [1, 5])
def test_it_equals_add_then_steer_then_norm(run, T):
    """Each step by the same way: the sum, `steer` and the norm of its result."""
    row = [Move(0, bias=9.0), Move(1, bias=-4.0, slope=1.0), Move(2, slope=1.0)]
    x, bank, tables, position = case(*row, B=2, T=T, D=576, dtype=torch.bfloat16)
    delta, weight, post, offset = surroundings(x, "llama")
    new, y = run(x, delta, weight, post, offset, bank, tables, position)
    same_up_to_a_rare_ulp(new, by_formula(x + delta, bank, tables, position))
    same_up_to_a_rare_ulp(y, rms_norm(new, weight, EPS))
    assert (y - rms_norm(x + delta, weight, EPS)).abs().max() > 0.1, "the norm is of the edited x"


def test_its_inputs_stay_as_they_were(run):
    x, *steering = case(Move(0, bias=2.0))
    *inputs, offset = x, *surroundings(x, "gemma 2")
    before = [tensor.clone() for tensor in inputs]
    run(*inputs, offset, *steering)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


def inside(x):
    """The same rows in a wider tensor, NaN around them."""
    wide = torch.full((2, 5, 40), math.nan, device=DEVICE)
    wide[:, 1:4, 4:20] = x
    return wide[:, 1:4, 4:20]


def turned(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("lay", [inside, turned])
def test_rows_are_read_where_they_lie_and_results_are_contiguous(run, lay):
    x, *steering = case(Move(0, bias=2.0), B=2, T=3)
    delta, *rest = surroundings(x, "llama")
    expected = run(x, delta, *rest, *steering)
    result = run(lay(x), lay(delta), *rest, *steering)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert all(tensor.is_contiguous() for tensor in result)


def test_a_nan_row_stays_alone(run):
    x, *steering = case(Move(0, bias=1.0), Move(1, slope=1.0), B=2)
    around = surroundings(x, "gemma 2")
    clean = run(x, *around, *steering)
    x[0] = math.nan
    for a, b in zip(run(x, *around, *steering), clean, strict=True):
        assert a[0].isnan().all()
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_the_norm_rounds_as_transformers_does(name, dtype):
    pytest.importorskip("transformers")
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = {"llama": LlamaRMSNorm, "gemma2": Gemma2RMSNorm, "gemma3": Gemma3RMSNorm}[name]
    theirs = theirs(576, eps=EPS).to(DEVICE, dtype)
    torch.nn.init.normal_(theirs.weight.data, generator=None)
    x = torch.randn(64, 576, device=DEVICE).to(dtype)
    ours = rms_norm(x, theirs.weight.data, EPS, 0.0 if name == "llama" else 1.0)
    if dtype == torch.float32:
        torch.testing.assert_close(ours, theirs(x).data)
    else:
        same_up_to_a_rare_ulp(ours, theirs(x).data)


def test_the_op_is_the_formula_with_defaults():
    x, bank, tables, position = case(Move(0, bias=2.0))
    delta, weight, _, _ = surroundings(x, "llama")
    new, y = add_steer_norm(x, delta, weight, EPS)
    assert torch.equal(new, x + delta)
    torch.testing.assert_close(y, rms_norm(new, weight, EPS))
    new, y = add_steer_norm(x, delta, weight, EPS, bank=bank, tables=tables, position=position)
    torch.testing.assert_close(new, x + delta + 2 * bank[0])
    torch.testing.assert_close(y, rms_norm(new, weight, EPS))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_op_gives_all_it_is_given_to_the_formula(family):
    row = [Move(0, bias=1.0, slope=1.0, first=1), Move(1, bias=2.0, last=1), Move(2, slope=1.0)]
    x, bank, tables, position = case(*row, B=2, T=4)
    delta, weight, post, offset = surroundings(x, family)
    expected = residual.add_steer_norm_reference(
        x, delta, weight, EPS, offset, post, bank, tables, position, None
    )
    traits = {"offset": offset, "post_weight": post}
    steering = {"bank": bank, "tables": tables, "position": position}
    result = add_steer_norm(x, delta, weight, EPS, **traits, **steering)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("T", [1, 5])
def test_a_slot_says_which_row_of_the_tables_serves(run, T):
    x, bank, _, position = case(B=5, T=T)
    rows, slot = [[Move(0, bias=2.0)], [Move(1, slope=1.0), Move(2, bias=3.0)]], [1, -1, 0, 1, -3]
    each = [rows[s] if s >= 0 else [] for s in slot]
    slots = torch.tensor(slot, dtype=torch.int32, device=DEVICE)
    around = surroundings(x, "gemma 2")
    expected = run(x, *around, bank, compile_moves(bank, each), position)
    result = run(x, *around, bank, compile_moves(bank, rows), position, slots)
    plain = run(x, *around)
    for a, b, c in zip(result, expected, plain, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[[1, 4]], c[[1, 4]])


def test_an_expanded_row_may_be_read():
    x, *_ = case(T=1)
    result, _ = add_steer_norm(
        x.expand(2, 3, 16), x.expand(2, 3, 16), torch.ones_like(x[0, 0]), EPS
    )
    torch.testing.assert_close(result, (2 * x).expand(2, 3, 16))


def test_gradients_are_those_of_the_steps():
    x, bank, tables, position = case(Move(0, bias=2.0), Move(1, bias=1.0, slope=1.0))
    delta, weight, _, _ = surroundings(x, "llama")
    for tensor in (x, delta, weight):
        tensor.requires_grad_()
    steering = {"bank": bank, "tables": tables, "position": position}
    _, y = add_steer_norm(x, delta, weight, EPS, **steering)
    h = steer(x + delta, bank, tables, position)
    expected = torch.autograd.grad(rms_norm(h, weight, EPS).square().sum(), (x, delta, weight))
    result = torch.autograd.grad(y.square().sum(), (x, delta, weight))
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b)


BAD = {
    "delta of another shape": ({"delta": torch.zeros(1, 2, 16)}, r"x is \(1, 3, 16\), delta"),
    "delta of another type": ({"delta": torch.zeros(1, 3, 16).half()}, "delta torch.float16"),
    "delta transposed": ({"delta": torch.zeros(1, 16, 3).mT}, "delta has strides"),
    "a weight of another width": ({"weight": torch.zeros(15)}, r"weight is \(15,\).*\(16,\)"),
    "a weight of another type": ({"weight": torch.zeros(16).half()}, "weight torch.float16"),
    "a post-norm's weight too short": ({"post_weight": torch.zeros(1)}, r"post_weight is \(1,\)"),
    "tables without a bank": ({"tables": case(Move(0))[2]}, "tables need the bank"),
    "tables of another batch": (
        {"bank": case()[1], "tables": case(Move(0), B=2)[2]},
        "tables are for 2 rows, x has 1",
    ),
    "empty tables of another batch": (
        {"bank": case()[1], "tables": case(B=2)[2]},
        "tables are for 2 rows, x has 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_with_its_sizes(name):
    spoilt, message = BAD[name]
    x, *_ = case()
    good = {"delta": torch.zeros_like(x), "weight": torch.ones(16, device=DEVICE), "eps": EPS}
    spoilt = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in spoilt.items()}
    with pytest.raises(ValueError, match=message):
        add_steer_norm(x, **good | spoilt)
