"""The demo is run once, whole, and must show what it promises."""

import json
import os
from itertools import pairwise

import pytest
import torch

from tinysteer import cli
from tinysteer.demo import show
from tinysteer.demo.measures import FORMATS, is_json

pytestmark = pytest.mark.filterwarnings("ignore:steering tiny-base")


@pytest.fixture(scope="module")
def shown():
    """(its data, what it printed)"""
    said = []
    torch.set_num_threads(os.cpu_count() or 1)
    data = show.measure(said.append)
    torch.set_num_threads(1)
    return data, "\n".join(said)


def mean(table: dict, way: str) -> float:
    return sum(row[way] for row in table.values()) / len(table)


def test_formats_come_from_steering_alone(shown):
    table = shown[0]["formats"]
    assert mean(table, "neither") <= 5
    assert mean(table, "steered") >= 80
    assert mean(table, "random") <= 10
    assert mean(table, "asked") >= 95
    assert mean(table, "both") >= 95


def test_answers_get_shorter_with_every_step_of_weight(shown):
    words = [n for weight, n in shown[0]["length"]["steered"].items() if weight != "layer"]
    assert len(words) == 5
    assert all(a > b for a, b in pairwise(words[:4]))
    assert words[3] >= words[4] - 0.5  # the last step has nothing left to shorten
    assert words[-1] < words[0] / 2
    untouched = [n for weight, n in shown[0]["length"]["random"].items() if weight != "layer"]
    assert min(untouched) > 0.8 * untouched[0]


def test_words_can_be_put_in_and_kept_out(shown):
    table = shown[0]["words"]
    assert table["put in"]["steered"] >= table["put in"]["neither"] + 50
    out = table["kept out by avoid"]
    assert out["neither"] > 50
    assert out["steered"] <= out["neither"] / 2 <= out["random"]


def test_two_formats_can_be_had_at_once(shown):
    """Not any two: what is asked for here is the pair that can be had."""
    row = shown[0]["two at once"]["lowercase + no commas"]
    assert row["neither"] == row["random"] == 0
    assert row["steered"] >= 50


def test_vectors_carry_over_to_the_base_model(shown):
    table = shown[0]["transfer"]
    assert mean(table, "steered") >= mean(table, "neither") + 40


def test_the_texts_are_those_of_the_tables(shown):
    capitals, as_json, brief = shown[0]["examples"]
    assert capitals["capitals"].isupper()
    assert is_json(as_json["json"])
    assert len(brief["brief"].split()) < len(brief["plain"].split())
    for example in shown[0]["examples"]:
        for text in example.values():
            assert text in shown[1]


def test_every_table_is_printed_with_its_control(shown):
    data, said = shown
    for table in ("formats", "length", "words", "two at once", "transfer"):
        assert "random" in data[table] or all("random" in row for row in data[table].values())
    for name in (*FORMATS, "MEAN WORDS", "put in", "TWO AT ONCE", "tiny-base"):
        assert name in said


def test_the_command_prints_the_tables_or_one_json_object(monkeypatch, capsys):
    def measure(say):
        say("a table")
        return {"formats": {}}

    monkeypatch.setattr(show, "measure", measure)
    assert cli.main(["demo"]) == 0
    assert capsys.readouterr().out == "a table\n"
    assert cli.main(["demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"formats": {}}
