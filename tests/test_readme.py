"""What README shows is run: its Python, its plan, and its commands as far as their grammar."""

import json
import re
import shlex
from pathlib import Path

import torch

import tinysteer as ts
from tinysteer.cli import parser

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
PYTHON = [text for language, text in BLOCKS if language == "python"]


def test_the_python_examples_run_and_steer(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    scope = {}
    first, *others = PYTHON
    exec(first, scope)
    assert scope["steered"].isupper()
    assert not scope["plain"].isupper()
    capsys.readouterr()
    for text in others:
        exec(text, scope)
    assert "<- last prompt token" in capsys.readouterr().out
    assert ts.SteeringVector.load("shout.safetensors") == scope["shout"]


def test_the_plan_can_be_read(tmp_path):
    vector = ts.SteeringVector._from_means(torch.randn(6, 128), torch.zeros(6, 128))
    (plan,) = (json.loads(text) for language, text in BLOCKS if language == "json")
    for entry in plan["edits"]:
        vector.save(tmp_path / entry["vector"])
    first, second = ts.load_plan(plan, folder=tmp_path)
    assert first == vector.at(4).to_target(where=(0, 1))
    assert second.move.bias == plan["edits"][1]["weight"]


def test_every_command_is_one():
    shell = "\n".join(text for language, text in BLOCKS if language == "sh")
    commands = re.findall(r"(?:^|&& )(tinysteer .*)$", shell, flags=re.MULTILINE)
    assert len(commands) == 6
    for command in commands:
        parser().parse_args(shlex.split(command)[1:])


def test_the_first_output_is_the_demos():
    shown = next(text for language, text in BLOCKS if not language)
    assert shown.startswith("<tiny-instruct: llama, 6 layers of width 128, float32>")
    for title in ("FORMATS", "MEAN WORDS", "A WORD", "TWO AT ONCE", "ANOTHER MODEL"):
        assert title in shown


def test_the_files_it_names_are_there():
    root = Path(__file__).parents[1]
    named = re.findall(r"[( `]((?:bench|tests|kernels|tinysteer)/[\w/.-]+\.\w+)", README)
    assert len(named) > 5
    assert not [name for name in named if not (root / name).exists()]
