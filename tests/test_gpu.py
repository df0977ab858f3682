"""Whole models on a real GPU: captured steps, launches one by one, formulas and a CPU agree.

TINYSTEER_TEST_DEVICE=cuda pytest tests/test_gpu.py
"""

import threading

import pytest
import torch
from checkpoints import VARIANTS
from device import DEVICE

import tinysteer as ts

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="needs TINYSTEER_TEST_DEVICE=cuda")
PROMPTS = ["short", "a somewhat longer prompt", "x", "and one more of them", "last"]
OPTIONS = {"chat": False, "max_new_tokens": [16, 9, 12, 1, 16]}


def mixed(model) -> list[list[ts.Edit]]:
    """Lists of all verbs and windows, one a prompt, and one of none."""
    torch.manual_seed(0)
    shape, w = (model.config.n_layers, model.config.dim), 6.0 * model.config.embed_scale
    a, b, c = (
        ts.SteeringVector._from_means(torch.randn(shape), torch.zeros(shape)) for _ in range(3)
    )
    layers = range(shape[0])
    return [
        [],
        [a.at(1).add(weight=w)],
        [a.at(2).to_target(target=3.0), b.at(2).add(weight=-w), c.at(2).at_least(target=1.0)],
        b.at(layers).add(weight=w / 4, where="generation"),
        c.at(layers).ablate(where=(1, 5)) + [a.at(0).at_most(target=0.5)] * 5,
    ]


@pytest.fixture(params=VARIANTS)
def models(request, checkpoint):
    """One model on the CPU and on the GPU, float32."""
    folder, _ = checkpoint(request.param)
    return [ts.load(folder, dtype="float32", device=device) for device in ("cpu", "cuda")]


def test_every_way_gives_the_texts_of_the_cpu(models):
    host, card = models
    steer = mixed(host)
    for edits in (None, steer):
        text = host.complete(PROMPTS, edits, **OPTIONS)
        for way in ({}, {}, {"graph": False}, {"kernels": False}):
            assert card.complete(PROMPTS, edits, **OPTIONS, **way) == text, way
    assert card.pool.captured == 4  # steered or not, by kernels or formulas


def test_answers_say_the_same(models):
    answers = [model.generate(PROMPTS, mixed(model), **OPTIONS) for model in models]
    for ours, theirs in zip(*answers, strict=True):
        assert (ours.tokens, ours.reason) == (theirs.tokens, theirs.reason)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=2e-3)


def test_a_slider_and_draws_and_an_explanation_are_those_of_launches_one_by_one(models):
    _, card = models
    v = ts.SteeringVector.from_directions({1: torch.randn(card.config.dim)}, card.config.n_layers)
    for options in ({}, {"temperature": 1.2, "seed": 3, "top_p": 0.9}):
        texts = [
            card.complete(PROMPTS, lambda n: [v.at(1).add(times=n)], **OPTIONS, **options, **way)
            for way in ({}, {"graph": False})
        ]
        assert texts[0] == texts[1]
    said = card.explain("a prompt", v.at(1).add(times=2), max_new_tokens=3)
    torch.testing.assert_close(said.d[0, :3], torch.full((3,), 2 * v.at(1).norm))


def test_two_threads_share_a_model(models):
    host, card = models
    steer, texts = mixed(host), {}
    expected = [host.complete(PROMPTS, edits, **OPTIONS) for edits in (None, steer)]

    def answer(i):
        try:
            texts[i] = card.complete(PROMPTS, (None, steer)[i % 2], **OPTIONS)
        except Exception as error:
            texts[i] = error

    threads = [threading.Thread(target=answer, args=[i]) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [texts[i] for i in range(6)] == expected * 3


def test_the_embedded_model_shouts_in_sixteen_bits(lab_vector):
    model, shout = lab_vector
    questions = ["What is a bakery?", "What is a kite?"]
    plain, steered = (
        model.complete(questions, s) for s in (None, shout.at(4).to_target(where="last"))
    )
    assert all(text.isupper() for text in steered)
    assert not any(text.isupper() for text in plain)


@pytest.fixture
def lab_vector():
    model = ts.load(device="cuda")
    questions = ["What is an owl?", "Where would I find a violin?", "What does a fox look like?"]
    asked = [f"{question} Answer in all capital letters." for question in questions]
    return model, ts.extract(model, asked, questions)
