"""The demo is run once, whole, and must show what it promises."""

import io
import json
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch

from tinysteer import cli
from tinysteer.demo import show


@pytest.fixture(scope="module")
def shown():
    """(its data, what it printed)"""
    said = io.StringIO()
    data = show.measure(partial(print, file=said))
    return data, said.getvalue()


def test_the_first_steered_text_is_in_capitals(shown):
    data, said = shown
    assert data["steered"].isupper()
    assert not data["plain"].isupper()
    place = [said.index(text) for text in (data["question"], data["plain"], data["steered"])]
    assert place == sorted(place)


def test_formats_come_from_steering_alone(shown):
    data, said = shown
    rows = data["formats"]
    ways = ("neither", "steered", "random", "asked")
    means = {way: sum(row[way] for row in rows.values()) / len(rows) for way in ways}
    assert means["neither"] <= 5
    assert means["steered"] >= 80
    assert means["random"] <= 10
    assert means["asked"] >= 95
    cells = [line.rsplit(maxsplit=5) for line in said.split("\n")]
    for name, row in rows.items():
        assert [name, *(f"{row[way]:.1f}" for way in means), str(row["layer"])] in cells


def test_it_ends_with_commands_that_work(shown, tmp_path, monkeypatch, capsys):
    data, said = shown
    assert all(command in said for command in data["commands"])
    ask, steer, reproduce = data["commands"]
    monkeypatch.chdir(tmp_path)
    pairs, *steps = steer.split(" &&\n")
    echo, pair, _, file = shlex.split(pairs)
    assert echo == "echo"
    Path(file).write_text(pair + "\n")
    for command in (ask, *steps):
        assert cli.main(shlex.split(command)[1:]) == 0
    answer, extracted, steered = capsys.readouterr().out.splitlines()
    assert show.is_json(answer)
    assert " 1 pairs" in extracted
    assert steered.isupper()
    assert cli.parser().parse_args(shlex.split(reproduce)[1:]).experiment == "words"


@pytest.fixture
def quick(shown, monkeypatch):
    """`tinysteer demo` says one line and gives the data that were measured."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(show, "measure", lambda say: say("a", "row", sep="; ") or shown[0])
    yield
    torch.set_num_threads(1)


def test_the_command_prints_as_it_goes_or_one_json_object(quick, shown, capsys):
    assert cli.main(["demo"]) == 0
    assert capsys.readouterr().out == "a; row\n"
    assert cli.main(["demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["formats"] == shown[0]["formats"]


def test_one_thread_is_used_unless_somebody_wants_more(quick, monkeypatch):
    for threads, used in ((2, 2), (None, 1)):
        show.run_demo(as_json=True, threads=threads)
        assert torch.get_num_threads() == used
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    show.run_demo(as_json=True)
    assert torch.get_num_threads() == 2
