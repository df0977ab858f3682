"""`steer`, the PyTorch formula and the kernel, against one edit after another in float64."""

import math
import random
import subprocess
import sys

import pytest
import torch
from device import DEVICE
from tinysteer_kernels import PADDING, Edit, compile_edits
from tinysteer_kernels import edits as editing
from tinysteer_kernels.devices import HAS_TRITON

# verb -> an edit made from a weight or target w
VERBS = {
    "add": lambda w: {"bias": w},
    "to_target": lambda w: {"bias": w, "slope": 1.0},
    "half way": lambda w: {"bias": 0.5 * w, "slope": 0.5},
    "at_least": lambda w: {"bias": w, "slope": 1.0, "low": 0.0},
    "at_most": lambda w: {"bias": w, "slope": 1.0, "high": 0.0},
    "ablate": lambda w: {"slope": 1.0},
}
WINDOWS = {
    "all": {},
    "prompt": {"last": -1},
    "generation": {"first": 0},
    "two to three": {"first": 2, "last": 3},
}
DTYPES = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 4e-3}  # relative errors allowed
WIDTHS = (64, 100, 576, 640, 2304, 3072, 3584, 4096, 8192, 16384)


def by_kernel(x, bank, edits, position=None):
    editing.launch(x, bank, edits, position)
    return x


WAYS = {"formula": editing.formula} | ({"kernel": by_kernel} if HAS_TRITON else {})
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="there is no Triton here")


@pytest.fixture(params=WAYS)
def steer(request):
    return WAYS[request.param]


def one_by_one(x, bank, rows, position):
    """The definition: each edit reads the state that those before it left."""
    h = x.double()
    for b, row in enumerate(rows):
        for edit in row:
            u = bank[edit.index].double()
            d = (edit.bias - edit.slope * (h[b] @ u)).clamp(edit.low, edit.high)
            at = position[b]
            d = d * ((edit.first <= at) & (at <= edit.last) & (at != PADDING))
            h[b] = h[b] + d[:, None] * u
    return h


def random_case(seed: int, widths=WIDTHS):
    """x, bank, rows of edits, positions: uneven rows, leaning directions, padding, odd strides."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    (B, T), D = draw.choice([(1, 1), (3, 1), (1, 3), (2, 4), (1, 5)]), draw.choice(widths)
    N, dtype = draw.choice([1, 3, 8]), draw.choice(list(DTYPES))
    bank = torch.randn(N, D, generator=generator) + 0.5  # a common part: far from orthogonal
    bank = torch.nn.functional.normalize(bank, dim=-1).to(draw.choice([dtype, torch.float32]))
    x = (3 * torch.randn(B, T, D + 8, generator=generator)).to(DEVICE, dtype)
    x = x[..., draw.randrange(8) :][..., :D] if draw.random() < 0.5 else x[..., :D].contiguous()
    if draw.random() < 0.3:
        x[..., 0] = 1000.0  # a massive activation
    verbs = draw.sample(list(VERBS), 3)
    rows = [
        [
            Edit(
                draw.randrange(N),
                **VERBS[draw.choice(verbs)](draw.uniform(-9, 9)),
                **WINDOWS[draw.choice(list(WINDOWS))],
            )
            for _ in range(draw.choice([0, 1, 2, 4, 16]))
        ]
        for _ in range(B)
    ]
    position = torch.arange(T, dtype=torch.int32).repeat(B, 1) + draw.choice([-2, 0, 2])
    position[-1, : draw.randrange(T)] = PADDING
    return x, bank.to(DEVICE), rows, position.to(DEVICE)


def check_error(result, expected, dtype):
    """Within its type's limit, and no worse than rounding the exact result once."""
    error, scale = (result.double() - expected).norm(), expected.norm()
    assert result.dtype == dtype
    assert error <= DTYPES[dtype] * scale
    if dtype != torch.float32:
        ideal = (expected.to(dtype).double() - expected).norm()
        assert error <= 1.02 * ideal + 1e-9


@needs_triton
@pytest.mark.parametrize("seed", range(400 if DEVICE == "cpu" else 100))  # a GPU compiles anew
def test_the_kernel_equals_one_edit_after_another_in_float64(seed):
    x, bank, rows, position = random_case(seed)
    around = x._base if x._base is not None else x
    before = around.clone()
    expected = one_by_one(x, bank, rows, position)
    result = by_kernel(x, bank, compile_edits(bank, rows), position)
    check_error(result, expected, x.dtype)
    result.copy_(before.as_strided(x.shape, x.stride(), x.storage_offset()))
    assert torch.equal(around, before), "it wrote beside x"


