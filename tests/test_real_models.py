"""The two real models against transformers, in float32: logits, texts, steering, extraction."""

import pytest
import torch
from dispatch import Tape
from oracle import hooked, last_states, would_say

import tinysteer as ts
from tinysteer.decoding import generation
from tinysteer.decoding.pool import DecodingPool
from tinysteer.model.cache import Cache
from tinysteer.steering.batch import per_row
from tinysteer.text.streaming import TextStream

pytestmark = pytest.mark.real

PROMPTS = [
    "What is the capital of France?",
    "Explain why the sky is blue to a child of six who loves trains.",
    "Name three rivers.",
    "Write a short poem about rain in autumn, in four lines.",
    "What should I pack for a week of walking in the mountains in spring? I have a small bag.",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes.",
    "How does a bicycle stay upright?",
]
N_TOKENS = 32
SUFFIX = " Be extremely concise."


def answers(model, prompts, steer=None, n_tokens=N_TOKENS, pool=None) -> list[list[int]]:
    """Greedy token ids of one batch, stop ids left out."""
    rows = [TextStream(model.tokenizer.decode, n_tokens, model.tokenizer.stop_ids) for _ in prompts]
    ids = [model.tokenizer.chat(prompt) for prompt in prompts]
    edits = per_row(steer, len(prompts))
    for _ in generation.decode(pool or model.pool, ids, rows, lambda n: edits):
        pass
    return [row.ids for row in rows]


def assert_greedy(ours, theirs, prompt, answer, edits=(), n_tokens=N_TOKENS) -> None:
    """The answer is what transformers' greedy decoding gives, its end included."""
    *said, after = would_say(theirs, ours.tokenizer.chat(prompt), answer, edits)
    assert said == answer
    assert len(answer) == n_tokens or after in ours.tokenizer.stop_ids


@pytest.fixture(scope="session")
def singles(real_pair):
    """Each prompt's greedy answer, run alone."""
    ours, _ = real_pair
    return [answers(ours, [prompt])[0] for prompt in PROMPTS]


@torch.no_grad()
def test_logits_are_those_of_transformers(real_pair):
    ours, theirs = real_pair
    for prompt in PROMPTS:
        tokens = torch.tensor([ours.tokenizer.chat(prompt)])
        torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, atol=1e-3, rtol=0)


@torch.no_grad()
def test_states_beyond_window_and_chunk_are_those_of_transformers(real_pair):
    ours, theirs = real_pair
    tokens = torch.randint(10, 20_000, (1, 600), generator=torch.Generator().manual_seed(0))
    cache = Cache(ours.decoder, torch.zeros(1, dtype=torch.long), 600, 600)
    found, expected = ours.decoder.prefill(tokens, cache), theirs.model(tokens).last_hidden_state
    torch.testing.assert_close(found, expected[:, -1:], atol=1e-3, rtol=1e-3)


def test_greedy_tokens_are_those_of_transformers(real_pair, singles):
    for prompt, answer in zip(PROMPTS, singles, strict=True):
        assert_greedy(*real_pair, prompt, answer)


def test_a_batch_of_eight_gives_the_texts_of_eight_single_runs(real_pair, singles):
    ours, _ = real_pair
    assert answers(ours, PROMPTS) == singles
    taped = DecodingPool(ours.decoder, capture=Tape)
    assert [row[:8] for row in singles] == answers(ours, PROMPTS, None, 8, taped)
    assert taped.captured == 1
    assert len({ours.tokenizer.decode(ids) for ids in singles}) == len(PROMPTS)


@torch.no_grad()
def test_residuals_are_the_hidden_states_of_transformers(real_pair):
    ours, theirs = real_pair
    tokens = torch.tensor([ours.tokenizer.chat(PROMPTS[1])])
    states = theirs(tokens, output_hidden_states=True).hidden_states
    residuals = ours.residuals(tokens)
    for layer in range(ours.config.n_layers - 1):
        scale = float(states[layer + 1].abs().max())  # a sink token's states are in the thousands
        torch.testing.assert_close(
            residuals[layer] / scale, states[layer + 1] / scale, atol=1e-5, rtol=0
        )


@torch.no_grad()
def test_extraction_is_the_difference_of_transformers_last_states(real_pair):
    ours, theirs = real_pair
    with_instruction = [prompt + SUFFIX for prompt in PROMPTS]
    vector = ts.extract(ours, with_instruction, PROMPTS)
    encode = ours.tokenizer.chat
    states = [
        last_states(theirs, map(encode, side)).mean(0) for side in (with_instruction, PROMPTS)
    ]
    difference = states[0] - states[1]
    cosine = torch.nn.functional.cosine_similarity(vector.directions, difference)
    assert (cosine > 0.99999).all()
    torch.testing.assert_close(vector.norms, difference.norm(dim=-1), rtol=1e-3, atol=1e-3)


def test_steered_texts_are_those_of_hooks_on_transformers(real_pair, singles):
    ours, theirs = real_pair
    vector = ts.extract(ours, [prompt + SUFFIX for prompt in PROMPTS], PROMPTS)
    middle, late = vector.at(ours.config.n_layers // 2), vector.at(ours.config.n_layers - 4)
    rows = [
        [middle.add(weight=2 * middle.norm)],
        [late.to_target()],
        [middle.add(), middle.to_target(0.5), late.add(weight=-1.0)],
        [],
    ]
    prompts, n_tokens = PROMPTS[1:5], 24
    steered = answers(ours, prompts, rows, n_tokens)
    taped = answers(ours, prompts, rows, 16, DecodingPool(ours.decoder, capture=Tape))
    assert taped == [answer[:16] for answer in steered]
    for prompt, row, answer in zip(prompts, rows, steered, strict=True):
        assert_greedy(ours, theirs, prompt, answer, row, n_tokens)
    changed = [new != old[:n_tokens] for new, old in zip(steered, singles[1:5], strict=True)]
    assert changed == [True, True, True, False]
    with hooked(theirs, rows[0]):  # once in full, as a user of transformers would
        prompt = torch.tensor([ours.tokenizer.chat(prompts[0])])
        generated = theirs.generate(
            prompt,
            do_sample=False,
            max_new_tokens=len(steered[0]),
            attention_mask=torch.ones_like(prompt),
        )
    assert generated[0, prompt.shape[1] :].tolist() == steered[0]
