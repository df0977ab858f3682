"""`steer`, the PyTorch formula and the kernel, against one move after another in float64."""

import math
import random
import subprocess
import sys

import pytest
import torch
from device import DEVICE
from tinysteer_kernels import PADDING, Move, MoveTables, compile_moves, steering
from tinysteer_kernels import steer as steer_op
from tinysteer_kernels.devices import HAS_TRITON
from tinysteer_kernels.naive import steer_naive

# verb -> a move made from a weight or target w
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


def by_formula(x, bank, tables, position=None, slot=None):
    return steering.steer_reference(x, bank, tables, position, slot)


def by_kernel(x, bank, tables, position=None, slot=None):
    steering.steer_launch(x, bank, tables, position, slot)
    return x


WAYS = {"formula": by_formula} | ({"kernel": by_kernel} if HAS_TRITON else {})
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="there is no Triton here")


@pytest.fixture(params=WAYS)
def steer(request):
    return WAYS[request.param]


def random_case(seed: int, widths=WIDTHS):
    """x, bank, rows of moves, positions: uneven rows, leaning directions, padding, odd strides."""
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
            Move(
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
@pytest.mark.parametrize("seed", range(150 if DEVICE == "cpu" else 100))  # a GPU compiles anew
def test_the_kernel_equals_one_move_after_another_in_float64(seed):
    x, bank, rows, position = random_case(seed)
    around = x._base if x._base is not None else x
    before = around.clone()
    expected = steer_naive(x, bank, rows, position)
    result = by_kernel(x, bank, compile_moves(bank, rows), position)
    check_error(result, expected, x.dtype)
    result.copy_(before.as_strided(x.shape, x.stride(), x.storage_offset()))
    assert torch.equal(around, before), "it wrote beside x"


@pytest.mark.parametrize("seed", range(1000, 1060))
def test_the_formula_equals_one_move_after_another_in_float64(seed):
    x, bank, rows, position = random_case(seed)
    expected = steer_naive(x, bank, rows, position)
    result = by_formula(x, bank, compile_moves(bank, rows), position)
    check_error(result, expected, x.dtype)


def case(*moves, B=1, T=3, D=16, dtype=torch.float32):
    """x, bank of 3, tables of the same moves for B rows, positions 0 to T - 1."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.nn.functional.normalize(torch.randn(3, D, generator=generator), dim=-1)
    x = torch.randn(B, T, D, generator=generator)
    position = torch.arange(T, dtype=torch.int32).repeat(B, 1)
    bank, x, position = bank.to(DEVICE, dtype), x.to(DEVICE, dtype), position.to(DEVICE)
    return x, bank, compile_moves(bank, [list(moves)] * B), position


def test_it_works_in_place(steer):
    x, *rest = case(Move(0, bias=2.0))
    before = x.clone()
    assert steer(x, *rest) is x
    assert not torch.equal(x, before)


def test_it_edits_a_view_where_it_lies(steer):
    x, *rest = case(Move(0, bias=2.0), B=2)
    expected = steer(x.clone(), *rest)
    wide = torch.zeros(2, 5, 40, device=DEVICE)
    wide[:, 1:4, 4:20] = x
    steer(wide[:, 1:4, 4:20], *rest)
    assert torch.equal(wide[:, 1:4, 4:20], expected)
    wide[:, 1:4, 4:20] = 0
    assert not wide.any()


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(
    "moves",
    [
        [Move()],
        [Move(0, bias=0.0)],
        [Move(0, bias=-0.0)],
        [Move(0, bias=5.0, first=7)],
        [Move(0, bias=0.0), Move(1, bias=0.0), Move(), Move(2, bias=1.0, last=-1)],
    ],
    ids=["none", "zero", "minus zero", "elsewhere", "four nothings"],
)
def test_nothing_to_do_leaves_every_bit(steer, moves, T):
    x, *rest = case(*moves, T=T)
    x[0, 0, :3] = torch.tensor([-0.0, 1e-45, 3e38])
    before = x.clone()
    steer(x, *rest)
    assert torch.equal(x.view(torch.int32), before.view(torch.int32))


def test_a_row_without_moves_keeps_its_bits_beside_one_that_has_some(steer):
    x, bank, _, position = case(B=2, T=5)
    x[1] = -0.0
    before = x.clone()
    steer(x, bank, compile_moves(bank, [[Move(0, bias=1.0)] * 5, []]), position)
    assert (x[0] != before[0]).any(-1).all()
    assert torch.equal(x[1].view(torch.int32), before[1].view(torch.int32))


def test_windows_end_where_they_say(steer):
    x, bank, tables, _ = case(Move(0, bias=1.0, first=-1, last=2), T=7)
    before = x.clone()
    position = torch.arange(-3, 4, dtype=torch.int32, device=DEVICE)[None]
    steer(x, bank, tables, position)
    moved = (x != before).any(-1)[0].tolist()
    assert moved == [-1 <= at <= 2 for at in range(-3, 4)]


def test_padding_is_never_moved(steer):
    x, bank, tables, position = case(Move(0, bias=1.0))
    position[0, :2] = PADDING
    before = x.clone()
    steer(x, bank, tables, position)
    assert torch.equal(x[:, :2], before[:, :2])
    assert not torch.equal(x[:, 2:], before[:, 2:])


def test_without_positions_all_are_where_generation_begins(steer):
    x, bank, tables, position = case(Move(0, bias=1.0, first=0, last=0), Move(1, bias=1.0, last=-1))
    expected = steer(x.clone(), bank, tables, torch.zeros_like(position))
    assert torch.equal(steer(x, bank, tables, None), expected)


def test_opposite_moves_cancel(steer):
    x, *rest = case(Move(0, bias=3.0), Move(0, bias=-3.0))
    torch.testing.assert_close(steer(x.clone(), *rest), x)


@pytest.mark.parametrize("T", [1, 3])
def test_a_target_is_hit_and_stays_hit(steer, T):
    x, bank, tables, position = case(Move(2, bias=3.0), Move(1, bias=4.5, slope=1.0), T=T)
    once = steer(x, bank, tables, position)
    torch.testing.assert_close(once @ bank[1], torch.full_like(once[..., 0], 4.5))
    again = compile_moves(bank, [[Move(1, bias=4.5, slope=1.0)]])
    torch.testing.assert_close(steer(once.clone(), bank, again, position), once)


@pytest.mark.parametrize("T", [1, 3])
def test_order_matters(steer, T):
    set_first = case(Move(0, bias=1.0, slope=1.0), Move(1, bias=5.0), T=T)
    add_first = case(Move(1, bias=5.0), Move(0, bias=1.0, slope=1.0), T=T)
    assert (steer(*set_first) - steer(*add_first)).abs().max() > 0.1


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 13, 16])
@pytest.mark.parametrize("T", [1, 4])
def test_every_one_of_many_moves_counts(steer, n, T):
    row = [Move(k % 3, bias=1.0 + k, slope=0.5) for k in range(n)]
    x, bank, tables, position = case(*row, T=T)
    expected = steer_naive(x, bank, [row], position).float()
    torch.testing.assert_close(steer(x, bank, tables, position), expected)


def test_decoding_one_position_at_a_time_equals_prefill(steer):
    row = [Move(0, bias=1.0, slope=1.0), Move(1, bias=2.0, first=1), Move(2, slope=1.0, last=4)]
    x, bank, tables, position = case(*row, B=2, T=6)
    whole = steer(x.clone(), bank, tables, position)
    steps = [
        steer(x[:, t : t + 1].clone(), bank, tables, position[:, t : t + 1].contiguous())
        for t in range(6)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), whole)


def test_a_row_does_not_depend_on_its_neighbours(steer):
    x, bank, _, position = case(B=3, T=4)
    rows = [[Move(0, bias=2.0)], [Move(1, bias=1.0, slope=1.0), Move(2, slope=1.0)], []]
    forward = steer(x.clone(), bank, compile_moves(bank, rows), position)
    turned = steer(x.flip(0), bank, compile_moves(bank, rows[::-1]), position)
    assert torch.equal(turned.flip(0), forward)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_stays_alone(steer, bad):
    x, bank, tables, position = case(Move(0, bias=1.0), Move(1, slope=1.0), B=2)
    clean = steer(x.clone(), bank, tables, position)
    x[0] = bad
    steer(x, bank, tables, position)
    assert not x[0].isfinite().any()
    assert torch.equal(x[1], clean[1])


def test_a_position_that_is_not_finite_stays_alone(steer):
    x, *rest = case(Move(0, bias=1.0, slope=1.0, low=0.0), T=4)
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
    tables = compile_moves(bank, [[Move(0, bias=1.0), Move(1, bias=1.0)], [Move(1, bias=1.0)]])
    bank[0] = math.nan
    result = steer(x, bank, tables, None)
    assert result[0].isnan().any()
    torch.testing.assert_close(result[1], expected)


@pytest.mark.parametrize("T", [1, 3])
def test_an_add_leaves_one_infinite_value_alone(steer, T):
    x, bank, tables, position = case(Move(0, bias=2.0), Move(1, slope=1.0, low=0.0), T=T)
    at = int(bank[1].argmax())  # where infinity is far above what `low` lets through
    x[0, 0, at] = 1e6
    expected = steer(x.clone(), bank, tables, position)
    expected[0, 0, at] = x[0, 0, at] = math.inf
    assert torch.equal(steer(x, bank, tables, position), expected)


def test_an_empty_slot_moves_nothing_whatever_its_bias(steer):
    x, bank, tables, position = case(Move(0, bias=2.0), Move(-1, bias=3.0, slope=1.0))
    expected = x + 2 * bank[0]
    torch.testing.assert_close(steer(x, bank, tables, position), expected)


def test_the_op_gives_all_it_is_given_to_the_formula():
    row = [Move(0, bias=1.0, slope=1.0, first=1), Move(1, bias=2.0, last=1), Move(2, slope=1.0)]
    x, bank, tables, position = case(*row, B=2, T=4)
    expected = by_formula(x.clone(), bank, tables, position)
    torch.testing.assert_close(steer_op(x, bank, tables, position), expected)


def test_sums_stay_float32_under_autocast():
    x, *rest = case(Move(0, bias=1.0, slope=1.0), D=512)
    expected = steer_op(50 * x, *rest)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        torch.testing.assert_close(steer_op(50 * x, *rest), expected)


def test_gradients_are_those_of_one_move_after_another():
    row = [Move(0, bias=2.0), Move(1, bias=1.0, slope=1.0), Move(2, slope=1.0)]
    x, bank, tables, position = case(*row)
    x.requires_grad_()
    by_hand = steer_naive(x, bank, [row], position)
    (expected,) = torch.autograd.grad(by_hand.square().sum(), x)
    bank.requires_grad_()  # to which none passes
    (result,) = torch.autograd.grad(steer_op(x * 1, bank, tables, position).square().sum(), x)
    torch.testing.assert_close(result, expected)


def test_large_states_do_not_overflow_in_half_precision(steer):
    x, *rest = case(Move(0, slope=1.0), D=4096, dtype=torch.float16)
    assert steer(x * 12_000, *rest).isfinite().all()


def test_new_contents_of_the_tables_change_the_next_result(steer):
    x, bank, tables, position = case(Move(0, bias=1.0))
    steer(x.clone(), bank, tables, position)
    tables.bias.fill_(2.0)
    torch.testing.assert_close(steer(x.clone(), bank, tables, position), x + 2 * bank[0])
    tables.copy_(compile_moves(bank, [[Move(2, bias=3.0)]]))
    torch.testing.assert_close(steer(x.clone(), bank, tables, position), x + 3 * bank[2])
    bank[2] = bank[1]
    torch.testing.assert_close(steer(x.clone(), bank, tables, position), x + 3 * bank[1])


def test_a_bank_may_hold_thousands(steer):
    bank = torch.nn.functional.normalize(torch.randn(5000, 64, device=DEVICE), dim=-1)
    x = torch.randn(2, 1, 64, device=DEVICE)
    expected = x + 2 * bank[torch.tensor([[4999], [17]])]
    rows = [[Move(4999, bias=2.0)], [Move(17, bias=2.0)]]
    torch.testing.assert_close(steer(x, bank, compile_moves(bank, rows), None), expected)


@pytest.mark.parametrize("T", [1, 3])
def test_a_slot_says_which_row_of_the_tables_serves(steer, T):
    """Many rows of x by one row of the tables, in any order, some by none, -1 or below."""
    x, bank, _, position = case(B=6, T=T)
    rows = [[Move(0, bias=2.0)], [], [Move(1, bias=1.0, slope=1.0), Move(2, slope=1.0)]]
    slot = [2, 0, -1, 2, 1, -7]
    slots = torch.tensor(slot, dtype=torch.int32, device=DEVICE)
    each = [rows[s] if s >= 0 else [] for s in slot]
    expected = steer(x.clone(), bank, compile_moves(bank, each), position)
    before = x.clone()
    assert torch.equal(steer(x, bank, compile_moves(bank, rows), position, slots), expected)
    for b in (2, 4, 5):
        assert torch.equal(x[b], before[b])


def test_a_slot_of_every_row_is_no_slot(steer):
    x, bank, _, position = case(B=3)
    tables = compile_moves(bank, [[Move(k, bias=1.0 + k)] for k in range(3)])
    slot = torch.arange(3, dtype=torch.int32, device=DEVICE)
    expected = steer(x.clone(), bank, tables, position)
    assert torch.equal(steer(x, bank, tables, position, slot), expected)


def packed(tables, change):
    return MoveTables(change(tables.packed))


SLOT = torch.zeros(1, dtype=torch.int32, device=DEVICE)
BAD = {  # what x, bank, tables, positions become, with a slot perhaps
    "a bank of another width": (lambda x, b, t, p: (x, b[:, :5], t, p), r"16 wide.*\(3, 5\)"),
    "a bank in float64": (lambda x, b, t, p: (x, b.double(), t, p), "bank is torch.float64"),
    "a bank that is strided": (
        lambda x, b, t, p: (x, b.T.contiguous().T, t, p),
        "bank has strides",
    ),
    "positions of another length": (
        lambda x, b, t, p: (x, b, t, p[:, :2]),
        r"position is \(1, 2\).*\(1, 3\)",
    ),
    "positions in int64": (lambda x, b, t, p: (x, b, t, p.long()), "position is .* torch.int64"),
    "tables of another batch": (
        lambda x, b, t, p: (x.repeat(2, 1, 1), b, t, p.repeat(2, 1)),
        "tables are for 1 rows, x has 2: give a slot",
    ),
    "tables of another shape": (
        lambda x, b, t, p: (x, b, packed(t, lambda bits: bits[:, 1:]), p),
        r"tables are \(1, 7, 1\): give one layer's, \(rows, 7 \+ K, K\)",
    ),
    "tables of all layers": (
        lambda x, b, t, p: (x, b, packed(t, lambda bits: bits[None]), p),
        r"tables are \(1, 1, 8, 1\): give one layer's",
    ),
    "tables of another type": (
        lambda x, b, t, p: (x, b, packed(t, torch.Tensor.long), p),
        r"tables is \(1, 8, 1\) torch.int64: it should be",
    ),
    "x in float64": (lambda x, b, t, p: (x.double(), b, t, p), "x is torch.float64"),
    "x in a tuple": (lambda x, b, t, p: ((x,), b, t, p), "x is a tuple"),
    "moves that are not compiled": (lambda x, b, t, p: (x, b, [[]], p), "tables are a list"),
    "x without rows": (lambda x, b, t, p: (x[0], b, t, p), r"x is \(3, 16\)"),
    "x transposed": (lambda x, b, t, p: (x.mT.contiguous().mT, b, t, p), "x has strides"),
    "x expanded": (lambda x, b, t, p: (x[:, :1].expand(1, 3, 16), b, t, p), "x has strides"),
    "x expanded over rows": (lambda x, b, t, p: (x.expand(2, 3, 16), b, t, p), "x has strides"),
    "x of no width": (lambda x, b, t, p: (x[..., :0], b[:, :0], t, p), r"x is \(1, 3, 0\)"),
    "positions elsewhere": (lambda x, b, t, p: (x, b, t, p.to("meta")), "x is on .*, position on"),
    "tables elsewhere": (
        lambda x, b, t, p: (x, b, packed(t, lambda bits: bits.to("meta")), p),
        "x is on .*, tables on",
    ),
    "the bank elsewhere": (lambda x, b, t, p: (x, b.to("meta"), t, p), "x is on .*, bank on"),
    "slots in int64": (lambda x, b, t, p: (x, b, t, p, SLOT.long()), "slot is .* torch.int64"),
    "a slot too many": (lambda x, b, t, p: (x, b, t, p, SLOT.repeat(2)), r"slot is \(2,\).*\(1,\)"),
    "slots elsewhere": (lambda x, b, t, p: (x, b, t, p, SLOT.to("meta")), "x is on .*, slot on"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_with_its_sizes(name):
    spoil, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        steer_op(*spoil(*case(Move(0, bias=1.0))))


def test_the_kernels_do_without_tinysteer():
    code = "import sys, tinysteer_kernels; sys.exit('tinysteer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
