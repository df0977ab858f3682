"""The kernels' machine code for GPUs that are not here: no spills, wide loads, few barriers."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from tinysteer_kernels.devices import HAS_TRITON

CAPABILITIES = {80: "Ampere", 90: "Hopper", 100: "Blackwell"}
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="there is no Triton here")


@cache
def started() -> dict[int, subprocess.Popen]:
    """All at once, by processes of their own: this one's kernels are interpreted."""
    script = Path(__file__).parent / "helpers/compiled.py"
    settings = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return {
        capability: subprocess.Popen(
            [sys.executable, script, str(capability)], env=settings, **pipes
        )
        for capability in CAPABILITIES
    }


@cache
def report(capability: int) -> dict[str, dict]:
    """What `machine_code` and `load_widths` say of each variant."""
    out, errors = started()[capability].communicate()
    assert started()[capability].returncode == 0, errors
    return json.loads(out)


def steering(capability: int) -> dict[str, dict]:
    """Of the kernels that edit."""
    edit = ("steer", "add")
    return {name: code for name, code in report(capability).items() if name.startswith(edit)}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nothing_spills(capability):
    bad = {k: v for k, v in report(capability).items() if v["stack"] or v["spills"]}
    if capability == 100:  # eight bytes, by Triton 3.9 on Blackwell alone
        assert bad.pop("add, decode, slot", {"stack": 0})["stack"] <= 8
    assert not bad


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_states_and_directions_are_loaded_128_bits_at_a_time(capability):
    for name, code in steering(capability).items():
        wide = {"x", "delta", "weight", "post_weight", "bank"} & set(code["loads"])
        assert "x" in wide
        assert ("bank" in wide) == ("no moves" not in name)
        for pointer in wide:
            assert list(code["loads"][pointer]) == ["128"], f"{pointer} of {name}"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_keys_and_values_are_copied_16_bytes_at_a_time_while_others_are_used(capability):
    codes = {n: c for n, c in report(capability).items() if n.startswith("attend")}
    assert len(codes) == 6
    assert all(code["copies"] == ["0x10"] for code in codes.values())


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_gates_are_loaded_128_bits_at_a_time(capability):
    codes = {n: c for n, c in report(capability).items() if n.startswith("gated")}
    assert [list(code["loads"]["x"]) for code in codes.values()] == [["128"]] * 2


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["add, decode", "add, decode, slot", "steer, decode"])
def test_a_blocks_four_moves_come_in_one_load(name, capability):
    """Seven fields and three lines of the Gram matrix; fields of the next block, and 32 bits more.

    Those tell all threads whether a move reads its projection.
    """
    loads = report(capability)[name]["loads"]["tables"]
    assert set(loads) == {"128", "32"}
    assert loads["128"] >= 7 + 3 + 3
    assert loads["32"] <= 4


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_layouts_agree_so_that_only_reductions_wait(capability):
    """A reduction over D takes up to two barriers. Another type for the bank changes layouts."""
    for name, code in steering(capability).items():
        assert code["barriers"] <= 7 or "precise bank" in name, name


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_two_programs_of_4_warps_fit_on_a_multiprocessor_or_one_of_more(capability):
    for name, code in report(capability).items():
        programs = 2 if code["warps"] <= 4 else 1
        assert programs * 32 * code["warps"] * code["registers"] <= 65_536, name


OPTIONAL = {
    "steer_kernel": {"position_ptr", "slot_ptr"},
    "add_steer_norm_kernel": {
        "post_weight_ptr",
        "bank_ptr",
        "tables_ptr",
        "position_ptr",
        "slot_ptr",
    },
    "attend_kernel": {"q_weight_ptr", "k_weight_ptr", "lse_ptr", "cap"},
}


@pytest.mark.parametrize("kernel", OPTIONAL)
def test_every_optional_argument_is_compiled_given_and_left_out(kernel):
    codes = [code for code in report(90).values() if code["kernel"] == kernel]
    given, absent = ({name for code in codes for name in code[key]} for key in ("given", "absent"))
    assert given & absent == absent == OPTIONAL[kernel]
