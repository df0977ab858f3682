"""The paper's rule on made-up numbers; perplexity against transformers; sweeps."""

import pytest
import torch

import tinysteer as ts
from tinysteer.evaluation import quality
from tinysteer.evaluation.quality import perplexity, repetition
from tinysteer.evaluation.selection import choose_layer, sweep, sweep_layers

CLEAN = dict.fromkeys((None, 1, 3, 5), 0.0)
CHOICES = {
    "the highest accuracy wins": ({None: 0.1, 1: 0.5, 3: 0.9, 5: 0.7}, {}, 3),
    "no steering wins ties": ({None: 0.9, 1: 0.9, 3: 0.9, 5: 0.2}, {}, None),
    "then the lowest layer": ({None: 0.1, 1: 0.2, 3: 0.9, 5: 0.9}, {}, 3),
    "one text of low perplexity disqualifies": ({None: 0.1, 1: 0.3, 3: 0.9, 5: 0.4}, {3: 0.01}, 5),
    "all disqualified": ({None: 0.0, 1: 0.3, 3: 0.9, 5: 0.4}, {1: 0.5, 3: 0.5, 5: 1.0}, None),
    "no steering keeps what it has": ({None: 1.0, 1: 0.3, 3: 0.2, 5: 0.1}, {None: 0.1}, None),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_papers_rule(name):
    accuracy, low, expected = CHOICES[name]
    assert choose_layer(accuracy, CLEAN | low) == expected


def test_as_many_low_texts_as_allowed_are_forgiven():
    accuracy = {None: 0.1, 1: 0.9}
    assert choose_layer(accuracy, {None: 0.2, 1: 0.2}, allowed=0.2) == 1
    assert choose_layer(accuracy, {None: 0.2, 1: 0.3}, allowed=0.2) is None


def test_layers_tried_are_the_papers():
    assert sweep_layers(32) == [None, *range(6, 32, 2)]
    assert sweep_layers(26) == [None, *range(5, 26, 2)]
    assert sweep_layers(42, step=3) == [None, *range(8, 42, 3)]


def test_a_layer_may_come_with_a_weight_and_steering_be_a_must():
    accuracy = {(1, -1.0): 0.5, (1, -2.0): 0.5, (3, -1.0): 0.9}
    low = dict.fromkeys(accuracy, 0.0) | {(3, -1.0): 0.1}
    assert choose_layer(accuracy, low) == (1, -1.0)  # of equals the one that was given first


def test_repetition_counts_what_recurs():
    assert repetition("a b c d e") == 0.0
    assert repetition("A b c a B c") == 0.25  # one of four
    assert repetition("no " * 12) == 0.9  # nine of ten
    assert repetition("") == repetition("too short") == 0.0


TEXTS = ["some words", "a much longer text, of many more tokens than the first", "x", "ab"]


def test_perplexity_is_transformers_loss(checkpoint):
    folder, theirs = checkpoint("llama: grouped heads")
    ours = ts.load(folder, dtype="float32")
    found = perplexity(ours, TEXTS, batch_size=3)
    for text, value in zip(TEXTS, found, strict=True):
        tokens = torch.tensor([ours.tokenizer.encode(text)])
        with torch.no_grad():
            expected = float(theirs(tokens, labels=tokens).loss.exp())
        assert value == pytest.approx(expected, rel=1e-3)


def test_of_a_long_text_the_end_counts(checkpoint, monkeypatch):
    folder, theirs = checkpoint("llama: grouped heads")
    ours = ts.load(folder, dtype="float32")
    monkeypatch.setattr(quality, "WINDOW", 8)
    tokens = torch.tensor([ours.tokenizer.encode(TEXTS[1])[-8:]])
    with torch.no_grad():
        expected = float(theirs(tokens, labels=tokens).loss.exp())
    assert perplexity(ours, [TEXTS[1]]) == [pytest.approx(expected, rel=1e-3)]


def test_a_text_without_anything_to_predict_counts_as_1(model):
    assert perplexity(model, [""]) == [1.0]
    model.tokenizer.adds_bos = False
    assert perplexity(model, ["", "x"]) == [1.0, 1.0]


def test_a_sweep_is_each_setting_alone(model):
    torch.manual_seed(0)
    vector = ts.SteeringVector._from_means(torch.randn(4, 48), torch.randn(4, 48))
    settings = {
        "off": [],
        2: [vector.at(2).add(weight=40.0)],
        3: [vector.at(3).to_target(target=30.0)],
    }
    found = sweep(model, ["one", "a second one"], settings, max_new_tokens=6)
    assert list(found) == list(settings)
    for key, edits in settings.items():
        assert found[key] == model.complete(["one", "a second one"], edits, max_new_tokens=6)
    assert len({tuple(texts) for texts in found.values()}) == 3
