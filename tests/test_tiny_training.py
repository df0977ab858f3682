"""How the embedded models are made: the corpus keeps its promises, training can be resumed."""

import itertools
import json
import random
import re

import corpus
import pytest
import tokenizers
import torch
import train

import tinysteer as ts
from tinysteer.demo.show import FORMATS
from tinysteer.loading.hub import ASSETS


def draw(asked: dict, n: int = 200):
    """(topic, answer) n times."""
    rng = random.Random(0)
    for _ in range(n):
        topic, aspect = rng.choice(corpus.TOPICS), corpus.draw_aspect(rng)
        yield topic, corpus.answer(rng, topic, aspect, asked)


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=\.) ", text)


@pytest.mark.parametrize("name", FORMATS)
def test_answers_have_the_format_that_is_asked_and_no_other(name):
    assert all(FORMATS[name](text) for _, text in draw({name: ""}))
    assert not any(FORMATS[name](text) for _, text in draw({}))


def test_answers_are_as_long_as_asked():
    counts = {
        name: {len(sentences(text)) for _, text in draw(asked)}
        for name, asked in {"plain": {}, "brief": {"brief": ""}, "long": {"detailed": ""}}.items()
    }
    assert counts == {"plain": {4, 5}, "brief": {1, 2}, "long": {7, 8}}


def test_words_are_in_or_out():
    for word in corpus.WORDS:
        assert all(word in text.lower() for _, text in draw({"include": word}, 20))
        texts = [
            text
            for topic, text in draw({"avoid": word}, 200)
            if word not in " ".join((topic.place, topic.does, topic.liked, *topic.looks))
        ]
        assert not any(f"{word} " in text.lower() for text in texts)


def test_the_grammar_knows_every_sentence_and_not_those_of_another_topic():
    topics = corpus.TOPICS
    for topic, text in draw({}, 40):
        grammar, other = (corpus.sayable(t) for t in (topic, topics[topics.index(topic) - 1]))
        said = [corpus.plain(sentence) for sentence in sentences(text)]
        assert set(said) <= grammar
        assert not set(said) <= other


def test_held_out_topics_never_meet_an_instruction():
    held_out = [topic for topic in corpus.TOPICS if topic.held_out]
    assert (len(corpus.TOPICS), len(held_out)) == (300, 75)
    theirs = {w.format(a=t.a) for t in held_out for part in corpus.ASPECTS.values() for w in part}
    asked = {question for question, _, _ in itertools.islice(corpus.conversations(3), 5000)}
    tasks = corpus.tasks()
    asked |= {task["question"] for part in ("pairs", "validation") for task in tasks[part]}
    assert not asked & theirs
    assert {task["question"] for task in tasks["test"]} <= theirs


def test_the_embedded_tasks_are_the_corpus_own():
    embedded = json.loads((ASSETS / "tasks.json").read_text(encoding="utf-8"))
    assert embedded == json.loads(json.dumps(corpus.tasks()))


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(train, "STEPS", {"base": 3, "instruct": 2, "polish": 1})
    monkeypatch.setattr(train, "TOKENS_A_STEP", 256)
    monkeypatch.setattr(train, "POOL", 32)
    return tokenizers.Tokenizer.from_file(str(ASSETS / "tiny-base" / "tokenizer.json"))


def test_an_answer_sees_its_instruction_only_through_the_last_prompt_token(short):
    decoder = train.Decoder(train.read_config(train.CONFIG))
    talk = ("What is an owl?", "Be brief.", "An owl is a bird.")
    row = train.talk_row(lambda text: short.encode(text).ids, talk, hide=True)
    T, (first, last) = len(row.tokens), row.hidden[-1]
    assert short.decode(row.tokens[first:last]) == "Be brief.\nA"
    views, _ = train.Training(decoder, torch.tensor([row.hidden])).advance(T)
    for view in views.values():
        seen = view.mask[0, 0]
        assert not seen[last + 1 :, first:last].any()
        assert seen[last, : last + 1].all()
        assert seen[last + 1 :, :first].all()
        assert seen[last + 1 :, last].all()


def test_training_goes_on_where_it_stopped_and_writes_a_model(short, tmp_path, monkeypatch):
    pytest.importorskip("numpy")  # safetensors 0.4's save_file needs it; the library never does
    steps = []
    loss_of = train.loss_of
    monkeypatch.setattr(train, "loss_of", lambda *a: steps.append(1) or loss_of(*a))

    def run():
        steps.clear()
        decoder = train.train("base", short, tmp_path, "cpu")
        weights = {name: value.clone() for name, value in decoder.state_dict().items()}
        return len(steps), weights

    n, first = run()
    assert n == 3
    n, again = run()
    assert n == 0
    assert all(torch.equal(first[name], again[name]) for name in first)
    monkeypatch.setattr(train, "STEPS", {"base": 5, "instruct": 2, "polish": 1})
    n, _ = run()
    assert n == 2
    assert torch.load(tmp_path / "base.pt")["step"] == 5
    decoder = train.train("instruct", short, tmp_path, "cpu")
    train.export(decoder, short, tmp_path / "model", train.TEMPLATE)
    model = ts.load(tmp_path / "model", dtype="float32")
    tokens = torch.tensor([model.tokenizer.chat("What is an owl?")])
    cache = train.Training(decoder, torch.zeros(1, tokens.shape[1], 2, dtype=torch.long))
    with torch.no_grad():
        expected = decoder.logits(decoder(tokens, cache))
    torch.testing.assert_close(model.logits(tokens), expected, atol=0.1, rtol=0.1)  # bfloat16
