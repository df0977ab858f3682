"""Generation: batches, limits, stops, seeds and streams, on a tiny random model."""

import pytest
import torch

import tinysteer as ts
from tinysteer.decoding.sampling import Sampler

PROMPTS = ["short", "a somewhat longer prompt", "x", "and one more of them"]


def complete(model, prompts=PROMPTS, *args, **options):
    return model.complete(prompts, *args, **{"chat": False, "max_new_tokens": 16} | options)


def test_a_batch_gives_the_texts_of_single_runs(pair):
    ours, _ = pair
    batch = complete(ours)
    assert batch == [complete(ours, [prompt])[0] for prompt in PROMPTS]
    assert len(set(batch)) > 1


@torch.no_grad()
def test_greedy_text_is_that_of_transformers(pair):
    ours, theirs = pair
    prompt = torch.tensor([ours.tokenizer.encode(PROMPTS[1])])
    ids = theirs.generate(
        prompt, do_sample=False, max_new_tokens=16, attention_mask=torch.ones_like(prompt)
    )
    answer = ids[0, prompt.shape[1] :].tolist()
    assert complete(ours, [PROMPTS[1]])[0] == ours.tokenizer.decode(answer)


def test_smaller_batches_give_the_same_texts_in_order(model):
    assert complete(model, batch_size=1) == complete(model, batch_size=3) == complete(model)


def test_the_pieces_of_a_stream_are_the_text(model):
    options = {"chat": False, "max_new_tokens": 16}
    texts = [""] * len(PROMPTS)
    for i, piece in model.stream(PROMPTS, **options):
        assert piece
        texts[i] += piece
    assert texts == complete(model)
    assert "".join(model.stream(PROMPTS[0], **options)) == texts[0]


def test_each_row_has_its_own_limit(model):
    whole = complete(model)
    texts = complete(model, max_new_tokens=[0, 3, 16, 1])
    assert texts[0] == ""
    for text, full in zip(texts, whole, strict=True):
        assert full.startswith(text.rstrip("\ufffd"))
    assert [len(model.tokenizer.vocabulary.encode(t).ids) < 16 for t in texts][1]


def test_a_stop_id_ends_its_row_alone(model):
    logits = model.logits(torch.tensor([model.tokenizer.encode("short")]))
    first = int(logits[0, -1].argmax())
    whole = complete(model)
    model.tokenizer.stop_ids = frozenset([first])
    texts = complete(model)
    assert texts[0] == ""
    assert any(text == full for text, full in zip(texts[1:], whole[1:], strict=True))


def test_a_stop_string_is_left_out(model):
    whole = complete(model)
    stop = whole[1][4:6]
    texts = complete(model, stop=stop)
    assert texts[1] == whole[1][: whole[1].index(stop)]
    assert all(stop not in text for text in texts)


def test_the_same_seed_gives_the_same_text_in_any_batch(model):
    options = {"temperature": 1.0, "seed": 5}
    batch = complete(model, **options)
    assert batch == complete(model, **options)
    assert batch == [complete(model, [prompt], **options)[0] for prompt in PROMPTS]
    assert batch != complete(model, temperature=1.0, seed=6)


def test_each_row_may_have_its_own_seed(model):
    texts = complete(model, ["same"] * 3, temperature=1.0, seed=[1, 2, 1])
    assert texts[0] == texts[2] != texts[1]


def test_without_a_seed_texts_differ(model):
    assert complete(model, ["same"], temperature=2.0) != complete(model, ["same"], temperature=2.0)


def test_the_context_cannot_be_exceeded_silently(model):
    model.complete(["x" * 100], chat=False, max_new_tokens=27)  # 1 + 100 + 27 = 128
    with pytest.raises(ValueError, match=r"prompt 1 has 101 tokens .* context of 128"):
        model.complete(["x", "x" * 100], chat=False, max_new_tokens=28)
    with pytest.raises(ValueError, match="129 tokens exceed the model's context of 128"):
        model.logits(torch.ones(1, 129, dtype=torch.long))


def test_an_error_comes_at_the_call_and_not_at_the_first_piece(model):
    with pytest.raises(ValueError, match="context"):
        model.stream("x" * 300)


REFUSED = {
    "temperature is -1": {"temperature": -1},
    "temperature is nan": {"temperature": float("nan")},
    "temperature is 'hot'": {"temperature": "hot"},
    "top_k is 0": {"top_k": 0, "temperature": 1},
    "top_k is 2.5": {"top_k": 2.5, "temperature": 1},
    "top_p is 1.5": {"top_p": 1.5, "temperature": 1},
    "min_p is -0.1": {"min_p": -0.1, "temperature": 1},
    "top_k changes nothing at temperature 0": {"top_k": 5},
    "batch_size is 0": {"batch_size": 0},
    "max_new_tokens is '20' for prompt 0": {"max_new_tokens": "20"},
    "max_new_tokens is None for prompt 0": {"max_new_tokens": None},
    "seed is 9223372036854775808": {"seed": 2**63},
    "max_new_tokens is -1": {"max_new_tokens": -1},
    "max_new_tokens has 2 values for 4 prompts": {"max_new_tokens": [1, 2]},
    "seed has 1 values for 4 prompts": {"seed": [1]},
    "stop is ''": {"stop": ""},
    "max_tokens is not an option; did you mean max_new_tokens": {"max_tokens": 5},
}


@pytest.mark.parametrize("message", REFUSED)
def test_options_out_of_range_are_refused_by_name(message, model):
    with pytest.raises(ValueError, match=message):
        complete(model, **REFUSED[message])


