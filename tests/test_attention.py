"""Attention of a decoding step: the formula and the kernel against float64, one head at a time."""

import math

import pytest
import torch
from device import DEVICE
from dispatch import Calls
from tinysteer_kernels.decode import View, attend, attention, use_kernels
from tinysteer_kernels.devices import HAS_TRITON

FORMULA, KERNEL = "formula", "kernel"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="there is no Triton here")
WAYS = [FORMULA, pytest.param(KERNEL, marks=needs_triton)]


def case(B=2, H=4, G=2, S=40, D=16, R=None, now=20, dtype=torch.float32, seed=0):
    """qkv, caches filled before column `now` and NaN from there on, and what else a view takes."""
    torch.manual_seed(seed)
    R = D if R is None else R
    qkv = torch.randn(B, 1, (H + 2 * G) * D)
    k, v = torch.randn(3, B, G, S, D)[1], torch.randn(3, B, G, S, D)[2]  # one layer of several
    k[:, :, now:] = v[:, :, now:] = math.nan
    angles = torch.randn(B, 1, 1, R // 2)
    cos = torch.cat([angles.cos()] * 2, dim=-1)
    sin = torch.cat([-angles.sin(), angles.sin()], dim=-1)
    start = torch.randint(0, now + 1, (B,))
    qkv, k, v, cos, sin = (x.to(DEVICE, dtype) for x in (qkv, k, v, cos, sin))
    return qkv, k, v, (cos, sin, torch.tensor([now]).to(DEVICE), start.to(DEVICE))


def run(way, qkv, k, v, where, window=None, **settings):
    view = View(*where, reach=int(where[2]) + 1, window=window)
    if way == FORMULA:
        with use_kernels(False):
            return attend(qkv, k, v, view, **settings)
    return attention.attend_launch(qkv, k, v, view, attention.Traits(**settings))


def exact(qkv, k, v, where, window=None, scale=1.0, cap=None, q_weight=None, k_weight=None, **norm):
    """The same in float64, by the definition; k and v as they are after. -> y, k, v."""
    cos, sin, query, start = where
    qkv, k, v, cos, sin = (x.double().cpu().clone() for x in (qkv, k, v, cos, sin))
    B, G, _, D = k.shape
    heads, now = qkv.view(B, -1, D), int(query)
    H, R = heads.shape[1] - 2 * G, cos.shape[-1]

    def prepared(x, weight, b):
        if weight is not None:
            x = x / (x.square().mean() + norm["eps"]).sqrt()
            x = x * (norm["offset"] + weight.double().cpu())
        y = x.clone()
        for i in range(R // 2):
            j, c, s = i + R // 2, cos[b, 0, 0, i], sin[b, 0, 0, i + R // 2]
            y[i], y[j] = x[i] * c - x[j] * s, x[j] * c + x[i] * s
        return y

    y = torch.zeros(B, H, D, dtype=torch.double)
    for b in range(B):
        for g in range(G):
            k[b, g, now] = prepared(heads[b, H + g], k_weight, b)
            v[b, g, now] = heads[b, H + G + g]
        first = max(int(start[b]), 0 if window is None else now - window + 1, 0)
        seen = slice(min(first, now), now + 1)  # a row of padding sees itself
        for h in range(H):
            scores = k[b, h * G // H, seen] @ prepared(heads[b, h], q_weight, b) * scale
            scores = scores if cap is None else cap * (scores / cap).tanh()
            y[b, h] = scores.softmax(0) @ v[b, h * G // H, seen]
    return y.view(B, 1, H * D), k, v


CASES = {  # sizes and settings
    "grouped heads": ({}, {}),
    "one key head a query head": ({"H": 3, "G": 3}, {}),
    "one key head for all": ({"H": 6, "G": 1}, {}),
    "head_dim is no power of two": ({"D": 24}, {}),
    "part of a head turns": ({"D": 24, "R": 16}, {}),
    "a window": ({"S": 300, "now": 290}, {"window": 7}),
    "a window of one": ({}, {"window": 1}),
    "a window wider than the text": ({}, {"window": 4096}),
    "soft-capped": ({}, {"cap": 3.0}),
    "soft-capped, far beyond": ({"D": 64}, {"cap": 0.5, "scale": 30.0}),
    "the first column": ({"now": 0}, {}),
    "the last column": ({"S": 40, "now": 39}, {}),
    "many shares": ({"B": 1, "G": 1, "H": 2, "S": 1500, "now": 1400, "D": 64}, {}),
    "many shares of large scores": (
        {"B": 1, "G": 1, "H": 2, "S": 1500, "now": 1400, "D": 64},
        {"scale": 20.0},
    ),
    "no share of its own": ({"B": 1, "G": 1, "H": 2, "S": 1500, "now": 3, "D": 64}, {}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_attention_is_that_of_float64(name, way):
    sizes, settings = CASES[name]
    inputs, settings = case(**sizes), {"scale": 0.3} | settings
    y, k, v = exact(*inputs, **settings)
    torch.testing.assert_close(run(way, *inputs, **settings).double().cpu(), y, atol=4e-5, rtol=0)
    for cache, right in ((inputs[1], k), (inputs[2], v)):
        torch.testing.assert_close(cache.double().cpu(), right, atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_heads_are_normed_before_they_turn(way, offset):
    inputs = case(R=8)
    weights = {f"{x}_weight": torch.randn(16, device=DEVICE) for x in "qk"}
    settings = {"scale": 0.3, "eps": 0.1, "offset": offset, **weights}
    y, k, _ = exact(*inputs, **settings)
    torch.testing.assert_close(run(way, *inputs, **settings).double().cpu(), y, atol=1e-5, rtol=0)
    now = int(inputs[3][2])
    torch.testing.assert_close(inputs[1][:, :, now].double().cpu(), k[:, :, now], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_16_bits_lose_no_more_than_they_must(way, dtype):
    inputs = case(B=3, S=200, now=190, D=64, dtype=dtype)
    y, _, _ = exact(*inputs, scale=0.125)
    error = (run(way, *inputs, scale=0.125).double().cpu() - y).norm() / y.norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_a_row_does_not_depend_on_its_neighbours(way):
    qkv, k, v, (cos, sin, query, start) = case(B=3)
    k[0, :, 2] = math.nan
    start[:] = torch.tensor([0, 1, 5])
    ways = []
    for rows in (slice(None), slice(1, 2)):
        parts = (x[rows].clone() for x in (qkv, k, v, cos, sin))
        qkv_, k_, v_, cos_, sin_ = parts
        y = run(way, qkv_, k_, v_, (cos_, sin_, query, start[rows]), scale=0.3)
        ways.append(y[1] if len(y) > 1 else y[0])
    assert ways[0].isfinite().all()
    torch.testing.assert_close(*ways)


@needs_triton
def test_what_is_not_seen_is_not_read():
    """Beyond the filled columns, before a row's start and outside its window there may be NaN."""
    qkv, k, v, where = case(S=300, now=250)
    where[3][:] = torch.tensor([200, 249])
    k[:, :, :200] = v[:, :, :200] = math.nan
    y = run(KERNEL, qkv, k, v, where, scale=0.3)
    assert y.isfinite().all()
    k[:, :, :240] = v[:, :, :240] = math.nan
    where[3][:] = 0
    assert run(KERNEL, qkv, k, v, where, scale=0.3, window=11).isfinite().all()


@needs_triton
def test_a_program_writes_its_own_heads_alone(monkeypatch):
    """Programs run at once on a GPU: here the first alone, over poison."""
    kernel, seen = attention.attend_kernel, []

    class First:
        def __getitem__(self, grid):
            def launch(**arguments):
                arguments["y_ptr"].fill_(math.nan)
                kernel[(1,)](**arguments)
                seen.append(arguments["y_ptr"])

            return launch

    monkeypatch.setattr(attention, "attend_kernel", First())
    run(KERNEL, *case(B=67, S=70, now=60), scale=0.3)
    (y,) = seen
    written = y.view(67, 4, 16).isfinite().all(-1)
    assert written[0].tolist() == [True, True, False, False]
    assert not written[1:].any()


@needs_triton
@pytest.mark.parametrize("T", [1, 4])
def test_the_op_keeps_the_rules_of_custom_ops(T):
    qkv, k, v, (cos, sin, query, start) = case(now=20)
    k, v = k.nan_to_num(), v.nan_to_num()
    query = query + torch.arange(T, device=DEVICE)
    qkv = qkv.expand(-1, T, -1).contiguous()
    cos, sin = (x.expand(-1, -1, T, -1).contiguous() for x in (cos, sin))
    weight = torch.randn(16, device=DEVICE)
    arguments = qkv, k, v, cos, sin, query, start, 24, 9, 0.3, 5.0, weight, weight, 1e-6, 1.0
    torch.library.opcheck(attention.attend_op, arguments)


@needs_triton
def test_a_launch_allocates_its_results_and_nothing_that_grows(monkeypatch):
    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: None

    monkeypatch.setattr(attention, "attend_kernel", Kernel())
    monkeypatch.setattr(attention, "combine_kernel", Kernel())
    for now in (3, 1400):
        inputs = case(B=1, S=1500, now=now, D=64)
        with Calls() as calls:
            view = View(*inputs[3], reach=1500)
            attention.attend_launch(*inputs[:3], view, attention.Traits(0.3))
        assert calls.names == ["aten.new_empty.default"] * 3
