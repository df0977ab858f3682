"""Extraction against a loop over transformers' hidden states, and its laws."""

import datetime

import pytest
import torch
from oracle import last_states

import tinysteer as ts
from tinysteer.extraction import mean_residuals, principal

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


def test_base_prompts_may_be_run_once_for_several_instructions(model):
    base = mean_residuals(model, BASES, chat=False)
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
    mean_residuals(model, ["same"] * 50 + ["other"], chat=False)
    assert sum(ran) == 2


def test_a_conversation_is_a_prompt(model):
    model.tokenizer.template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    talk = [{"role": "user", "content": "hi"}]
    same = mean_residuals(model, [talk]).mean, mean_residuals(model, ["hi"]).mean
    assert torch.equal(*same)


def test_the_vector_says_where_it_came_from(model):
    model.revision = "abc"
    about = ts.extract(model, WITH, BASES, chat=False, name="capitals").metadata
    assert about["name"] == "capitals"
    assert (about["model"], about["revision"]) == ("tiny", "abc")
    assert about["pairs"] == "5"
    assert about["prompts"] == "as they are"
    assert about["dtype"] == "float32"
    assert about["tinysteer"] == ts.__version__
    assert about["date"] == datetime.date.today().isoformat()
    assert "mean difference" in about["method"]


def test_the_digest_is_of_the_pairs(model):
    def digest(with_instruction, without, **options):
        vector = ts.extract(model, with_instruction, without, chat=False, **options)
        return vector.metadata["pairs_sha256"]

    first = digest(WITH, BASES)
    base = mean_residuals(model, BASES, chat=False)
    assert len(first) == 64
    assert digest(WITH, base) == digest(WITH, BASES, method="pca") == first
    assert digest(BASES, WITH) != first
    assert digest([*WITH[:4], "another"], BASES) != first


def test_pca_is_the_first_singular_vector_of_the_differences(checkpoint):
    folder, theirs = checkpoint("llama: grouped heads")
    ours = ts.load(folder, dtype="float32")
    positive = last_states(theirs, map(ours.tokenizer.encode, WITH))  # (N, n_layers, D)
    negative = last_states(theirs, map(ours.tokenizer.encode, BASES))
    vector = ts.extract(ours, WITH, BASES, method="pca", chat=False, batch_size=2)
    assert "principal" in vector.metadata["method"]
    for layer in range(4):
        x = (positive - negative)[:, layer].double()
        u = torch.linalg.svd(x, full_matrices=False).Vh[0]
        u = u * (u @ x.mean(0)).sign()
        v = vector.at(layer)
        torch.testing.assert_close(v.direction.double(), u, atol=1e-4, rtol=1e-3)
        assert v.norm == pytest.approx(float(x.mean(0) @ u), rel=1e-3)
        assert v.target == pytest.approx(float(positive[:, layer].mean(0).double() @ u), rel=1e-3)
        assert v.baseline == pytest.approx(float(negative[:, layer].mean(0).double() @ u), rel=1e-3)


@pytest.mark.parametrize("n", [5, 60], ids=["fewer pairs than width", "more"])
def test_pca_finds_a_planted_direction_and_its_sign(n):
    """Pairs differ by u, once much and mostly little; uncentred, the mean itself is variance."""
    g = torch.Generator().manual_seed(0)
    u = torch.nn.functional.normalize(torch.randn(16, generator=g), dim=0)
    scale = torch.linspace(-0.5, 3, n)[:, None]
    differences = -(scale * u) + 0.01 * torch.randn(n, 16, generator=g)
    found = torch.nn.functional.normalize(principal(differences[None])[0].float(), dim=0)
    torch.testing.assert_close(found, -u, atol=0.02, rtol=0)


def test_pairs_that_are_none_are_refused(model):
    with pytest.raises(ValueError, match="5 with_instruction and 4 without"):
        ts.extract(model, WITH, BASES[:4])
    with pytest.raises(ValueError, match="same as those without"):
        ts.extract(model, BASES, BASES)
    with pytest.raises(ValueError, match="method 'lda' is none of 'mean', 'pca'"):
        ts.extract(model, WITH, BASES, method="lda")
    base = mean_residuals(model, BASES)
    with pytest.raises(ValueError, match="'pca' needs the prompts of without, not their mean"):
        ts.extract(model, WITH, base, method="pca")
    with pytest.raises(ValueError, match="without was measured on another model, or with another"):
        ts.extract(model, WITH, base, chat=False)
    with pytest.raises(ValueError, match="batch_size is -1"):
        ts.extract(model, WITH, BASES, batch_size=-1)
    with pytest.raises(ValueError, match="at least one prompt"):
        ts.extract(model, [], [])
    with pytest.raises(ValueError, match=r"must be a list|is a string: extract takes two lists"):
        ts.extract(model, "abc", "abd")


def test_states_that_are_not_finite_name_the_prompt_and_the_layer(model):
    model.decoder.blocks[2].mlp.down.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"prompt \d gives NaN or infinite states at layer 2"):
        mean_residuals(model, BASES, chat=False)
