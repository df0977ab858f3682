"""Plans on disk: the edits they stand for, and what is said of those that are wrong."""

import json

import pytest
import torch

import tinysteer as ts


@pytest.fixture
def vectors(tmp_path):
    """Two vectors of four layers, saved as a.safetensors and b.safetensors."""
    made = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        made[name] = ts.SteeringVector._from_means(torch.randn(4, 48), torch.randn(4, 48))
        made[name].save(tmp_path / f"{name}.safetensors")
    return made


def entry(file="a", **more):
    return {"vector": f"{file}.safetensors", "layer": 1, "verb": "add"} | more


def write(path, *entries):
    path.write_text(json.dumps({"edits": list(entries)}))
    return path


def test_a_plan_is_the_edits_it_names_in_order(vectors, tmp_path):
    a, b = vectors.values()
    plan = write(
        tmp_path / "plan.json",
        entry(),
        entry("b", layer=-1, weight=3),
        entry(verb="to_target", alpha=0.5, target=2.0, where="generation"),
        entry("b", layer=2, verb="at_least", where=[0, 16]),
        entry(verb="at_most", target=-1, where=[None, 0]),
        entry(verb="ablate", where="prompt"),
    )
    assert ts.load_plan(plan) == [
        a.at(1).add(),
        b.at(3).add(weight=3.0),
        a.at(1).to_target(0.5, target=2.0, where="generation"),
        b.at(2).at_least(where=(0, 16)),
        a.at(1).at_most(target=-1.0, where=(None, 0)),
        a.at(1).ablate(where="prompt"),
    ]


def test_a_plan_may_be_a_dict(vectors, tmp_path):
    plan = {"edits": [entry(weight=2.0)]}
    assert ts.load_plan(plan, folder=tmp_path) == [vectors["a"].at(1).add(weight=2.0)]


def test_the_command_line_takes_a_plan(vectors, model, checkpoint, tmp_path, capsys):
    from tinysteer.cli import main

    plan = write(tmp_path / "plan.json", entry(weight=40.0))
    folder = str(checkpoint("llama: grouped heads")[0])
    spec = f"{tmp_path / 'b.safetensors'}@2:add=9"
    flags = ["--steer", str(plan), "--steer", spec, "--max-new-tokens", "9"]
    assert main(["generate", "-m", folder, "hello", *flags]) == 0
    edits = [vectors["a"].at(1).add(weight=40.0), vectors["b"].at(2).add(weight=9.0)]
    expected = ts.load(folder).complete("hello", edits, max_new_tokens=9)
    assert capsys.readouterr().out == expected + "\n"


WRONG = {
    "no list": ({"edits": {}}, "'edits' must be a list"),
    "a key misspelt": ({"edit": []}, "'edit' is not a key of a plan"),
    "another key": ({"edits": [], "layers": 1}, "'layers' is not a key of a plan"),
    "no object": ({"edits": [1]}, r"edits\[0\] is 1, not an object"),
    "no vector": ({"edits": [{"layer": 1, "verb": "add"}]}, r"edits\[0\].vector is missing"),
    "no verb": ({"edits": [{"vector": "a", "layer": 1}]}, r"edits\[0\].verb is missing"),
    "a needed key misspelt": (
        {"edits": [{"vector": "a", "layr": 1, "verb": "add"}]},
        r"edits\[0\].layer is missing; 'layr' is not a key",
    ),
    "unknown verb": ({"edits": [entry(verb="push")]}, r"edits\[0\].verb is 'push'; .* one of add"),
    "misspelt": ({"edits": [entry(), entry(wieght=1)]}, r"edits\[1\].wieght is not a key of add"),
    "another verb's": ({"edits": [entry(alpha=1)]}, r"edits\[0\].alpha is not a key of add"),
    "a number as text": (
        {"edits": [entry(weight="1")]},
        r"edits\[0\].weight is '1'; it must be a finite num",
    ),
    "half a layer": ({"edits": [entry(layer=1.5)]}, r"edits\[0\].layer is 1.5; it must be"),
    "true as a layer": ({"edits": [entry(layer=True)]}, r"edits\[0\].layer is True; it must be"),
    "unknown window": ({"edits": [entry(where="now")]}, r"edits\[0\].where is 'now'; it must be"),
    "half a window": ({"edits": [entry(where=[1])]}, r"edits\[0\].where is \[1\]; it must"),
    "an empty window": ({"edits": [entry(where=[3, 3])]}, r"edits\[0\].where is \[3, 3\]; it must"),
    "no such layer": ({"edits": [entry(layer=9)]}, r"edits\[0\].layer: layer 9: this"),
    "a huge number": ({"edits": [entry(weight=10**400)]}, r"edits\[0\].weight is 1000"),
    "no file": ({"edits": [entry("gone")]}, r"edits\[0\].vector: there is no .*gone.saf"),
    "no number": ({"edits": [entry(weight=float("nan"))]}, r"edits\[0\].weight is nan; it must"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_plan_names_the_key(name, vectors, tmp_path):
    content, sentence = WRONG[name]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    with pytest.raises((ValueError, FileNotFoundError), match=f"plan.json: {sentence}"):
        ts.load_plan(path)


def test_a_plan_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no plan .*none.json"):
        ts.load_plan(tmp_path / "none.json")
    for text in ("{", '{"edits":' + "[" * 100_000, '{"edits": [], "edits": []}'):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ValueError, match=r"plan.json is not valid JSON"):
            ts.load_plan(tmp_path / "plan.json")
