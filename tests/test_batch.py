"""Steering in the decoder: against hooks on transformers, its laws, its rows and positions."""

import math

import pytest
import torch
from oracle import greedy_ids, hooked, vector_for

import tinysteer as ts
from tinysteer.steering import batch
from tinysteer.steering.batch import FixedSteering, per_row, signature
from tinysteer.steering.edits import window

T = 12


def some_tokens(B=1, length=T, seed=3):
    return torch.randint(3, 200, (B, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def vector(model):
    return vector_for(model)


MIXES = {
    "add": lambda a, b: [a.at(1).add(weight=6.0)],
    "to_target": lambda a, b: [a.at(2).to_target(target=8.0)],
    "several layers": lambda a, b: [
        a.at(0).add(weight=4.0),
        b.at(2).to_target(),
        b.at(3).add(weight=-5.0),
    ],
    "two at one layer, in order": lambda a, b: [
        a.at(1).to_target(target=5.0),
        b.at(1).add(weight=6.0),
    ],
    "half way": lambda a, b: [a.at(1).to_target(0.5, target=9.0)],
    "clamps": lambda a, b: [a.at(1).at_least(target=1.0), b.at(2).at_most(target=-1.0)],
    "ablate": lambda a, b: [a.at(layer).ablate() for layer in range(4)],
    "none": lambda a, b: [],
}


@pytest.mark.parametrize("mix", MIXES)
@torch.no_grad()
def test_edits_equal_hooks_on_transformers(mix, checkpoint):
    for variant in ("llama: grouped heads", "gemma2"):
        folder, theirs = checkpoint(variant)
        ours = ts.load(folder, dtype="float32")
        edits = MIXES[mix](vector_for(ours), vector_for(ours, 1))
        tokens = some_tokens(2)
        with hooked(theirs, edits):
            expected = theirs(tokens).logits
        torch.testing.assert_close(ours.logits(tokens, edits), expected, atol=2e-4, rtol=0)
        if edits:
            assert (ours.logits(tokens) - expected).abs().max() > 1e-2


def test_a_batch_of_mixed_rows_says_what_hooks_make_transformers_say(checkpoint):
    folder, theirs = checkpoint("llama: grouped heads")
    ours = ts.load(folder, dtype="float32")
    a, b = vector_for(ours), vector_for(ours, 1)
    rows = [mix(a, b) for mix in MIXES.values()]
    prompts = ["steer", "some", "words", "of", "different", "length", "each", "!"]
    texts = ours.complete(prompts, rows, max_new_tokens=12, chat=False)
    for prompt, row, text in zip(prompts, rows, texts, strict=True):
        ids = greedy_ids(theirs, ours.tokenizer.encode(prompt), row, 12)
        stops = [i for i, token in enumerate(ids) if token in ours.tokenizer.stop_ids]
        assert text == ours.tokenizer.decode(ids[: min(stops, default=12)])
    assert len(set(texts)) > 4


@pytest.mark.parametrize("where", ["all", "prompt", "generation", (-3, 2), (1, None), (None, -2)])
def test_positions_count_from_the_last_prompt_token(where, model, vector):
    """A window's edit changes the residuals of its positions and of no earlier one."""
    tokens, prompt_length = some_tokens(), 7
    edit = vector.at(1).add(weight=5.0, where=where)
    moved = model.residuals(tokens, [edit], prompt_length=prompt_length)[1]
    moved = (moved - model.residuals(tokens)[1]).norm(dim=-1)[0]  # (T,)
    first, stop = {"all": (None, None), "prompt": (None, 0), "generation": (0, None)}.get(
        where, where
    )
    inside = [
        (first is None or first <= t - 6) and (stop is None or t - 6 < stop) for t in range(T)
    ]
    expected = torch.tensor(inside).float() * 5.0
    torch.testing.assert_close(moved, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("where", ["all", "prompt", "generation", (-2, 1), (1, 3)])
def test_steered_decoding_with_a_cache_equals_recomputing(where, model, vector):
    edits = [
        vector.at(1).add(weight=6.0, where=where),
        vector.at(2).to_target(target=4.0, where=where),
    ]
    prompt = model.tokenizer.encode("a prompt")
    text = model.complete(["a prompt"], edits, max_new_tokens=8, chat=False, stop=["\0"])[0]
    ids = list(prompt)
    for _ in range(8):
        tokens = torch.tensor([ids])
        ids.append(int(model.logits(tokens, edits, prompt_length=len(prompt))[0, -1].argmax()))
    answer = ids[len(prompt) :]
    stops = [i for i, token in enumerate(answer) if token in model.tokenizer.stop_ids]
    assert text == model.tokenizer.decode(answer[: min(stops, default=8)])


def test_generation_windows_reach_the_first_new_token(model, vector):
    """The last prompt token makes the first new one; an edit that skipped it would be too late."""
    tokens = some_tokens()
    steered = model.logits(tokens, [vector.at(1).add(weight=9.0, where="generation")])
    assert not torch.equal(steered[:, -1], model.logits(tokens)[:, -1])
    assert torch.equal(steered[:, :-1], model.logits(tokens)[:, :-1])


def test_padding_is_never_edited(model, vector):
    tokens, start = some_tokens(2), torch.tensor([5, 0])
    edit = vector.at(0).add(weight=5.0)
    moved = (
        model.residuals(tokens, [edit], start=start)[0] - model.residuals(tokens, start=start)[0]
    )
    assert not moved[0, :5].any()
    assert (moved[0, 5:].norm(dim=-1) > 1).all()


def test_zero_is_bit_identical_to_no_steering(model, vector):
    tokens = some_tokens()
    assert torch.equal(model.logits(tokens, [vector.at(1).add(weight=0.0)]), model.logits(tokens))
    assert torch.equal(model.logits(tokens, []), model.logits(tokens))


def test_opposite_weights_cancel(model, vector):
    tokens = some_tokens()
    edits = [vector.at(1).add(weight=2.0), vector.at(1).add(weight=-2.0)]
    torch.testing.assert_close(model.logits(tokens, edits), model.logits(tokens))


def test_a_row_without_edits_is_bit_identical_beside_steered_ones(model, vector):
    tokens = some_tokens(3)
    rows = [[vector.at(1).add(weight=5.0)], [], [vector.at(2).ablate()]]
    assert torch.equal(model.logits(tokens, rows)[1], model.logits(tokens)[1])


def test_a_row_does_not_depend_on_its_neighbours(model, vector):
    tokens, edit = some_tokens(3), vector.at(1).add(weight=5.0)
    for neighbours in ([], [vector.at(1).to_target(target=50.0), vector.at(3).add(weight=9.0)]):
        steered = model.logits(tokens, [neighbours, [edit], neighbours])
        torch.testing.assert_close(steered[1], model.logits(tokens, [edit])[1])


def test_nothing_stays_behind_in_the_model(model, vector):
    tokens = some_tokens()
    before = model.logits(tokens)
    model.complete(["x"], [vector.at(1).add(weight=50.0)], max_new_tokens=3)
    assert torch.equal(model.logits(tokens), before)


def test_verbs_do_to_the_projection_what_they_say(model, vector):
    tokens, v = some_tokens(), vector.at(2)

    def projection(*edits):
        return model.residuals(tokens, edits)[2] @ v.direction

    plain, middle = projection(), float(projection().median())
    same = torch.testing.assert_close
    same(projection(v.add(weight=3.0)), plain + 3.0)
    same(projection(v.add()), plain + v.norm)
    same(projection(v.to_target()), torch.full_like(plain, v.target))
    same(projection(v.to_target(0.25, target=8.0)), plain + 0.25 * (8.0 - plain))
    same(projection(v.at_least(target=middle)), plain.clamp(min=middle))
    same(projection(v.at_most(target=middle)), plain.clamp(max=middle))
    same(projection(v.ablate()), torch.zeros_like(plain), atol=1e-5, rtol=0)


@pytest.mark.parametrize("number", [math.nan, math.inf, "9", "generation", [1], 10**400])
def test_a_weight_that_is_not_finite_is_refused(vector, number):
    v = vector.at(1)
    for verb, name in ((v.add, "weight"), (v.add, "times"), (v.to_target, "alpha")):
        with pytest.raises(ValueError, match="must be finite"):
            verb(**{name: number})
    with pytest.raises(ValueError, match="must be finite"):
        vector.at(1).at_least(target=number)


def test_an_unknown_layer_is_refused(model, vector):
    with pytest.raises(ValueError, match="layer 4: this vector has layers 0 to 3"):
        vector.at(4)
    deeper = ts.SteeringVector._from_means(torch.randn(9, 48), torch.zeros(9, 48))
    with pytest.raises(ValueError, match="layer 8: this model has layers 0 to 3"):
        model.complete(["x"], [deeper.at(8).add()])


def test_a_vector_of_another_width_is_refused(model):
    wide = ts.SteeringVector._from_means(torch.randn(4, 64), torch.zeros(4, 64))
    with pytest.raises(ValueError, match="the vector is 64 wide, this model 48"):
        model.complete(["x"], [wide.at(1).add()])


@pytest.mark.parametrize("where", ["everywhere", (3, 3), (5, 2), (1, 2, 3), (0.5, 3), None])
def test_a_window_that_makes_no_sense_is_refused(where):
    with pytest.raises(ValueError, match="where="):
        window(where)


def test_steer_takes_a_list_or_one_list_a_prompt(vector):
    edit = vector.at(1).add()
    assert per_row(None, 2) == [[], []]
    assert per_row([], 2) == [[], []]
    assert per_row(edit, 2) == per_row([edit], 2) == [[edit], [edit]]
    assert per_row([[edit], []], 2) == [[edit], []]
    with pytest.raises(ValueError, match="2 lists of edits for 3 prompts"):
        per_row([[edit], []], 3)
    with pytest.raises(ValueError, match="edits and lists of edits"):
        per_row([edit, [edit]], 2)
    for forgot_verb in (vector, vector.at(1), [vector], [[vector.at(1)]], [vector.at(1).add]):
        with pytest.raises(ValueError, match="pick a layer and a verb"):
            per_row(forgot_verb, 1)
    for no_edit, seen in (({}, "dict"), ([{}], "dict"), ("v", "str")):
        with pytest.raises(ValueError, match=f"one such list a prompt, not .*{seen}"):
            per_row(no_edit, 1)


def test_a_layer_may_be_any_whole_number(model, vector):
    edit = vector.at(vector.norms.argmax())
    assert type(edit.layer) is int
    assert edit.layer == int(vector.norms.argmax())


def test_an_edit_says_what_it_does(vector):
    v = vector.at(1)
    assert repr(v.add(weight=20)) == "<Edit at layer 1: bias=20>"
    assert repr(v.at_least(target=3, where="prompt")) == (
        "<Edit at layer 1: bias=3, slope=1, low=0, last=-1>"
    )
    assert repr(v.add(weight=0)) == "<Edit at layer 1: nothing>"


def test_buffers_that_were_broken_off_know_nothing(vector, monkeypatch):
    v = vector
    rows = [[v.at(1).add()]]
    buffers = FixedSteering(torch.zeros(4, v.dim), v.n_layers, 1, 4, 8)
    with monkeypatch.context() as patch:
        patch.setattr(batch, "stacked", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            buffers.copy_(rows)
    buffers.copy_(rows)
    assert torch.equal(buffers.bank[0], v.directions[1])


def test_a_direction_changed_in_place_is_another_edit(vector):
    v = vector
    rows = [[v.at(1).add(weight=2.0)]] * 2
    before = signature(rows)
    assert signature([[v.at(1).add(weight=2.0)]] * 2)[0] == before[0] == signature(rows)[0]
    v.directions.neg_()
    assert signature(rows) != before
