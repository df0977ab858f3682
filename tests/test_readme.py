"""What the READMEs show is run: their Python, and their commands as far as their grammar."""

import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import tinysteer as ts
from tinysteer.cli import parser

ROOT = Path(__file__).parents[1]
PLACES = ("README.md", "kernels/README.md", "bench/README.md", "tinysteer/experiments/README.md")
TEXTS = {place: (ROOT / place).read_text(encoding="utf-8") for place in PLACES}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
FIRST, VERBS, SERVICE, BRIDGE, KERNEL = (
    text for language, text in BLOCK.findall(TEXTS["README.md"]) if language == "python"
)


@pytest.fixture
def scope(monkeypatch, tmp_path):
    """Where the examples have run so far, one behind the other."""
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(FIRST, scope)
    return scope


def test_the_first_example_prints_what_stands_behind_it(scope, capsys):
    printed = next(text for language, text in BLOCK.findall(TEXTS["README.md"]) if not language)
    plain, steered = printed.splitlines()
    question, steer = "What is a bakery?", [scope["shout"].at(4).to_target(where="last")]
    assert scope["model"].complete([question] * 2, [[], steer]) == [plain, steered]


def test_the_verbs_example_runs(scope, capsys):
    exec(VERBS, scope)
    out = capsys.readouterr().out
    assert "<- last prompt token" in out
    assert "KITE" in out  # by the slider
    assert ts.SteeringVector.load("shout.safetensors") == scope["shout"]


def test_the_service_answers_each_request_by_its_own_edits(scope, capsys):
    exec("v = shout.at(4)\n" + SERVICE, scope)
    assert scope["loud"].text.isupper()
    assert not scope["plain"].text.isupper()
    assert scope["loud"].reason == "stop"
    assert scope["loud"].tokens[-1] in scope["model"].tokenizer.stop_ids
    many = [
        threading.Thread(target=scope["ask"], args=(f"What is {x}?", [])) for x in "abcdefghijk"
    ]
    for thread in many:
        thread.start()
    for thread in many:
        thread.join(60)
    assert scope["waiting"].empty()


def test_the_bridge_gives_the_same_text_as_the_same_edit_here(scope):
    pytest.importorskip("transformers")
    exec(BRIDGE, scope)
    model = ts.load(dtype="float32")
    ids = torch.tensor([model.tokenizer.chat("What is a kite?")])
    said = scope["theirs"].generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    scope["hook"].remove()
    ours = model.generate("What is a kite?", scope["edit"], max_new_tokens=20)
    assert ours.tokens == said.tolist()
    assert ours.text != model.complete("What is a kite?", max_new_tokens=20)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_kernel_of_ones_own_is_checked_by_the_bench(wrong, tmp_path):
    text = KERNEL.replace("tables.bias", "-tables.bias") if wrong else KERNEL
    (tmp_path / "mine.py").write_text(text)
    command = [sys.executable, "-m", "bench.kernels.steer", "--kind", "adds"]
    command += ["--with", f"{tmp_path / 'mine.py'}:mine"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == wrong, run.stderr
    assert ("is refused at" in run.stderr) == wrong


@pytest.mark.parametrize("place", PLACES)
def test_every_command_is_one(place):
    shell = "\n".join(text for language, text in BLOCK.findall(TEXTS[place]) if language == "sh")
    commands = re.findall(r"(?:^|&& )(tinysteer .*)$", shell, flags=re.MULTILINE)
    assert commands or place in ("kernels/README.md", "bench/README.md")
    for command in commands:
        parser().parse_args(shlex.split(command)[1:])
    modules = re.findall(r"python -m (bench[\w.]+)", TEXTS[place])
    assert all((ROOT / module.replace(".", "/")).with_suffix(".py").exists() for module in modules)
    assert not re.findall(r"python bench/", TEXTS[place])


@pytest.mark.parametrize("place", PLACES)
def test_the_files_it_names_are_there(place):
    named = re.findall(r"[( `]((?:bench|tests|kernels|tinysteer)/[\w/.-]+\.\w+)", TEXTS[place])
    links = [(ROOT / place).parent / path for path in re.findall(r"\]\(([^)#:]+)\)", TEXTS[place])]
    missing = [
        str(path) for path in [*(ROOT / name for name in named), *links] if not path.exists()
    ]
    assert not missing


@pytest.mark.parametrize("place", PLACES)
def test_it_is_written_for_a_reader_with_five_minutes(place):
    assert len(TEXTS["README.md"].splitlines()) < 180
    text = BLOCK.sub("", TEXTS[place])
    assert not re.findall(r"\bis no\b|\.\.\.|…|not yet measured", text)
    prose = "\n".join(line for line in text.splitlines() if not line.startswith(("|", "#", "    ")))
    for paragraph in re.split(r"\n\s*\n|\n(?=[-\d] |\d\.)", re.sub(r"\]\([^)]*\)", "]", prose)):
        for sentence in re.split(r"(?<=[.!?:;])\s+", paragraph):
            assert len(re.findall(r"[\w'-]+", re.sub(r"`[^`]*`", "x", sentence))) <= 35, sentence
