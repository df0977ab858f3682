"""The steering op against its definition, one edit after another in float64."""

import math
import random

import pytest
import torch
from tinysteer_kernels import PADDING, Edit, compile_edits, steer

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


def random_case(seed: int):
    """x, bank, rows of edits and positions: uneven rows, correlated directions, padding."""
    draw, torch_seed = random.Random(seed), torch.Generator().manual_seed(seed)
    B, T, D = draw.choice([1, 2, 5]), draw.choice([1, 4, 9]), draw.choice([8, 33, 576])
    N = draw.choice([1, 3, 8])
    bank = torch.randn(N, D, generator=torch_seed) + 0.5  # a common part: far from orthogonal
    bank = bank / bank.norm(dim=-1, keepdim=True)
    x = 3 * torch.randn(B, T, D, generator=torch_seed)
    rows = [
        [
            Edit(
                draw.randrange(N),
                **draw.choice(list(VERBS.values()))(draw.uniform(-9, 9)),
                **draw.choice(list(WINDOWS.values())),
            )
            for _ in range(draw.choice([0, 1, 2, 4, 16]))
        ]
        for _ in range(B)
    ]
    position = torch.arange(T, dtype=torch.int32).repeat(B, 1) - T // 2
    position[-1, : draw.randrange(T)] = PADDING
    return x, bank, rows, position


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(40))
def test_steer_equals_one_edit_after_another_in_float64(seed, dtype):
    x, bank, rows, position = random_case(seed)
    x = x.to(dtype)
    expected = one_by_one(x, bank, rows, position)
    result = steer(x.clone(), bank, compile_edits(bank, rows), position)
    assert result.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(result.double(), expected, atol=2e-4, rtol=1e-5)
    else:  # sums are float32: only the one rounding of the result is lost
        ideal = (expected.to(dtype).double() - expected).norm()
        assert (result.double() - expected).norm() <= 1.02 * ideal + 1e-9


def case(*edits, B=1, T=3, D=16):
    generator = torch.Generator().manual_seed(0)
    bank = torch.nn.functional.normalize(torch.randn(3, D, generator=generator), dim=-1)
    x = torch.randn(B, T, D, generator=generator)
    position = torch.arange(T, dtype=torch.int32).expand(B, T)
    return x, bank, compile_edits(bank, [list(edits)] * B), position


def test_it_works_in_place():
    x, *rest = case(Edit(0, bias=2.0))
    before = x.clone()
    assert steer(x, *rest) is x
    assert not torch.equal(x, before)


def test_it_edits_a_view_where_it_lies():
    x, *rest = case(Edit(0, bias=2.0))
    expected = steer(x.clone(), *rest)
    wide = torch.zeros(1, 3, 40)
    wide[..., 4:20] = x
    steer(wide[..., 4:20], *rest)
    assert torch.equal(wide[..., 4:20], expected)
    assert not wide[..., :4].any()
    assert not wide[..., 20:].any()


@pytest.mark.parametrize(
    "edit",
    [Edit(), Edit(0, bias=0.0), Edit(0, bias=-0.0), Edit(0, bias=5.0, first=7)],
    ids=["none", "zero", "minus zero", "elsewhere"],
)
def test_nothing_to_do_leaves_every_bit(edit):
    x, *rest = case(edit)
    x[0, 0, :3] = torch.tensor([-0.0, 1e-45, 3e38])
    before = x.clone()
    steer(x, *rest)
    assert torch.equal(x.view(torch.int32), before.view(torch.int32))


def test_opposite_edits_cancel():
    x, *rest = case(Edit(0, bias=3.0), Edit(0, bias=-3.0))
    torch.testing.assert_close(steer(x.clone(), *rest), x)


def test_a_target_is_hit():
    x, bank, edits, position = case(Edit(1, bias=4.5, slope=1.0))
    projections = steer(x, bank, edits, position) @ bank[1]
    torch.testing.assert_close(projections, torch.full_like(projections, 4.5))


def test_order_matters():
    set_first = case(Edit(0, bias=1.0, slope=1.0), Edit(1, bias=5.0))
    add_first = case(Edit(1, bias=5.0), Edit(0, bias=1.0, slope=1.0))
    assert (steer(*set_first) - steer(*add_first)).abs().max() > 0.1


def test_a_nan_row_stays_alone():
    x, *rest = case(Edit(0, bias=1.0), Edit(1, slope=1.0), B=2)
    clean = steer(x.clone(), *rest)
    x[0] = math.nan
    steer(x, *rest)
    assert x[0].isnan().all()
    assert torch.equal(x[1], clean[1])


def test_a_nan_direction_stays_with_its_row():
    bank = torch.eye(3, 16)
    bank[0] = math.nan
    x, position = torch.randn(2, 3, 16), torch.zeros(2, 3, dtype=torch.int32)
    edits = compile_edits(bank, [[Edit(0, bias=1.0), Edit(1, bias=1.0)], [Edit(1, bias=1.0)]])
    result = steer(x.clone(), bank, edits, position)
    assert result[0].isnan().any()
    torch.testing.assert_close(result[1], x[1] + bank[1])


def test_large_states_do_not_overflow_in_half_precision():
    x, *rest = case(Edit(0, slope=1.0), D=4096)
    assert steer((x * 12_000).half(), *rest).isfinite().all()


def test_new_contents_of_the_tables_change_the_next_result():
    x, bank, edits, position = case(Edit(0, bias=1.0))
    edits.bias.fill_(2.0)
    torch.testing.assert_close(steer(x.clone(), bank, edits, position), x + 2 * bank[0])


BAD = {
    "bank of another width": (lambda x, b, e, p: (x, b[:, :5], e, p), "16 wide"),
    "positions of another length": (lambda x, b, e, p: (x, b, e, p[:, :2]), "of 3 positions"),
    "edits of another batch": (lambda x, b, e, p: (x.repeat(2, 1, 1), b, e, p.repeat(2, 1)), "2"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_with_its_sizes(name):
    spoil, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        steer(*spoil(*case(Edit(0, bias=1.0))))


def test_a_direction_that_is_not_in_the_bank_is_refused():
    with pytest.raises(ValueError, match="direction 3 of a bank of 3"):
        case(Edit(3, bias=1.0))


def test_the_kernels_do_without_tinysteer():
    import subprocess
    import sys

    code = "import sys, tinysteer_kernels; sys.exit('tinysteer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
