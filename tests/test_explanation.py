"""What `explain` says is what the edits did."""

import json

import pytest
import torch

import tinysteer as ts


@pytest.fixture
def vector(model):
    torch.manual_seed(0)
    without = torch.randn(4, 48)
    return ts.SteeringVector._from_means(without + torch.randn(4, 48), without, {"name": "terse"})


@pytest.mark.parametrize("variant", ["llama: grouped heads", "gemma2"])  # with post-norms
def test_the_moves_are_those_of_the_residual_stream(checkpoint, variant, vector):
    model = ts.load(checkpoint(variant)[0], dtype="float32")
    edit = vector.at(2).to_target(0.5, target=3.0)
    ids = model.tokenizer.chat("a prompt")
    (said,) = model.explain("a prompt", [edit])
    tokens = torch.tensor([ids])
    moved = model.residuals(tokens, [edit])[2] - model.residuals(tokens)[2]
    torch.testing.assert_close(said.d[0], (moved @ edit.direction)[0], atol=1e-5, rtol=1e-4)
    assert said.positions == list(range(-len(ids) + 1, 1))


def test_each_edit_of_a_layer_is_told_by_itself_and_in_order(model, vector):
    v = vector.at(1)
    edits = [
        v.add(weight=2.0),
        vector.at(2).add(weight=1.0),
        v.add(weight=-0.5),
        v.to_target(target=7.0),
    ]
    (said,) = model.explain("x", edits)
    assert said.edits == edits
    tokens = torch.tensor([model.tokenizer.chat("x")])
    before = model.residuals(tokens)[1] @ v.direction
    assert said.d[:3, 0].tolist() == pytest.approx([2.0, 1.0, -0.5])
    torch.testing.assert_close(said.d[3], 7.0 - (before[0] + 1.5), atol=1e-4, rtol=1e-4)


def test_rows_have_their_own_edits_and_padding_has_none(model, vector):
    prompts = ["short", "a much longer prompt"]
    one, two = model.explain(prompts, [[vector.at(1).add(weight=2.0)], []])
    n = len(model.tokenizer.chat(prompts[0]))
    padding = len(two.tokens) - n
    assert one.positions == [None] * padding + list(range(-n + 1, 1))
    assert one.tokens[:padding] == [None] * padding
    assert one.d[0].tolist() == [0.0] * padding + [2.0] * n
    assert two.d.shape == (0, len(two.tokens))


def test_new_tokens_are_those_of_complete(model, vector):
    edits = [
        vector.at(1).add(weight=9.0, where=(0, 2)),
        vector.at(2).add(weight=1.0, where="prompt"),
    ]
    (said,) = model.explain("hello", edits, max_new_tokens=4)
    text = model.complete("hello", edits, max_new_tokens=4)[0]
    new = [token for token, at in zip(said.tokens, said.positions, strict=True) if (at or 0) > 0]
    assert model.tokenizer.decode(map(model.tokenizer.vocabulary.token_to_id, new)) == text
    where = [at for at, d in zip(said.positions, said.d[0].tolist(), strict=True) if d]
    assert where == [0, 1]
    assert said.d[1].tolist() == [float(at < 0) for at in said.positions]


def test_the_last_new_token_is_never_run_so_nothing_moves_it(model, vector):
    (said,) = model.explain("hello", [vector.at(1).add(weight=1.0)], max_new_tokens=2)
    assert said.positions[-2:] == [1, 2]
    assert said.d[0, -3:].tolist() == [1.0, 1.0, 0.0]


def test_a_token_that_is_a_lines_end_stays_in_its_row(model, vector):
    model.tokenizer.vocabulary.add_tokens(["\n\n"])
    (said,) = model.explain("a\n\nb", [vector.at(1).add()], chat=False)
    assert "\\n\\n" in said.tokens
    assert len(str(said).split("\n")) == 3 + len(said.tokens)


def test_the_table_marks_padding_and_the_last_prompt_token(model, vector):
    edit = vector.at(1).add(weight=2.0, where="generation")
    table = str(model.explain(["short", "a much longer prompt"], [edit], max_new_tokens=1)[0])
    lines = table.split("\n")
    assert lines[1] == "  [0] <Edit terse at layer 1: bias=2, first=0>"
    assert lines[3].split() == ["padding"]
    (last,) = (line for line in lines if line.endswith("<- last prompt token"))
    assert last.split()[0] == "0"
    assert "+2.000" in last
    assert lines[lines.index(last) - 1].endswith(" .")


def test_the_command_prints_it(model, checkpoint, vector, tmp_path, capsys):
    from tinysteer.cli import main

    vector.save(tmp_path / "v.safetensors")
    folder = str(checkpoint("llama: grouped heads")[0])
    command = ["explain", "-m", folder, "hello", "--steer", f"{tmp_path / 'v.safetensors'}@1:add=3"]
    assert main(command) == 0
    assert "+3.000  <- last prompt token" in capsys.readouterr().out
    assert main([*command, "--json", "--max-new-tokens", "2"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["prompt"] == "hello"
    assert said["d"][0][0] == pytest.approx(3.0)
    assert len(said["tokens"]) == len(said["positions"]) == len(said["d"][0])


def test_what_cannot_be_run_is_refused(model, vector):
    with pytest.raises(ValueError, match="exceed the model's context"):
        model.explain("x", max_new_tokens=1000)
    with pytest.raises(ValueError, match="prompts must be a string or a list"):
        model.explain(None)
    assert model.explain([]) == []
    with pytest.raises(ValueError, match="2 lists of edits for 1 prompts"):
        model.explain("x", [[], []])
