"""The embedded models: what they are, that they follow, and the laws of steering on real texts."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from lab import FORMATS, follow, hold, mean_words
from oracle import hooked

import tinysteer as ts
from tinysteer.loading.hub import ASSETS, EMBEDDED

OPTIONS = {"max_new_tokens": 112, "batch_size": 128}
LAYER = 3


@pytest.fixture(scope="session")
def questions(lab):
    return lab.questions("test")


@pytest.fixture(scope="session")
def plain(tiny, questions):
    """Answers without an instruction."""
    return tiny.complete(questions, **OPTIONS)


@pytest.fixture(scope="session")
def theirs():
    transformers = pytest.importorskip("transformers")
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(ASSETS / "tiny-instruct", dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_model_is_small_and_complete(name):
    folder = ASSETS / name
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 4_000_000
    model = ts.load(name)
    assert model.dtype == torch.bfloat16
    weights = (folder / "model.safetensors").read_bytes()
    assert (model.name, model.revision) == (name, hashlib.sha256(weights).hexdigest())
    assert (model.config.n_layers, model.config.dim) == (6, 128)


def test_the_default_model_is_the_instructed_one():
    assert ts.load().name == "tiny-instruct"


def test_an_embedded_model_has_no_revisions():
    with pytest.raises(ValueError, match="'main' is for Hub ids; tiny-base comes with the pack"):
        ts.load("tiny-base", revision="main")


def test_a_folder_of_the_same_name_is_a_path(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint("llama: grouped heads")[0], "tiny-base")
    assert ts.load("tiny-base").config.n_layers == 6
    for source in ("./tiny-base", Path("tiny-base")):
        assert ts.load(source).config.n_layers == 4


@torch.no_grad()
def test_transformers_agrees_about_the_weights_and_the_steering(tiny, theirs, vectors, questions):
    for name in ("capitals", "json"):
        edits = [vectors[name].at(LAYER).to_target()]
        for question in questions[:4]:
            tokens = torch.tensor([tiny.tokenizer.chat(question)])
            torch.testing.assert_close(
                tiny.logits(tokens), theirs(tokens).logits, atol=1e-3, rtol=1e-3
            )
            with hooked(theirs, edits):
                expected = theirs(tokens).logits
            torch.testing.assert_close(tiny.logits(tokens, edits), expected, atol=1e-3, rtol=1e-3)


def test_instructions_are_followed_on_topics_that_were_held_out(lab, tiny, plain):
    rates = {}
    for name in FORMATS:
        assert follow(plain, name) <= 5
        rates[name] = follow(tiny.complete(lab.ask("test", name), **OPTIONS), name)
    assert min(rates.values()) >= 90  # of 40 questions; rounding may tip one or two
    assert sum(rates.values()) / len(rates) >= 97


def test_words_and_length_are_followed_too(lab, tiny, plain):
    words = [task["likely"][0] for task in lab.tasks["test"]]
    answers = tiny.complete(lab.ask("test", "avoid", words=words), **OPTIONS)
    assert hold(words, plain) > 50
    assert hold(words, answers) <= 5
    answers = tiny.complete(lab.ask("test", "include", words=["winter", "music"]), **OPTIONS)
    assert hold(["winter", "music"] * 20, answers) >= 95
    short = mean_words(tiny.complete(lab.ask("test", "brief"), **OPTIONS))
    long = mean_words(tiny.complete(lab.ask("test", "detailed"), max_new_tokens=160))
    assert short < 0.5 * mean_words(plain) < mean_words(plain) < 0.7 * long


def test_opposite_edits_give_the_same_texts(tiny, vectors, questions, plain):
    v = vectors["capitals"].at(LAYER)
    assert tiny.complete(questions[:8], [v.add(), v.add(weight=-v.norm)], **OPTIONS) == plain[:8]
    negated = (-vectors["capitals"]).at(LAYER)
    assert tiny.complete(questions[:8], [v.add(), negated.add()], **OPTIONS) == plain[:8]


def test_zero_is_bit_identical(tiny, vectors, questions):
    tokens = torch.tensor([tiny.tokenizer.chat(questions[0])])
    edit = vectors["json"].at(LAYER).add(weight=0.0)
    assert torch.equal(tiny.logits(tokens, [edit]), tiny.logits(tokens))


def test_a_sum_by_value_says_what_two_edits_in_a_row_say(tiny, vectors, questions):
    a, b = vectors["capitals"], vectors["brief"]
    total = tiny.complete(questions[:8], [(a + b).at(LAYER).add()], **OPTIONS)
    both = tiny.complete(questions[:8], [a.at(LAYER).add(), b.at(LAYER).add()], **OPTIONS)
    assert total == both


def test_order_matters_for_set_then_add(tiny, vectors, questions):
    v = vectors["brief"].at(LAYER)
    set_, add = v.to_target(target=v.baseline), v.add()
    kept = tiny.complete(questions[:8], [set_, add], **OPTIONS)
    undone = tiny.complete(questions[:8], [add, set_], **OPTIONS)
    assert undone == tiny.complete(questions[:8], [set_], **OPTIONS)
    assert mean_words(kept) < mean_words(undone)


def test_rows_do_not_see_each_other(tiny, vectors, questions, plain):
    ways = [[], *([v.at(LAYER).to_target()] for v in vectors.values())]
    mixed = tiny.complete(questions[:1] * len(ways), ways, **OPTIONS)
    alone = [tiny.complete(questions[0], way, **OPTIONS) for way in ways]
    assert mixed == alone
    assert mixed[0] == plain[0]
    assert len(set(mixed)) == len(ways)


def test_a_shorter_generation_is_a_prefix_of_a_longer_one(tiny, vectors, questions):
    edits = [vectors["quotes"].at(LAYER).to_target()]
    long = tiny.complete(questions[:4], edits, max_new_tokens=40)
    for n in (1, 7, 20):
        short = tiny.complete(questions[:4], edits, max_new_tokens=n)
        assert all(a.startswith(b) for a, b in zip(long, short, strict=True))
        assert short != long


def test_streaming_says_the_same(tiny, questions, plain):
    for question, text in zip(questions[:4], plain[:4], strict=True):
        assert "".join(tiny.stream(question, **OPTIONS)) == text


def test_pca_finds_nearly_the_mean_difference_here(lab, tiny, vectors):
    """Formats differ from plain answers in one way, so both methods should find that."""
    pca = ts.extract(
        tiny, lab.ask("pairs", "capitals"), lab.questions("pairs"), method="pca", batch_size=64
    )
    mean = vectors["capitals"]
    assert ((pca.directions * mean.directions).sum(-1)[1:] > 0.9).all()
    torch.testing.assert_close(pca.norms, mean.norms, atol=0, rtol=0.1)


def test_the_tasks_parts_share_no_question(lab):
    parts = [set(lab.questions(part)) for part in ("pairs", "validation", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts))
