"""The kernels' PTX for Hopper, executed in numpy: as right as float64 rounded once, without races.

    PYTHONPATH=tests/helpers TRITON_INTERPRET=0 python tests/test_ptx.py 0

prints half of the outcomes as a JSON object. Downwards: a kernel that executes itself, each op's
launch beside its definition in float64, the cases, the faults that must be noticed, the laws.
"""

import json
import math
import os
import re
import subprocess
import sys
from functools import cache, partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from tinysteer_kernels import PADDING, Move, compile_moves, residual, steering
from tinysteer_kernels.decode import View, attention, gating
from tinysteer_kernels.devices import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="there is no Triton here")
BF16, FP32 = torch.bfloat16, torch.float32
KERNELS = [
    (steering, "steer_kernel", steering.steer_kernel),
    (residual, "add_steer_norm_kernel", residual.add_steer_norm_kernel),
    (attention, "attend_kernel", attention.attend_kernel),
    (attention, "combine_kernel", attention.combine_kernel),
    (gating, "gated_kernel", gating.gated_kernel),
]
EPS = 1e-6


# Instead of a GPU.


def put_executors(change=lambda ptx: ptx, **forced) -> list:
    """Replace the kernels by what executes their PTX, after a change of it or of arguments."""
    from compiled import Recorder, compile_as_launched, parameters
    from ptx import Memory, launch

    class Executor(Recorder):
        races = 0

        def __getitem__(self, grid):
            record = super().__getitem__(grid)

            def run(*positional, **named):
                record(*positional, **named)
                kernel, memory, values = compile_as_launched(self, 90), Memory(), []
                known = {name: forced[name] for name in forced if name in self.arguments}
                handed = parameters(self) | known
                for value in handed.values():
                    is_tensor = isinstance(value, torch.Tensor)
                    values.append(memory.put(*in_memory(value)) if is_tensor else value)
                ptx, shared = change(kernel.asm["ptx"]), kernel.metadata.shared
                self.races += launch(ptx, memory, values, self.grid, shared)
                for pointer, value in zip(values, handed.values(), strict=True):
                    if isinstance(value, torch.Tensor):
                        in_memory(value)[0][:] = memory.get(pointer)

            return run

    executors = [Executor(kernel) for _, _, kernel in KERNELS]
    for (module, name, _), executor in zip(KERNELS, executors, strict=True):
        setattr(module, name, executor)
    return executors


def in_memory(tensor):
    """The bytes from a tensor's first element to its last, an array; and their misalignment."""
    size = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size, start = (n * tensor.itemsize for n in (size + 1, tensor.storage_offset()))
    raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), start, (size,))
    return raw.numpy(), tensor.data_ptr() % 16


# The ops: random arguments, the launch, and the definition in float64. Each returns, by name, what
# came out, exactly what should, and the latter rounded; and whether all else kept its bits.


def drawn(B, T, K, D, shared, bank_dtype, placed, slotted):
    """bank, rows of edits (of each slot where there are slots), position, slot."""
    n = K if shared else K * B
    bank = F.normalize(torch.randn(n + 1, D) + 0.5, dim=-1).to(bank_dtype)[:n]
    verbs = [{"slope": 1.0}, {"slope": 0.5, "low": 0.0}, {}, {"slope": 1.0, "high": 0.0}]
    windows = [{}, {"first": 0}, {"last": 1}] if placed else [{}]
    rows = [
        [
            Move(
                k if shared else b * K + k,
                bias=float(5 * torch.randn(())),
                **verbs[(b + k) % 4],
                **windows[k % len(windows)],
            )
            for k in range(K)
        ]
        for b in range(B)
    ]
    rows[1] = []
    position = slot = None
    if placed:
        position = torch.arange(T, dtype=torch.int32).repeat(B, 1)
        position[-1, 0] = PADDING if T > 1 else 0
    if slotted:
        slot = torch.tensor([2, -1, 0], dtype=torch.int32)
    return bank, rows, position, slot


