"""What README shows is run: its Python, and its commands as far as their grammar."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import real_folder

from tinysteer.cli import parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FIRST, SECOND = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[:2]


@pytest.mark.real
def test_the_python_examples_run_and_steer(monkeypatch, tmp_path):
    folder = real_folder("smollm2")
    scope = {"open": lambda path: (ROOT / path).open(encoding="utf-8")}
    exec(FIRST.replace(MODEL, str(folder)), scope)
    assert 0 < len(scope["steered"].split()) < len(scope["plain"].split()) / 2
    monkeypatch.chdir(tmp_path)
    exec(SECOND, scope)
    assert (tmp_path / "concise.safetensors").exists()


def test_every_command_is_one():
    shell = README.replace("&&\n", "\n")
    commands = re.findall(r"^ +(tinysteer .*)$", shell, flags=re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        parser().parse_args(shlex.split(command)[1:])
