"""The host's compiler: tables whose recurrence gives the same as one move after another."""

import math

import pytest
import torch
from tinysteer_kernels import Move, compile_moves
from tinysteer_kernels.naive import steer_naive
from torch.nn.functional import normalize

LEANING = 0.5  # added to random directions: far from orthogonal


def unit_rows(N, D, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(N, D, generator=generator) + LEANING, dim=-1).to(dtype)


def by_recurrence(h, bank, tables):
    """h (D,) float64 after one row's moves, from projections and tables alone."""
    u = bank.double()[tables.index[0].long().clamp(min=0)]
    p, d = u @ h, []
    for k in range(len(u)):
        seen = p[k] + sum(d[j] * tables.gram[0, k, j].double() for j in range(k))
        move = (tables.bias[0, k] - tables.slope[0, k] * seen).clamp(
            tables.low[0, k], tables.high[0, k]
        )
        d.append(move * (tables.index[0, k] >= 0))
    return h + torch.stack(d) @ u


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_recurrence_equals_one_move_after_another(dtype):
    bank = unit_rows(5, 64, dtype=dtype)
    row = [
        Move(0, bias=3.0),
        Move(1, bias=1.0, slope=1.0),
        Move(2, slope=1.0),
        Move(3, bias=-2.0, slope=1.0, low=0.0),
        Move(4, bias=-2.0, slope=1.0, high=0.0),
        Move(0, bias=0.25, slope=0.5),
    ]
    h = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = steer_naive(h[None, None], bank, [row])[0, 0]
    result = by_recurrence(h, bank, compile_moves(bank, [row]))
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


def test_the_gram_matrix_is_that_of_the_stored_rows_in_float64():
    bank = unit_rows(3, 512, dtype=torch.bfloat16)
    tables = compile_moves(bank, [[Move(0), Move(2)]])
    u = bank.double()
    assert tables.gram[0, 1, 0].item() == torch.dot(u[0], u[2]).float().item()
    assert tables.gram[0, 0, 0].item() == torch.dot(u[0], u[0]).float().item()


@pytest.mark.parametrize(("n", "K"), {0: 0, 1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 16: 16, 17: 20}.items())
def test_rows_are_filled_up_to_what_the_kernel_takes_at_a_time(n, K):
    tables = compile_moves(unit_rows(3, 8), [[Move(1, bias=2.0)] * n, []])
    assert tables.index.shape == (2, K)
    assert tables.gram.shape == (2, K, K)
    assert tables.index[0].tolist() == [1] * n + [-1] * (K - n)
    assert not tables.gram[1].any()


def test_capacity_is_kept_for_later_moves():
    bank = unit_rows(3, 8)
    tables = compile_moves(bank, [[], []], capacity=6)
    new = compile_moves(bank, [[Move(2, bias=1.0)], []], capacity=6)
    kept = tables.packed.data_ptr()
    assert tables.copy_(new) is tables
    assert tables.packed.data_ptr() == kept
    assert torch.equal(tables.packed, new.packed)


def test_contents_of_another_shape_are_refused():
    bank = unit_rows(3, 8)
    tables = compile_moves(bank, [[], []], capacity=2)
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(1, 2\).*capacity"):
        tables.copy_(compile_moves(bank, [[]], capacity=2))


def test_all_lies_in_one_tensor_with_a_view_of_each_field():
    rows = [[Move(0, -2.5, 0.75, -1.0, 9.0, -3, 4), Move(2, 1e-30)], [Move(1, 3.0)]]
    tables = compile_moves(unit_rows(3, 8), rows)
    assert tables.packed.dtype == torch.int32
    assert tables.packed.shape == (2, 7 + 2, 2)
    assert tables.packed.is_contiguous()
    for i, field in enumerate(Move._fields):
        view = getattr(tables, field)
        assert view.dtype == (torch.int32 if type(rows[0][0][i]) is int else torch.float32)
        assert view[0].tolist() == torch.tensor([move[i] for move in rows[0]]).tolist()
        assert view[1].tolist() == [rows[1][0][i], Move()[i]]
    tables.bias[0, 0] = 7.0
    tables.gram[1, 0, 1] = 0.5
    assert tables.packed.view(torch.float32)[0, 1, 0] == 7.0
    assert tables.packed.view(torch.float32)[1, 7, 1] == 0.5


def random_moves(generator, n):
    """n moves of a bank of 3, of any kind."""
    numbers = torch.randn(n, 4, generator=generator).tolist()
    whole = torch.randint(3, (n, 3), generator=generator).tolist()
    return [
        Move(i, a, b, min(c, d), max(c, d), first, first + more)
        for (i, first, more), (a, b, c, d) in zip(whole, numbers, strict=True)
    ]


def test_all_layers_in_one_pass_are_each_layer_alone():
    generator, bank = torch.Generator().manual_seed(0), unit_rows(3, 8)
    rows = [
        [(L, move) for L in (2, 0, 3) for move in random_moves(generator, (r * L) % 5)]
        for r in range(6)
    ]
    rows[4] = rows[1]
    whole = compile_moves(bank, rows, n_layers=4)
    K = whole.packed.shape[-1]
    assert whole.packed.shape == (4, 6, 7 + K, K)
    for layer in range(4):
        alone = [[move for L, move in row if layer == L] for row in rows]
        assert torch.equal(whole[layer].packed, compile_moves(bank, alone, capacity=K).packed)
        assert whole[layer].packed.data_ptr() == whole.packed[layer].data_ptr()