def one_by_one(x, bank, rows, position, slot):
    """The definition: each edit reads the state that those before it left."""
    h = x.double()
    for b in range(len(h)):
        entry = b if slot is None else int(slot[b])
        at = torch.zeros(h.shape[1]) if position is None else position[b]
        for edit in rows[entry] if entry >= 0 else []:
            u = bank[edit.index].double()
            d = (edit.bias - edit.slope * (h[b] @ u)).clamp(edit.low, edit.high)
            d = d * ((edit.first <= at) & (at <= edit.last) & (at != PADDING))
            h[b] += d[:, None] * u
    return h


def steer(T, K, D=320, shared=False, bank_dtype=BF16, placed=False, slotted=False, short=0):
    """`short`: directions that the bank lacks."""
    around = 3 * torch.randn(3, T, D + 16).to(BF16)
    x, before = around[..., 8 : D + 8], around.clone()
    bank, rows, position, slot = drawn(3, T, K, D, shared, bank_dtype, placed, slotted)
    exact = one_by_one(x, bank, rows, position, slot)
    tables = compile_moves(bank, rows)
    bank = bank[: len(bank) - short]
    steering.steer_launch(x, bank, tables, position, slot)
    unmoved = (exact == before[..., 8 : D + 8]).all(-1)
    kept = torch.equal(x[unmoved], before[..., 8 : D + 8][unmoved]) and bool(unmoved[1].all())
    before[..., 8 : D + 8] = x
    return {"x": (x, exact, exact.to(BF16))}, kept and torch.equal(around, before)


def rms_norm(h, weight, offset):
    """Of bfloat16, in float64 but for Llama's rounding before the weight."""
    y = h.double() * (h.double().square().mean(-1, keepdim=True) + EPS).rsqrt()
    return y * (offset + weight.double()) if offset else y.to(BF16).double() * weight.double()


def add_steer_norm(T, K, D=576, post=False, offset=0.0, slotted=False):
    x, delta = 3 * torch.randn(3, T, D).to(BF16), torch.randn(3, T, D).to(BF16)
    weight, post_weight = (torch.randn(2, D) + 1 - offset).to(BF16)
    given, before = [x, delta, weight, post_weight], [x.clone(), delta.clone()]
    step = rms_norm(delta, post_weight, offset) if post else delta
    # Llama's norm ends in a product, which a compiler may fuse with the sum: it rounds once.
    step = step if post and not offset else step.to(BF16)
    summed = (x + step).to(BF16)
    exact, steered = summed.double(), (None,) * 4
    if K:
        bank, rows, position, slot = drawn(3, T, K, D, False, BF16, False, slotted)
        exact = one_by_one(summed, bank, rows, position, slot)
        steered = bank, compile_moves(bank, rows), position, slot
    post_weight = post_weight if post else None
    new, y = residual.add_steer_norm_launch(x, delta, weight, EPS, offset, post_weight, *steered)
    normed = rms_norm(new, weight, offset)
    results = {"x": (new, exact, exact.to(BF16)), "y": (y, normed, normed.to(BF16))}
    kept = torch.equal(new[1], summed[1])
    return results, kept and all(map(torch.equal, given, before))


