"""The front door: what goes in as one comes out as one, answers, verbs, vectors from elsewhere."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tinysteer as ts

OPTIONS = {"chat": False, "max_new_tokens": 8}


@pytest.fixture
def vector(model):
    torch.manual_seed(0)
    shape = model.config.n_layers, model.config.dim
    return ts.SteeringVector._from_means(torch.randn(shape), torch.randn(shape))


def test_a_string_gives_one_and_a_list_a_list(model):
    text, (one, two) = model.complete("ab", **OPTIONS), model.complete(["ab", "c"], **OPTIONS)
    assert (text, type(text)) == (one, str)
    one, (same, _) = model.generate("ab", **OPTIONS), model.generate(["ab", "c"], **OPTIONS)
    assert (one.text, one.tokens, one.reason) == (same.text, same.tokens, same.reason)
    one = one.text
    assert "".join(model.stream("ab", **OPTIONS)) == text
    pieces = list(model.stream(["ab", "c"], **OPTIONS))
    assert ["".join(p for i, p in pieces if i == row) for row in (0, 1)] == [one, two]
    assert model.complete([], **OPTIONS) == model.generate([], **OPTIONS) == []


@pytest.mark.parametrize("steered", [False, True])
def test_an_answer_has_the_tokens_that_the_model_finds_likeliest(model, vector, steered):
    steer = [vector.at(1).add(where="generation")] if steered else None
    answer = model.generate("a prompt", steer, **OPTIONS)
    prompt = model.tokenizer.encode("a prompt")
    tokens = torch.tensor([prompt + answer.tokens])
    logits = model.logits(tokens, steer, prompt_length=len(prompt))[0, len(prompt) - 1 : -1]
    assert answer.tokens == logits.argmax(-1).tolist()
    expected = logits.log_softmax(-1).amax(-1)
    torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=0)
    assert (answer.reason, answer.text) == ("length", model.tokenizer.decode(answer.tokens))


def test_an_answer_says_why_it_ended(model, tiny):
    whole = tiny.generate("What is an owl?")
    assert (whole.reason, whole.tokens[-1] in tiny.tokenizer.stop_ids) == ("stop", True)
    cut = tiny.generate("What is an owl?", stop=[" is", "bird"])
    assert (cut.reason, cut.text) == ("stop string", whole.text[: whole.text.index(" is")])
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    none = tiny.generate("What is an owl?", max_new_tokens=0)
    assert (none.text, none.tokens, none.reason) == ("", [], "length")
    whole = model.generate("a prompt", **OPTIONS)
    model.tokenizer.stop_ids = frozenset([whole.tokens[4]])
    first = whole.tokens.index(whole.tokens[4])
    ended = model.generate("a prompt", **OPTIONS)
    assert (ended.reason, ended.tokens) == ("stop", whole.tokens[: first + 1])
    assert ended.text == model.tokenizer.decode(whole.tokens[:first])
    assert len(ended.logprobs) == len(ended.tokens)


def test_draws_have_the_models_own_log_probabilities(model):
    drawn = model.generate("a prompt", temperature=3.0, top_k=50, seed=1, **OPTIONS)
    prompt = model.tokenizer.encode("a prompt")
    logits = model.logits(torch.tensor([prompt + drawn.tokens]))[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)[range(8), drawn.tokens]
    torch.testing.assert_close(torch.tensor(drawn.logprobs), expected, atol=1e-4, rtol=0)


def test_add_counts_norms_or_the_unit_direction_and_says_which(vector):
    v = vector.at(1)
    assert v.add() == v.add(times=1) == v.add(weight=v.norm)
    assert v.add(times=-1.5).move.bias == -1.5 * v.norm
    with pytest.raises(TypeError, match=r"times=1\.5 counts .* weight=20\.0"):
        v.add(2)
    with pytest.raises(ValueError, match="times or weight, not both"):
        v.add(times=1, weight=2)


def test_a_faint_weight_is_warned_of_where_it_is_written(vector, recwarn):
    v = vector.at(1)
    v.add(weight=0.11 * v.norm), v.add(weight=0.0), v.add(times=0.01)
    assert not recwarn
    v.add(weight=-0.09 * v.norm)
    (warning,) = recwarn
    assert "a weight under a tenth of the vector's norm" in str(warning.message)
    assert Path(warning.filename) == Path(__file__)


def test_several_layers_make_one_edit_each(model, vector):
    edits = vector.at(range(1, 4)).to_target(0.5, where="last")
    assert edits == [vector.at(L).to_target(0.5, where=(0, 1)) for L in (1, 2, 3)]
    assert vector.at([-1, 0]).add(times=2) == [vector.at(L).add(times=2) for L in (3, 0)]
    verbs = ("add", "to_target", "at_least", "at_most", "ablate")
    for verb in verbs:
        assert getattr(vector.at([2]), verb)() == [getattr(vector.at(2), verb)()]
    assert model.complete("x", edits, **OPTIONS) == model.complete(["x"], [edits], **OPTIONS)[0]
    for wrong in (range(2, 9), [], range(0)):
        with pytest.raises(ValueError, match="layer"):
            vector.at(wrong)
    for steer in (vector.at([1, 2]), [vector.at([1])]):
        with pytest.raises(ValueError, match="pick a layer and a verb"):
            model.complete("x", steer)
    with pytest.raises(ValueError, match="unpack it"):
        model.complete("x", [edits, vector.at(1).add()])


def test_directions_from_elsewhere_become_a_vector(model):
    u = torch.randn(48)
    v = ts.SteeringVector.from_directions({2: 3 * u}, name="found")
    assert v.at(2).norm == pytest.approx(3 * float(u.norm()))
    torch.testing.assert_close(v.at(2).direction, u / u.norm())
    moved = model.residuals(torch.tensor([[5, 6]]), [v.at(2).add()])[2]
    torch.testing.assert_close(moved, model.residuals(torch.tensor([[5, 6]]))[2] + 3 * u)
    for wrong in ({}, {-1: u}, {0: u, 1: u[:5]}, {0: torch.zeros(2, 48)}):
        with pytest.raises(ValueError, match=r"layers \[|must be \(D,\)"):
            ts.SteeringVector.from_directions(wrong)
    with pytest.raises(ValueError, match=r"layers \[7\]: name at least one of 0 to 3"):
        ts.SteeringVector.from_directions({7: u}, n_layers=4)


def test_measuring_an_extracted_vector_gives_what_extraction_measured(model):
    asked, plain = ["one, please", "two, please"], ["one", "two"]
    v = ts.extract(model, asked, plain)
    bare = {L: v.norms[L] * v.directions[L] for L in range(3)}
    found = ts.SteeringVector.from_directions(bare).measured_on(model, asked, plain)
    assert found.n_layers == model.config.n_layers
    for name in ("norms", "targets", "baselines"):
        torch.testing.assert_close(getattr(found, name)[:3], getattr(v, name)[:3])
    assert (found.origin.model, found.norms[3]) == (model.name, 0)
    with pytest.raises(ValueError, match="two lists of at least one prompt"):
        v.measured_on(model, asked, [])
    with pytest.raises(ValueError, match="width 8, the model 4 of width 48"):
        ts.SteeringVector.from_directions({0: torch.ones(8)}).measured_on(model, asked, plain)


def test_vectors_can_be_summed(vector):
    assert sum([vector, vector, vector]) == vector + vector + vector


CLIENT = """
import tinysteer as ts

