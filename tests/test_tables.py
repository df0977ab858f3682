"""The host's compiler: tables whose recurrence gives the same moves as one edit after another."""

import math

import pytest
import torch
from tinysteer_kernels import Edit, Edits, compile_edits
from torch.nn.functional import normalize

LEANING = 0.5  # added to random directions: far from orthogonal


def unit_rows(N, D, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(N, D, generator=generator) + LEANING, dim=-1).to(dtype)


def by_recurrence(h, bank, edits):
    """h (D,) float64 after one row's edits, from projections and tables alone."""
    u = bank.double()[edits.index[0].long().clamp(min=0)]
    p, d = u @ h, []
    for k in range(len(u)):
        seen = p[k] + sum(d[j] * edits.gram[0, k, j].double() for j in range(k))
        move = (edits.bias[0, k] - edits.slope[0, k] * seen).clamp(
            edits.low[0, k], edits.high[0, k]
        )
        d.append(move * (edits.index[0, k] >= 0))
    return h + torch.stack(d) @ u


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_recurrence_equals_one_edit_after_another(dtype):
    bank = unit_rows(5, 64, dtype=dtype)
    row = [
        Edit(0, bias=3.0),
        Edit(1, bias=1.0, slope=1.0),
        Edit(2, slope=1.0),
        Edit(3, bias=-2.0, slope=1.0, low=0.0),
        Edit(4, bias=-2.0, slope=1.0, high=0.0),
        Edit(0, bias=0.25, slope=0.5),
    ]
    h = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = h.clone()
    for edit in row:
        u = bank[edit.index].double()
        d = min(max(edit.bias - edit.slope * float(expected @ u), edit.low), edit.high)
        expected += d * u
    result = by_recurrence(h, bank, compile_edits(bank, [row]))
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


def test_the_gram_matrix_is_that_of_the_stored_rows_in_float64():
    bank = unit_rows(3, 512, dtype=torch.bfloat16)
    edits = compile_edits(bank, [[Edit(0), Edit(2)]])
    u = bank.double()
    assert edits.gram[0, 1, 0].item() == torch.dot(u[0], u[2]).float().item()
    assert edits.gram[0, 0, 0].item() == torch.dot(u[0], u[0]).float().item()


@pytest.mark.parametrize(("n", "K"), {0: 0, 1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 16: 16, 17: 20}.items())
def test_rows_are_filled_up_to_what_the_kernel_takes_at_a_time(n, K):
    edits = compile_edits(unit_rows(3, 8), [[Edit(1, bias=2.0)] * n, []])
    assert edits.index.shape == (2, K)
    assert edits.gram.shape == (2, K, K)
    assert edits.index[0].tolist() == [1] * n + [-1] * (K - n)
    assert not edits.gram[1].any()


def test_capacity_is_kept_for_later_edits():
    bank = unit_rows(3, 8)
    tables = compile_edits(bank, [[], []], capacity=6)
    new = compile_edits(bank, [[Edit(2, bias=1.0)], []], capacity=6)
    kept = [table.data_ptr() for table in tables]
    assert tables.copy_(new) is tables
    assert [table.data_ptr() for table in tables] == kept
    assert all(torch.equal(a, b) for a, b in zip(tables, new, strict=True))


def test_contents_of_another_shape_are_refused():
    bank = unit_rows(3, 8)
    tables = compile_edits(bank, [[], []], capacity=2)
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(1, 2\).*capacity"):
        tables.copy_(compile_edits(bank, [[]], capacity=2))


def test_tables_have_the_types_that_kernels_read():
    edits = compile_edits(unit_rows(3, 8), [[Edit(0)]])
    integers = {name for name, table in edits._asdict().items() if table.dtype == torch.int32}
    assert integers == {"index", "first", "last"}
    assert all(edits._asdict()[n].dtype == torch.float32 for n in set(Edits._fields) - integers)


@pytest.mark.parametrize("index", [3, -2])
def test_a_direction_that_is_not_in_the_bank_is_refused(index):
    with pytest.raises(ValueError, match=f"direction {index} of a bank of 3"):
        compile_edits(unit_rows(3, 8), [[], [Edit(index, bias=1.0)]])


def test_a_direction_that_is_not_of_unit_length_cannot_be_projected_on():
    bank = 5 * unit_rows(3, 8)
    compile_edits(bank, [[Edit(1, bias=1.0)]])  # adding it is well defined
    with pytest.raises(ValueError, match="direction 1 of the bank has length 5: make it 1"):
        compile_edits(bank, [[], [Edit(0, bias=1.0), Edit(1, slope=1.0)]])


def test_a_direction_that_is_not_finite_is_refused():
    bank = unit_rows(3, 8)
    bank[1, 2] = math.nan
    compile_edits(bank, [[Edit(0, bias=1.0)]])
    with pytest.raises(ValueError, match="direction 1 of the bank is not finite"):
        compile_edits(bank, [[Edit(1, bias=1.0)]])


@pytest.mark.parametrize(("first", "last"), [(0, 2**31), (-(2**31), 0), (3, 2)])
def test_positions_beyond_int32_and_empty_windows_are_refused(first, last):
    with pytest.raises(ValueError, match=f"acts from {first} to {last}"):
        compile_edits(unit_rows(1, 8), [[Edit(0, bias=1.0, first=first, last=last)]])


WRONG = {
    "one flat list": ([Edit(0, bias=8.0)], "list of lists"),
    "dicts": ([{"index": 0}], "list of lists"),
    "tuples for edits": ([[(0, 8.0)]], "is no Edit"),
    "a tensor for an index": ([[Edit(torch.zeros(8))]], "is no Edit"),
    "a bias that is no number": ([[Edit(0, bias=math.nan)]], "bias or slope"),
    "limits the wrong way round": ([[Edit(0, low=2.0, high=-2.0)]], "low above high"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_list_of_edits_is_refused_in_words(name):
    rows, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        compile_edits(unit_rows(3, 8), rows)


def test_a_bank_that_is_trained_leaves_no_trace_in_tables():
    edits = compile_edits(unit_rows(3, 8).requires_grad_(), [[Edit(0, slope=1.0)]])
    assert not any(table.requires_grad for table in edits)


def test_an_empty_bank_gives_empty_tables():
    edits = compile_edits(torch.empty(0, 8), [[], []], capacity=4)
    assert edits.index.tolist() == [[-1] * 4] * 2


def test_a_default_device_does_not_matter():
    bank = unit_rows(3, 8)
    torch.set_default_device("meta")
    try:
        edits = compile_edits(bank, [[Edit(1, bias=2.0)]])
    finally:
        torch.set_default_device(None)
    assert edits.bias.tolist() == [[2.0]]


def test_limits_that_are_infinite_stay_so():
    edits = compile_edits(unit_rows(1, 8), [[Edit(0), Edit(0, low=0.0)]])
    assert edits.low.tolist() == [[-math.inf, 0.0]]
    assert edits.high.tolist() == [[math.inf, math.inf]]
