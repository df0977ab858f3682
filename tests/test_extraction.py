"""Extraction against a loop over transformers' hidden states, and its laws."""

import pytest
import torch
from oracle import last_states

import tinysteer as ts

BASES = ["one", "a second request", "three words here", "one", "and a much longer request at last"]
WITH = [f"{base} (in capitals)" for base in BASES]


@pytest.mark.parametrize("variant", ["llama: grouped heads", "gemma2", "gemma3_text"])
def test_extraction_equals_one_prompt_at_a_time_through_transformers(variant, checkpoint):
    folder, theirs = checkpoint(variant)
    ours = ts.load(folder, dtype="float32")
    vector = ts.extract(ours, WITH, BASES, chat=False, batch_size=2)
    positive = last_states(theirs, map(ours.tokenizer.encode, WITH))
    negative = last_states(theirs, map(ours.tokenizer.encode, BASES))
    difference = (positive - negative).mean(0)
    u = torch.nn.functional.normalize(difference, dim=-1)
    expected = {
        "directions": u,
        "norms": difference.norm(dim=-1),
        "targets": (positive * u).sum(-1).mean(0),
        "baselines": (negative * u).sum(-1).mean(0),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(vector, name), value, atol=1e-4, rtol=1e-4)


def test_batches_change_nothing(model):
    one = ts.extract(model, WITH, BASES, chat=False, batch_size=1)
    all_ = ts.extract(model, WITH, BASES, chat=False, batch_size=16)
    torch.testing.assert_close(one.directions, all_.directions, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.targets, all_.targets)


def test_base_prompts_may_be_run_once_for_several_instructions(model, monkeypatch):
    base = ts.mean_residuals(model, BASES, chat=False)
    assert base.n == 5
    assert base.mean.shape == (4, 48)
    expected = ts.extract(model, WITH, BASES, chat=False)
    vector = ts.extract(model, WITH, base, chat=False)
    assert torch.equal(vector.directions, expected.directions)


def test_equal_prompts_are_run_once(model, monkeypatch):
    ran = []
    forward = type(model.decoder).forward

    def counting(self, tokens, *rest):
        ran.append(len(tokens))
        return forward(self, tokens, *rest)

    monkeypatch.setattr(type(model.decoder), "forward", counting)
    ts.mean_residuals(model, ["same"] * 50 + ["other"], chat=False)
    assert sum(ran) == 2


def test_a_conversation_is_a_prompt(model):
    model.tokenizer.template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    talk = [{"role": "user", "content": "hi"}]
    same = ts.mean_residuals(model, [talk]).mean, ts.mean_residuals(model, ["hi"]).mean
    assert torch.equal(*same)


def test_the_vector_says_where_it_came_from(model):
    vector = ts.extract(model, WITH, BASES, chat=False)
    assert vector.metadata["model"] == "tiny"
    assert vector.metadata["pairs"] == "5"
    assert vector.metadata["dtype"] == "float32"
    assert vector.metadata["tinysteer"] == ts.__version__
    assert "mean difference" in vector.metadata["method"]


def test_pairs_that_are_none_are_refused(model):
    with pytest.raises(ValueError, match="5 with_instruction and 4 without"):
        ts.extract(model, WITH, BASES[:4])
    with pytest.raises(ValueError, match="same as those without"):
        ts.extract(model, BASES, BASES)
    with pytest.raises(ValueError, match="batch_size is -1"):
        ts.extract(model, WITH, BASES, batch_size=-1)
    with pytest.raises(ValueError, match="at least one prompt"):
        ts.extract(model, [], [])
    with pytest.raises(ValueError, match="must be a list"):
        ts.extract(model, "abc", "abd")


def test_states_that_are_not_finite_name_the_prompt_and_the_layer(model):
    model.decoder.blocks[2].mlp.down.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"prompt \d gives NaN or infinite states at layer 2"):
        ts.mean_residuals(model, BASES, chat=False)