def attend(D, S=80, now=70, H=4, G=2, B=2, R=None, window=None, cap=None, normed=False):
    qkv, R = torch.randn(B, 1, (H + 2 * G) * D).to(BF16), R or D
    k, v = torch.randn(2, B, G, S, D).to(BF16)
    k[:, :, now:] = v[:, :, now:] = math.nan
    angles = torch.randn(B, 1, 1, R // 2)
    cos = torch.cat([angles.cos()] * 2, dim=-1).to(BF16)
    sin = torch.cat([-angles.sin(), angles.sin()], dim=-1).to(BF16)
    start = torch.arange(B) * 3
    weights = (torch.randn(2, D) + 1).to(BF16) if normed else (None, None)
    traits = attention.Traits(2 / D**0.5, cap, *weights, EPS, 0.0)
    caches = [(x, x.clone()) for x in (k, v)]
    view = View(cos, sin, torch.tensor([now]), start, now + 1, window)
    y = attention.attend_launch(qkv, k, v, view, traits)

    heads = qkv.view(B, H + 2 * G, D)
    q, new, value = heads.split((H, G, G), dim=1)
    if normed:
        q, new = (rms_norm(x, w, 0.0).to(BF16) for x, w in zip((q, new), weights, strict=True))
    q, new = (turned(x.double(), cos[:, 0].double(), sin[:, 0].double()) for x in (q, new))
    keys, values = (before.double().clone() for _, before in caches)
    keys[:, :, now], values[:, :, now] = new.to(BF16).double(), value.double()
    keys, values = (x[:, :, : now + 1].repeat_interleave(H // G, 1) for x in (keys, values))
    scores = (keys @ q.to(BF16).double()[..., None])[..., 0] * traits.scale
    scores = scores if cap is None else cap * (scores / cap).tanh()
    column = torch.arange(now + 1)
    seen = (column >= start[:, None]) & (column > now - (window or S))
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    shares = (scores - scores.amax(-1, keepdim=True)).exp()
    exact, rounded = (
        ((p[..., None] * values).sum(2) / shares.sum(-1)[..., None]).view(y.shape)
        for p in (shares, shares.to(BF16).double())
    )
    kept = all(torch.equal(x[:, :, :now], before[:, :, :now]) for x, before in caches)
    kept &= torch.equal(v[:, :, now], value) and bool(k[:, :, now + 1 :].isnan().all())
    return {"y": (y, exact, rounded.to(BF16)), "k": (k[:, :, now], new, new.to(BF16))}, kept


def turned(x, cos, sin):
    R = cos.shape[-1]
    first = x[..., :R] * cos + x[..., :R].roll(R // 2, dims=-1) * sin
    return torch.cat((first, x[..., R:]), dim=-1)


def gated(activation, N=1500):
    x = 2 * torch.randn(3, 1, 2 * N).to(BF16)
    before = x.clone()
    y = gating.gated_launch(x, activation)
    gate, up = x.double().chunk(2, dim=-1)
    exact = gating.ACTIVATIONS[activation](gate).to(BF16).double() * up
    return {"y": (y, exact, exact.to(BF16))}, torch.equal(x, before)


# Cases and faults.

BANKS = {"": {}, ", position": {"placed": True}, ", float32": {"bank_dtype": FP32, "placed": True}}
WIDTHS = {1: 64, 4: 320, 8: 576}  # by edits
CASES = {f"gated, {name}": (gated, {"activation": name}) for name in ("silu", "gelu_tanh", "gelu")}
STEERED = [*product((1, 5), WIDTHS, BANKS, (False, True), (False,))]
STEERED += product((1, 5), WIDTHS, [", position"], (False,), (True,))
for T, K, bank, shared, slotted in STEERED:
    name = f"steer, {T} positions, {K} edits, {'shared' if shared else 'own'} directions"
    sizes = {"T": T, "K": K, "D": WIDTHS[K], "shared": shared, "slotted": slotted}
    CASES[f"{name}{bank}{', slots' * slotted}"] = steer, sizes | BANKS[bank]
ADDED = [*product((1, 5), (0, 4), (False, True), (0.0, 1.0), (False,))]
ADDED += product((1, 5), (4,), (False, True), (1.0,), (True,))
for T, K, post, offset, slotted in ADDED:
    name = f"add_steer_norm, {T} positions, {K} edits, offset {offset}{', post-norm' * post}"
    sizes = {"T": T, "K": K, "post": post, "offset": offset, "slotted": slotted}
    CASES[f"{name}{', slots' * slotted}"] = add_steer_norm, sizes
CASES |= {
    "attend, 64 wide": (attend, {"D": 64}),
    "attend, 96 wide": (attend, {"D": 96, "H": 3, "G": 3}),
    "attend, 128 wide": (attend, {"D": 128}),
    "attend, 256 wide": (attend, {"D": 256, "H": 2, "G": 1}),
    "attend, part of a head turns": (attend, {"D": 96, "R": 64}),
    "attend, a window": (attend, {"D": 64, "window": 20}),
    "attend, soft-capped": (attend, {"D": 64, "cap": 2.0}),
    "attend, normed heads": (attend, {"D": 128, "normed": True}),
    "attend, shares": (attend, {"D": 64, "S": 600, "now": 590, "G": 1}),
    "attend, shares of a window": (attend, {"D": 128, "S": 600, "now": 590, "window": 300}),
    "attend, many columns": (attend, {"D": 256, "S": 300, "now": 290, "H": 32, "G": 32, "B": 4}),
}


def without_barrier(ptx: str, which: int) -> str:
    before = list(re.finditer(r"\n\tbar\.sync\s+0;", ptx))[which]
    return ptx[: before.start()] + ptx[before.end() :]


def first_load_moved(ptx: str, n_bytes: int) -> str:
    """Of several numbers at once: it reads n_bytes further."""
    return re.sub(r"(ld\.global\.v4\.b32.*\[ %rd\d+ \+ )0", rf"\g<1>{n_bytes}", ptx, count=1)


EDITED, NORMED = {"T": 1, "K": 4, "D": 576}, {"T": 1, "K": 4, "post": True}
NO_WAIT = partial(re.sub, r"cp\.async\.wait_group\s+\d+;", "")
BARRIERS = {f"barrier {i} is missing": i for i in range(5)}
FAULTS = {  # op, its arguments, what is done to the PTX, arguments that are forced
    name: (add_steer_norm, NORMED, partial(without_barrier, which=i), {})
    for name, i in BARRIERS.items()
} | {
    "a copy is not waited for": (attend, {"D": 64}, NO_WAIT, {}),
    "a direction is missing": (steer, EDITED | {"short": 1}, str, {}),
    "a load is off by a number": (steer, EDITED, partial(first_load_moved, n_bytes=2), {}),
    "a load is off by a group": (steer, EDITED, partial(first_load_moved, n_bytes=16), {}),
    "a stride is wrong": (steer, EDITED | {"T": 5}, str, {"stride_t": 576}),
}


def outcome(op, arguments, change=str, forced=None) -> dict:
    """What the laws are about; errors are relative to those that they must have."""
    from ptx_memory import AddressError

    torch.manual_seed(0)
    executors = put_executors(change, **(forced or {}))
    try:
        results, kept = op(**arguments)
    except AddressError as error:
        return {"fault": str(error)}
    errors = {}
    for name, (ours, exact, rounded) in results.items():
        error, least = ((x.double() - exact).norm().item() for x in (ours, rounded))
        errors[name] = error / max(least, 1e-9) if error else 1.0
    return {"fault": None, "errors": errors, "kept": kept, "races": sum(x.races for x in executors)}


@cache
def started() -> list[subprocess.Popen]:
    """By processes of their own: this one's kernels are interpreted."""
    settings = {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    settings |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([sys.executable, __file__, half], env=os.environ | settings, **pipes)
        for half in "01"
    ]


@cache
def outcomes() -> dict[str, dict]:
    found = {}
    for process in started():
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        found |= json.loads(out)
    return found


# The laws.


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_float64_rounded_once(name):
    """Within 1 % by their norms. Of attention the probabilities are rounded once, too."""
    errors = outcomes()[name]["errors"]
    assert all(error <= 1.01 for error in errors.values()), errors  # of which NaN is none


@pytest.mark.parametrize("name", CASES)
def test_every_address_is_aligned_and_in_a_tensor(name):
    assert outcomes()[name]["fault"] is None


@pytest.mark.parametrize("name", CASES)
def test_no_warp_writes_what_another_may_be_looking_at(name):
    assert outcomes()[name]["races"] == 0


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_to_change_keeps_its_bits(name):
    assert outcomes()[name]["kept"]


@pytest.mark.parametrize("name", BARRIERS)
def test_a_missing_barrier_is_a_race(name):
    assert outcomes()[name]["races"] > 0


def test_a_copy_that_nobody_waits_for_is_a_race():
    assert outcomes()["a copy is not waited for"]["races"] > 0


def test_an_access_beyond_a_tensor_is_noticed():
    assert "in no array" in outcomes()["a direction is missing"]["fault"]


def test_an_access_that_is_not_aligned_is_noticed():
    assert "not aligned" in outcomes()["a load is off by a number"]["fault"]


@pytest.mark.parametrize("name", ["a load is off by a group", "a stride is wrong"])
def test_a_wrong_address_inside_a_tensor_is_a_wrong_result(name):
    fault = outcomes()[name]
    assert fault["fault"] or not max(fault["errors"].values()) < 2


def main() -> None:
    todo = {name: (*case, str, {}) for name, case in CASES.items()} | FAULTS
    names = list(todo)[int(sys.argv[1]) :: 2]
    print(json.dumps({name: outcome(*todo[name]) for name in names}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