def test_a_base_model_does_not_ask_itself_the_next_question(model, monkeypatch):
    whole = model.complete(["short"], max_new_tokens=16)[0]
    monkeypatch.setattr(type(model.tokenizer), "stop_strings", (whole[3],))
    assert model.complete(["short"], max_new_tokens=16)[0] == whole[: whole.index(whole[3])]
    text = model.tokenizer.format("short")
    assert complete(model, [text])[0] == whole  # as it is: nothing is added, nothing cut


def test_logits_that_are_not_finite_are_an_error(model):
    model.decoder.norm.weight[0] = float("nan")
    for temperature in (0, 1):
        with pytest.raises(ValueError, match=r"NaN or infinite in torch\.float32: lower"):
            complete(model, temperature=temperature)


def test_logits_may_be_changed_and_learned_from(model):
    model.logits(torch.tensor([[1, 2]]))[..., 3] = 0
    states = model.residuals(torch.tensor([[1, 2]]))
    probe = torch.zeros(48, requires_grad=True)
    (states @ probe).sum().backward()
    assert probe.grad is not None


NO_PROMPTS = {
    "a conversation that is no list": {"role": "user", "content": "hi"},
    "a number": 5,
    "numbers": [5],
    "nothing": [None],
    "bytes": b"hi",
    "a conversation without messages": [[]],
    "words for messages": [["hi", "there"]],
}


@pytest.mark.parametrize("name", NO_PROMPTS)
def test_what_is_no_prompt_is_refused(name, model):
    with pytest.raises(ValueError, match="prompt"):
        model.complete(NO_PROMPTS[name])


def test_a_conversation_cannot_go_without_its_template(model):
    with pytest.raises(ValueError, match="leave out chat=False"):
        complete(model, [[{"role": "user", "content": "hi"}]])


def test_an_empty_prompt_is_refused(model):
    model.tokenizer.adds_bos = False
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        complete(model, ["x", ""])


TOKENS = {  # and, perhaps, how many of them are the prompt
    "integers": (torch.zeros(1, 3), None),
    r"\(B, T\)": (torch.zeros(3, dtype=torch.long), None),
    "ids from 0 to 299": (torch.tensor([[1, 300]]), None),
    "not list": ([[1, 2]], None),
} | {f"prompt_length is {n}": (torch.tensor([[1, 2]]), n) for n in (0, 3, -1)}


@pytest.mark.parametrize("message", TOKENS)
def test_tokens_that_are_none_are_refused(message, model):
    tokens, prompt_length = TOKENS[message]
    with pytest.raises(ValueError, match=message):
        model.logits(tokens, prompt_length=prompt_length)


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5]])
FILTERS = {  # settings -> the tokens that may be drawn
    "everything": ({}, {0, 1, 2, 3, 4}),
    "top_k": ({"top_k": 2}, {0, 1}),
    "top_p keeps the fewest that reach it": ({"top_p": 0.6}, {0, 1}),
    "top_p keeps at least one": ({"top_p": 0.01}, {0}),
    "min_p": ({"min_p": 0.2}, {0, 1, 4}),
    "top_p counts what top_k left": ({"top_k": 2, "top_p": 0.7}, {0}),
    "low temperature": ({"temperature": 0.01}, {0}),
}


@pytest.mark.parametrize("name", FILTERS)
def test_draws_come_from_the_tokens_that_are_left(name):
    settings, allowed = FILTERS[name]
    sampler = Sampler([1], 600, **settings)
    drawn = {int(sampler(LOGITS)[0]) for _ in range(600)}
    assert drawn == allowed


def test_draws_are_as_frequent_as_they_are_likely():
    sampler, n = Sampler(range(2000), 2), 4000
    counts = sum(
        torch.bincount(sampler(LOGITS.expand(2000, -1)), minlength=5) for _ in range(n // 2000)
    )
    expected = LOGITS[0].softmax(-1) * n
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def test_a_draw_at_the_very_end_is_still_a_token_that_is_left(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda n, **__: torch.ones(n, dtype=torch.float64))
    assert int(Sampler([0], 1, top_k=2)(LOGITS)[0]) == 1


def test_what_cannot_be_drawn_is_not_drawn_by_the_smallest_draw():
    sampler = Sampler([0], 2)
    sampler.draws.zero_()
    assert int(sampler(torch.tensor([[-1e6, 0.0, -1e6]]))[0]) == 1


def test_a_longer_run_draws_the_same_numbers_at_first():
    assert torch.equal(Sampler([5], 300).draws[:, :7], Sampler([5], 7).draws)


def test_sampling_settings_equal_those_of_transformers():
    """top_k, then top_p of what is left, then min_p, as transformers' logits processors."""
    pytest.importorskip("transformers")
    from transformers.generation import logits_process as theirs

    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 3
    for k, p, m in ((None, None, None), (10, None, None), (None, 0.8, None), (20, 0.7, 0.02)):
        expected = logits / 0.8
        if k:
            expected = theirs.TopKLogitsWarper(k)(None, expected)
        if p:
            expected = theirs.TopPLogitsWarper(p)(None, expected)
        if m:
            expected = theirs.MinPLogitsWarper(m)(None, expected)
        sampler = Sampler([0] * 3, 1, 0.8, k, p, m)
        probabilities, tokens = sampler.probabilities(logits)
        ours = torch.zeros_like(logits).scatter(-1, tokens, probabilities.float())
        torch.testing.assert_close(ours, expected.softmax(-1))


def test_the_face_says_what_it_is(model):
    assert repr(model) == "<tiny: llama, 4 layers of width 48, float32>"
    assert isinstance(model, ts.LanguageModel)
