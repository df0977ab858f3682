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
def report(capability: int) -> dict[str, dict]:
    """By a process of its own: this one's kernels are interpreted."""
    script = Path(__file__).with_name("compiled.py")
    run = subprocess.run(
        [sys.executable, script, str(capability)],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nothing_spills(capability):
    bad = {k: v for k, v in report(capability).items() if v["stack"] or v["spills"]}
    assert not bad


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_states_and_directions_are_loaded_128_bits_at_a_time(capability):
    for name, code in report(capability).items():
        wide = {"x", "delta", "weight", "post_weight", "bank"} & set(code["loads"])
        assert "x" in wide
        assert ("bank" in wide) == ("no edits" not in name)
        for pointer in wide:
            assert list(code["loads"][pointer]) == ["128"], f"{pointer} of {name}"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_blocks_four_edits_come_in_one_load(capability):
    loads = report(capability)["fused, decode"]["loads"]
    for table in ("bias", "low", "high"):
        assert loads[f"edits.{table}"] == {"128": 1}, table


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_layouts_agree_so_that_only_reductions_wait(capability):
    """A reduction over D takes up to two barriers. Another type for the bank changes layouts."""
    for name, code in report(capability).items():
        assert code["barriers"] <= 6 or "precise bank" in name, name


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_registers_leave_room_for_512_threads_on_a_multiprocessor(capability):
    assert all(code["registers"] <= 128 for code in report(capability).values())
