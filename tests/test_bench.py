"""What the README of kernels/ shows, and a reader's own kernel in the bench."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tinysteer_kernels.devices import HAS_TRITON

ROOT = Path(__file__).parents[1]
README = (ROOT / "kernels/README.md").read_text("utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
(MINE,) = (text for text in PYTHON if "def mine(" in text)
MINE = MINE[: MINE.index("close(")]  # the file mine.py
ADDS = """
import triton
import triton.language as tl

@triton.jit
def kernel(x, bank, tables, T, K, D: tl.constexpr, BLOCK: tl.constexpr):
    column, table = tl.arange(0, BLOCK), tables + tl.program_id(0) // T * (7 + K) * K
    at, inside = x + tl.program_id(0) * D + column, column < D
    h = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    for k in range(K):
        u = tl.load(bank + tl.load(table + k) * D + column, mask=inside, other=0.0)
        h += tl.load(table + K + k).to(tl.float32, bitcast=True) * u.to(tl.float32)
    tl.store(at, h, mask=inside)

def adds(x, bank, tables, position):
    (B, T, D), K = x.shape, tables.index.shape[1]
    BLOCK = triton.next_power_of_2(D)
    kernel[(B * T,)](x, bank, tables.packed, T, K, D=D, BLOCK=BLOCK)
    return x
"""


def bench(module: str, *options: str, folder: Path, interpret: bool = False):
    """What a command of the bench says on a CPU, from a folder."""
    settings = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))),
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_INTERPRET": str(int(interpret)),
    }
    run = {"cwd": folder, "capture_output": True, "text": True, "check": False}
    return subprocess.run([sys.executable, "-m", module, *options], env=settings, **run)


def with_mine(folder: Path, text: str, *options: str, name: str = "mine"):
    """What the command makes of a file with that text, and of a function in it."""
    (folder / "mine.py").write_text(text)
    mine = "--with", f"mine.py:{name}", *options
    return bench("bench.kernels.steer", *mine, folder=folder, interpret="triton" in text)


def test_the_examples_of_the_kernels_run():
    scope = {}
    for text in PYTHON:
        assert "close(" in text, "each holds its result against the definition"
        exec(text, scope)


def test_every_example_notices_a_kernel_that_does_nothing(monkeypatch):
    """A first run, with kernels that work, gives the examples their names."""
    import tinysteer_kernels.steering as steering

    scope = {}
    exec(PYTHON[0], scope)
    monkeypatch.setattr(steering, "steer_reference", lambda x, *_: x)
    monkeypatch.setattr(steering, "steer_launch", lambda *_: None)
    for text in PYTHON:
        with pytest.raises(AssertionError, match=r"not close"):
            exec(text, scope)


def test_a_readers_right_kernel_is_timed(tmp_path):
    assert len([line for line in MINE.splitlines() if line.strip()]) <= 8
    done = with_mine(tmp_path, MINE, "--kind", "targets", "--json", "lines.jsonl")
    assert done.returncode == 0, done.stderr
    assert "mine.py:mine is right: targets" in done.stdout
    assert len(re.findall(r"\| \d+ 1 \d+ 4 +\| \S+ +\| \S+ [+-][\d.,]+\.\.", done.stdout)) == 6
    lines = (tmp_path / "lines.jsonl").read_text().splitlines()
    assert len(lines) == 12
    for times in (1.0, 3.0):
        (tmp_path / f"{times}.jsonl").write_text(steady(lines, times))
    said = bench("bench.compare", "1.0.jsonl", "3.0.jsonl", folder=tmp_path)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("| 3.000 |") == said.stdout.count("slower") == 12


def test_what_was_timed_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    line = {"B": 1, "T": 1, "D": 64, "directions": "own", "fused": True, "first": True}
    line |= {"device": "a card", "date": "today", "low": 0.9, "high": 1.1, "more": 1.0, "bytes": 64}
    lines = [line | {"K": K, "way": "adds", "kind": "adds", "percent": K} for K in (1, 4)]
    code = f"from bench.kernels.plot import plot; plot({lines}, 'out.png')"
    settings = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=settings, check=True)
    assert (tmp_path / "out.png").stat().st_size > 10_000


REFUSED = {
    "go with --shape": ["--quick", "--own"],
    "leave out --shape": ["--quick", "--shape", "1,1,8,1"],
    "--kind goes with": ["--quick", "--kind", "adds"],
    "there is no file 'his.py'": ["--with", "his.py:mine"],
}


def steady(lines: list[str], times: float) -> str:
    """Lines of a machine that takes so many times as long, and never varies."""
    rows = list(map(json.loads, lines))
    for row in rows:
        row |= dict.fromkeys(("us", "us_low", "us_high"), times * row["us"])
    return "\n".join(map(json.dumps, rows))


def test_what_is_not_a_line_of_a_bench_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"us": 1.0}\n')
    said = bench("bench.compare", "a.jsonl", "a.jsonl", folder=tmp_path)
    assert said.returncode == 1
    assert "\na.jsonl:1 is not a timed line of a bench" in "\n" + said.stderr


WRONG = {
    "the last move is dropped": ("zip(*fields)", "list(zip(*fields))[:-1]"),
    "windows end too early": ("position <= last", "position < last"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_readers_wrong_kernel_is_refused_with_its_error(name, tmp_path):
    assert WRONG[name][0] in MINE
    done = with_mine(tmp_path, MINE.replace(*WRONG[name]))
    assert done.returncode == 1
    said = r"mine.py:mine is refused at Case\(.*\), torch.float32: .* off by 0\..*limit is 2e-05"
    assert re.search(said, done.stderr), done.stderr


@pytest.mark.skipif(not HAS_TRITON, reason="there is no Triton here")
def test_a_readers_kernel_in_triton_is_checked_where_there_is_no_gpu(tmp_path):
    done = with_mine(tmp_path, ADDS, "--kind", "adds", name="adds")
    assert done.returncode == 0, done.stderr
    assert "mine.py:adds is right: adds" in done.stdout


@pytest.mark.parametrize("said", REFUSED)
def test_options_that_do_not_go_together_are_refused_at_once(said, tmp_path):
    done = bench("bench.kernels.steer", *REFUSED[said], folder=tmp_path)
    assert done.returncode
    assert said in done.stderr


def test_a_readers_kernel_that_fails_or_returns_a_view_is_told_and_timed(tmp_path):
    fails = with_mine(
        tmp_path, "def mine(*_):\n    raise RuntimeError('no such tile')", "--kind", "adds"
    )
    assert "no such tile" in fails.stderr
    assert "is refused at Case(" in fails.stderr
    view = MINE.replace("def mine(", "def base(") + "\n\ndef mine(x, *rest):\n"
    view += "    return base(x.view(x.shape), *rest).view(x.shape)\n"
    done = with_mine(tmp_path, view, "--kind", "adds", "--shape", "2,1,64,2", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert "| 2 1 64 2 " in done.stdout