model: ts.LanguageModel = ts.load("tiny-instruct", dtype="float32")
vector: ts.SteeringVector = ts.extract(model, ["a b"], ["a"], name="b", batch_size=4)
total: ts.SteeringVector = vector + 2 * vector - vector / 2
one: ts.Direction = total.at(3)
edit: ts.Edit = one.add(times=1.5, where="last")
several: list[ts.Edit] = total.at(range(1, 4)).to_target(0.5)
text: str = model.complete("Hi", steer=[edit], max_new_tokens=4, temperature=0.7, seed=1)
texts: list[str] = model.complete(["Hi", "Ho"], [[edit], []], stop=["\\n"], {option}=2)
answer: ts.Answer = model.generate("Hi", several, top_k=5, temperature=1.0)
for said in model.generate(["Hi"], batch_size=2):
    numbers: tuple[list[int], list[float], str] = said.tokens, said.logprobs, said.reason
for piece in model.stream("Hi", lambda n: [one.add(weight=float(n))]):
    print(piece.upper(), end="")
for row, piece in model.stream(["Hi"], edit):
    print(row + 1, piece.upper())
explained: ts.Explanation = model.explain("Hi", [edit], read=one, max_new_tokens=2)
tables: list[ts.Explanation] = model.explain(["Hi"], read=[one])
"""


def test_a_strictly_typed_client_passes_and_a_misspelt_option_does_not(tmp_path):
    pytest.importorskip("mypy")
    for option, found in (("max_new_tokens", 0), ("max_new_token", 1)):
        client = tmp_path / f"{option}.py"
        client.write_text(CLIENT.replace("{option}", option))
        command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", client]
        where = {"cwd": tmp_path, "capture_output": True, "text": True, "check": False}
        run = subprocess.run([*command, "--cache-dir", "/dev/null"], **where)
        assert run.returncode == found, run.stdout
        assert ('did you mean "max_new_tokens"' in run.stdout) == bool(found)