@pytest.mark.parametrize("seed", range(1000, 1060))
def test_the_formula_equals_one_edit_after_another_in_float64(seed):
    x, bank, rows, position = random_case(seed)
    expected = one_by_one(x, bank, rows, position)
    result = editing.formula(x, bank, compile_edits(bank, rows), position)
    check_error(result, expected, x.dtype)


def case(*edits, B=1, T=3, D=16, dtype=torch.float32):
    """x, bank of 3, tables of the same edits for B rows, positions 0 to T - 1."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.nn.functional.normalize(torch.randn(3, D, generator=generator), dim=-1)
    x = torch.randn(B, T, D, generator=generator)
    position = torch.arange(T, dtype=torch.int32).repeat(B, 1)
    bank, x, position = bank.to(DEVICE, dtype), x.to(DEVICE, dtype), position.to(DEVICE)
    return x, bank, compile_edits(bank, [list(edits)] * B), position


def test_it_works_in_place(steer):
    x, *rest = case(Edit(0, bias=2.0))
    before = x.clone()
    assert steer(x, *rest) is x
    assert not torch.equal(x, before)


def test_it_edits_a_view_where_it_lies(steer):
    x, *rest = case(Edit(0, bias=2.0), B=2)
    expected = steer(x.clone(), *rest)
    wide = torch.zeros(2, 5, 40, device=DEVICE)
    wide[:, 1:4, 4:20] = x
    steer(wide[:, 1:4, 4:20], *rest)
    assert torch.equal(wide[:, 1:4, 4:20], expected)
    wide[:, 1:4, 4:20] = 0
    assert not wide.any()


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(
    "edits",
    [
        [Edit()],
        [Edit(0, bias=0.0)],
        [Edit(0, bias=-0.0)],
        [Edit(0, bias=5.0, first=7)],
        [Edit(0, bias=0.0), Edit(1, bias=0.0), Edit(), Edit(2, bias=1.0, last=-1)],
    ],
    ids=["none", "zero", "minus zero", "elsewhere", "four nothings"],
)
def test_nothing_to_do_leaves_every_bit(steer, edits, T):
    x, *rest = case(*edits, T=T)
    x[0, 0, :3] = torch.tensor([-0.0, 1e-45, 3e38])
    before = x.clone()
    steer(x, *rest)
    assert torch.equal(x.view(torch.int32), before.view(torch.int32))


def test_a_row_without_edits_keeps_its_bits_beside_one_that_has_some(steer):
    x, bank, _, position = case(B=2, T=5)
    x[1] = -0.0
    before = x.clone()
    steer(x, bank, compile_edits(bank, [[Edit(0, bias=1.0)] * 5, []]), position)
    assert (x[0] != before[0]).any(-1).all()
    assert torch.equal(x[1].view(torch.int32), before[1].view(torch.int32))


def test_windows_end_where_they_say(steer):
    x, bank, edits, _ = case(Edit(0, bias=1.0, first=-1, last=2), T=7)
    before = x.clone()
    position = torch.arange(-3, 4, dtype=torch.int32, device=DEVICE)[None]
    steer(x, bank, edits, position)
    moved = (x != before).any(-1)[0].tolist()
    assert moved == [-1 <= at <= 2 for at in range(-3, 4)]


def test_padding_is_never_edited(steer):
    x, bank, edits, position = case(Edit(0, bias=1.0))
    position[0, :2] = PADDING
    before = x.clone()
    steer(x, bank, edits, position)
    assert torch.equal(x[:, :2], before[:, :2])
    assert not torch.equal(x[:, 2:], before[:, 2:])


def test_without_positions_all_are_where_generation_begins(steer):
    x, bank, edits, position = case(Edit(0, bias=1.0, first=0, last=0), Edit(1, bias=1.0, last=-1))
    expected = steer(x.clone(), bank, edits, torch.zeros_like(position))
    assert torch.equal(steer(x, bank, edits, None), expected)


def test_opposite_edits_cancel(steer):
    x, *rest = case(Edit(0, bias=3.0), Edit(0, bias=-3.0))
    torch.testing.assert_close(steer(x.clone(), *rest), x)


@pytest.mark.parametrize("T", [1, 3])
def test_a_target_is_hit_and_stays_hit(steer, T):
    x, bank, edits, position = case(Edit(2, bias=3.0), Edit(1, bias=4.5, slope=1.0), T=T)
    once = steer(x, bank, edits, position)
    torch.testing.assert_close(once @ bank[1], torch.full_like(once[..., 0], 4.5))
    again = compile_edits(bank, [[Edit(1, bias=4.5, slope=1.0)]])
    torch.testing.assert_close(steer(once.clone(), bank, again, position), once)


@pytest.mark.parametrize("T", [1, 3])
def test_order_matters(steer, T):
    set_first = case(Edit(0, bias=1.0, slope=1.0), Edit(1, bias=5.0), T=T)
    add_first = case(Edit(1, bias=5.0), Edit(0, bias=1.0, slope=1.0), T=T)
    assert (steer(*set_first) - steer(*add_first)).abs().max() > 0.1


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 13, 16])
@pytest.mark.parametrize("T", [1, 4])
def test_every_one_of_many_edits_counts(steer, n, T):
    row = [Edit(k % 3, bias=1.0 + k, slope=0.5) for k in range(n)]
    x, bank, edits, position = case(*row, T=T)
    expected = one_by_one(x, bank, [row], position).float()
    torch.testing.assert_close(steer(x, bank, edits, position), expected)


def test_decoding_one_position_at_a_time_equals_prefill(steer):
    row = [Edit(0, bias=1.0, slope=1.0), Edit(1, bias=2.0, first=1), Edit(2, slope=1.0, last=4)]
    x, bank, edits, position = case(*row, B=2, T=6)
    whole = steer(x.clone(), bank, edits, position)
    steps = [
        steer(x[:, t : t + 1].clone(), bank, edits, position[:, t : t + 1].contiguous())
        for t in range(6)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), whole)


def test_a_row_does_not_depend_on_its_neighbours(steer):
    x, bank, _, position = case(B=3, T=4)
    rows = [[Edit(0, bias=2.0)], [Edit(1, bias=1.0, slope=1.0), Edit(2, slope=1.0)], []]
    forward = steer(x.clone(), bank, compile_edits(bank, rows), position)
    turned = steer(x.flip(0), bank, compile_edits(bank, rows[::-1]), position)
    assert torch.equal(turned.flip(0), forward)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_stays_alone(steer, bad):
    x, bank, edits, position = case(Edit(0, bias=1.0), Edit(1, slope=1.0), B=2)
    clean = steer(x.clone(), bank, edits, position)
    x[0] = bad
    steer(x, bank, edits, position)
    assert not x[0].isfinite().any()
    assert torch.equal(x[1], clean[1])


def test_a_position_that_is_not_finite_stays_alone(steer):
    x, *rest = case(Edit(0, bias=1.0, slope=1.0, low=0.0), T=4)
    clean = steer(x.clone(), *rest)
    x[0, 2, 5] = math.nan
    steer(x, *rest)
    assert x[0, 2].isnan().all()
    assert torch.equal(x[0, [0, 1, 3]], clean[0, [0, 1, 3]])


@pytest.mark.parametrize("T", [1, 3])
def test_a_direction_is_read_only_where_a_row_needs_it(steer, T):
    bank = torch.eye(3, 16, device=DEVICE)
    x = torch.randn(2, T, 16, device=DEVICE)
    expected = x[1] + bank[1]
    edits = compile_edits(bank, [[Edit(0, bias=1.0), Edit(1, bias=1.0)], [Edit(1, bias=1.0)]])
    bank[0] = math.nan
    result = steer(x, bank, edits, None)
    assert result[0].isnan().any()
    torch.testing.assert_close(result[1], expected)


@pytest.mark.parametrize("T", [1, 3])
def test_an_add_leaves_one_infinite_value_alone(steer, T):
    x, bank, edits, position = case(Edit(0, bias=2.0), Edit(1, slope=1.0, low=0.0), T=T)
    at = int(bank[1].argmax())  # where infinity is far above what `low` lets through
    x[0, 0, at] = 1e6
    expected = steer(x.clone(), bank, edits, position)
    expected[0, 0, at] = x[0, 0, at] = math.inf
    assert torch.equal(steer(x, bank, edits, position), expected)


def test_an_empty_slot_moves_nothing_whatever_its_bias(steer):
    x, bank, edits, position = case(Edit(0, bias=2.0), Edit(-1, bias=3.0, slope=1.0))
    expected = x + 2 * bank[0]
    torch.testing.assert_close(steer(x, bank, edits, position), expected)


def test_the_op_gives_all_it_is_given_to_the_formula():
    row = [Edit(0, bias=1.0, slope=1.0, first=1), Edit(1, bias=2.0, last=1), Edit(2, slope=1.0)]
    x, bank, edits, position = case(*row, B=2, T=4)
    expected = editing.formula(x.clone(), bank, edits, position)
    torch.testing.assert_close(editing.steer(x, bank, edits, position), expected)


def test_sums_stay_float32_under_autocast():
    x, *rest = case(Edit(0, bias=1.0, slope=1.0), D=512)
    expected = editing.steer(50 * x, *rest)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        torch.testing.assert_close(editing.steer(50 * x, *rest), expected)


def test_gradients_are_those_of_one_edit_after_another():
    row = [Edit(0, bias=2.0), Edit(1, bias=1.0, slope=1.0), Edit(2, slope=1.0)]
    x, bank, edits, position = case(*row)
    x.requires_grad_()
    by_hand = x * 1
    for edit in row:
        u = bank[edit.index]
        by_hand = by_hand + (edit.bias - edit.slope * (by_hand @ u))[..., None] * u
    (expected,) = torch.autograd.grad(by_hand.square().sum(), x)
    bank.requires_grad_()  # to which none passes
    (result,) = torch.autograd.grad(editing.steer(x * 1, bank, edits, position).square().sum(), x)
    torch.testing.assert_close(result, expected)


def test_large_states_do_not_overflow_in_half_precision(steer):
    x, *rest = case(Edit(0, slope=1.0), D=4096, dtype=torch.float16)
    assert steer(x * 12_000, *rest).isfinite().all()


def test_new_contents_of_the_tables_change_the_next_result(steer):
    x, bank, edits, position = case(Edit(0, bias=1.0))
    steer(x.clone(), bank, edits, position)
    edits.bias.fill_(2.0)
    torch.testing.assert_close(steer(x.clone(), bank, edits, position), x + 2 * bank[0])
    edits.copy_(compile_edits(bank, [[Edit(2, bias=3.0)]]))
    torch.testing.assert_close(steer(x.clone(), bank, edits, position), x + 3 * bank[2])
    bank[2] = bank[1]
    torch.testing.assert_close(steer(x.clone(), bank, edits, position), x + 3 * bank[1])


def test_a_bank_may_hold_thousands(steer):
    bank = torch.nn.functional.normalize(torch.randn(5000, 64, device=DEVICE), dim=-1)
    x = torch.randn(2, 1, 64, device=DEVICE)
    expected = x + 2 * bank[torch.tensor([[4999], [17]])]
    rows = [[Edit(4999, bias=2.0)], [Edit(17, bias=2.0)]]
    torch.testing.assert_close(steer(x, bank, compile_edits(bank, rows), None), expected)


BAD = {
    "a bank of another width": (lambda x, b, e, p: (x, b[:, :5], e, p), r"16 wide.*\(3, 5\)"),
    "a bank in float64": (lambda x, b, e, p: (x, b.double(), e, p), "bank is torch.float64"),
    "a bank that is strided": (
        lambda x, b, e, p: (x, b.T.contiguous().T, e, p),
        "bank has strides",
    ),
    "positions of another length": (
        lambda x, b, e, p: (x, b, e, p[:, :2]),
        r"position is \(1, 2\).*\(1, 3\)",
    ),
    "positions in int64": (lambda x, b, e, p: (x, b, e, p.long()), "position is .* torch.int64"),
    "edits of another batch": (
        lambda x, b, e, p: (x.repeat(2, 1, 1), b, e, p.repeat(2, 1)),
        "edits are for 1 rows, x has 2",
    ),
    "a table of another shape": (
        lambda x, b, e, p: (x, b, e._replace(bias=e.bias[:, :0]), p),
        r"bias is \(1, 0\) torch.float32: it should be \(1, 1\)",
    ),
    "a table of another type": (
        lambda x, b, e, p: (x, b, e._replace(index=e.index.long()), p),
        r"index is \(1, 1\) torch.int64: it should be",
    ),
    "x in float64": (lambda x, b, e, p: (x.double(), b, e, p), "x is torch.float64"),
    "x in a tuple": (lambda x, b, e, p: ((x,), b, e, p), "x is a tuple"),
    "edits that are not compiled": (lambda x, b, e, p: (x, b, [[]], p), "edits are a list"),
    "x without rows": (lambda x, b, e, p: (x[0], b, e, p), r"x is \(3, 16\)"),
    "x transposed": (lambda x, b, e, p: (x.mT.contiguous().mT, b, e, p), "x has strides"),
    "x expanded": (lambda x, b, e, p: (x[:, :1].expand(1, 3, 16), b, e, p), "x has strides"),
    "x expanded over rows": (
        lambda x, b, e, p: (x.expand(2, 3, 16), b, e._replace(), p),
        "x has strides",
    ),
    "x of no width": (lambda x, b, e, p: (x[..., :0], b[:, :0], e, p), r"x is \(1, 3, 0\)"),
    "positions elsewhere": (lambda x, b, e, p: (x, b, e, p.to("meta")), "x is on .*, position on"),
    "a table elsewhere": (
        lambda x, b, e, p: (x, b, e._replace(high=e.high.to("meta")), p),
        "x is on .*, high on",
    ),
    "the bank elsewhere": (lambda x, b, e, p: (x, b.to("meta"), e, p), "x is on .*, bank on"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_with_its_sizes(name):
    spoil, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        editing.steer(*spoil(*case(Edit(0, bias=1.0))))


def test_the_kernels_do_without_tinysteer():
    code = "import sys, tinysteer_kernels; sys.exit('tinysteer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