def test_a_list_that_rows_share_is_read_once():
    class Counted(list):
        reads = 0

        def __iter__(self):
            Counted.reads += 1
            return super().__iter__()

    row, bank = Counted([Move(0, bias=1.0), Move(1, slope=1.0)]), unit_rows(3, 8)
    tables = compile_moves(bank, [row, [], row, row])
    assert Counted.reads == 1
    each = compile_moves(bank, [list(row), [], list(row), list(row)])
    assert torch.equal(tables.packed, each.packed)


def test_rows_that_name_the_same_directions_share_a_product():
    """However they are spread over layers and rows, every Gram matrix is its row's own."""
    bank = unit_rows(4, 32)
    names = [[0, 1, 2], [2, 1], [0, 1, 2], [3], [], [1, 1, 3, 0]]
    rows = [[Move(i, bias=1.0 * r) for i in row] for r, row in enumerate(names)]
    tables, u = compile_moves(bank, rows), bank.double()
    for row, gram in zip(names, tables.gram, strict=True):
        n = len(row) if len(row) > 1 else 0
        torch.testing.assert_close(gram[:n, :n].double(), u[row[:n]] @ u[row[:n]].T)
        assert not gram[n:].any()
        assert not gram[:, n:].any()


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(ValueError, match=f"a move at layer {layer}: there are layers 0 to 1"):
        compile_moves(unit_rows(3, 8), [[(layer, Move(0, bias=1.0))]], n_layers=2)


def test_a_direction_that_is_not_of_unit_length_cannot_be_projected_on():
    bank = 5 * unit_rows(3, 8)
    compile_moves(bank, [[Move(1, bias=1.0)]])  # adding it is well defined
    with pytest.raises(ValueError, match="direction 1 of the bank has length 5: make it 1"):
        compile_moves(bank, [[], [Move(0, bias=1.0), Move(1, slope=1.0)]])


def test_a_direction_that_is_not_finite_is_refused():
    bank = unit_rows(3, 8)
    bank[1, 2] = math.nan
    compile_moves(bank, [[Move(0, bias=1.0)]])
    with pytest.raises(ValueError, match="direction 1 of the bank is not finite"):
        compile_moves(bank, [[Move(1, bias=1.0)]])


WRONG = {
    "one flat list": ([Move(0, bias=8.0)], "list of lists"),
    "dicts": ([{"index": 0}], "list of lists"),
    "tuples for moves": ([[(0, 8.0)]], "is not a Move"),
    "a tensor for an index": ([[Move(torch.zeros(8))]], "numbers of 32 bits"),
    "a fraction for an index": ([[Move(0.5)]], "names no direction"),
    "a word for a number": ([[Move(0, bias="high")]], "numbers of 32 bits"),
    "a position beyond any float": ([[Move(0, last=10**400)]], "numbers of 32 bits"),
    "a bias that is no number": ([[Move(0, bias=math.nan)]], "bias or slope"),
    "limits the wrong way round": ([[Move(0, low=2.0, high=-2.0)]], "low above high"),
    "a direction too far": (
        [[], [Move(3, bias=1.0)]],
        "index=3.*names no direction of a bank of 3",
    ),
    "a direction before the first": ([[Move(-2, bias=1.0)]], "index=-2.*names no direction"),
    "an empty window": ([[Move(0, first=3, last=2)]], "last=2.*acts at no int32 positions"),
    "a last beyond int32": ([[Move(0, last=2**31)]], "last=2147483648.*acts at no int32 pos"),
    "a first below int32": ([[Move(0, first=-(2**31))]], "first=-2147483648.*acts at no int32 pos"),
} | {
    f"{field} beyond 32 bits": ([[Move(0, **{field: n})]], r"not finite|infinite move")
    for field, n in {"bias": 1e39, "slope": 1e39, "low": 1e39, "high": -1e39}.items()
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_list_of_moves_is_refused_in_words(name):
    rows, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        compile_moves(unit_rows(3, 8), rows)


def test_a_bank_that_is_trained_leaves_no_trace_in_tables():
    tables = compile_moves(unit_rows(3, 8).requires_grad_(), [[Move(0, slope=1.0)]])
    assert not tables.packed.requires_grad


def test_an_empty_bank_gives_empty_tables():
    tables = compile_moves(torch.empty(0, 8), [[], []], capacity=4)
    assert tables.index.tolist() == [[-1] * 4] * 2


def test_a_default_device_does_not_matter():
    bank = unit_rows(3, 8)
    torch.set_default_device("meta")
    try:
        tables = compile_moves(bank, [[Move(1, bias=2.0)]])
    finally:
        torch.set_default_device(None)
    assert tables.bias.tolist() == [[2.0]]


def test_limits_that_are_infinite_stay_so():
    tables = compile_moves(unit_rows(1, 8), [[Move(0), Move(0, low=0.0)]])
    assert tables.low.tolist() == [[-math.inf, 0.0]]
    assert tables.high.tolist() == [[math.inf, math.inf]]
