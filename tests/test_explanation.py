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
    tokens = torch.tensor([model.tokenizer.chat("a prompt")])
    said = model.explain("a prompt", [edit])
    plain, steered = model.residuals(tokens)[2, 0], model.residuals(tokens, [edit])[2, 0]
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(said.before[0], plain @ edit.direction, **close)
    torch.testing.assert_close(said.before[0] + said.d[0], steered @ edit.direction, **close)
    torch.testing.assert_close(said.share[0], said.d[0].abs() / plain.norm(dim=-1), **close)
    assert said.positions == list(range(-tokens.shape[1] + 1, 1))


def test_each_edit_of_a_layer_is_told_by_itself_and_in_order(model, vector):
    v = vector.at(1)
    edits = [v.add(weight=2.0), vector.at(2).add(weight=1.0), v.add(weight=-0.5)]
    said = model.explain("x", [*edits, v.to_target(target=7.0)])
    tokens = torch.tensor([model.tokenizer.chat("x")])
    before = (model.residuals(tokens)[1] @ v.direction)[0]
    assert said.d[:3, 0].tolist() == pytest.approx([2.0, 1.0, -0.5])
    torch.testing.assert_close(said.before[2], before + 2.0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(said.d[3], 7.0 - (before + 1.5), atol=1e-4, rtol=1e-4)


def test_the_odds_are_those_of_the_next_token(model, vector):
    edits = [vector.at(1).add(weight=9.0)]
    ids = torch.tensor([model.tokenizer.chat("hello")])
    ways = [model.logits(ids, steer)[0].softmax(-1) for steer in (None, edits)]
    said = model.explain("hello", edits)
    for odds, p in zip(said.odds, ways, strict=True):
        following = torch.tensor([*ids[0, 1:].tolist(), int(ways[1][-1].argmax())])
        torch.testing.assert_close(odds, p[range(len(p)), following])
    assert said.behind == model.complete("hello", edits, max_new_tokens=1)


def test_what_is_read_is_the_unsteered_projection(model, vector):
    v, tokens = vector.at(2), torch.tensor([model.tokenizer.chat("a text")])
    said = model.explain("a text", read=vector.at([2, 3]))
    torch.testing.assert_close(said.readings[0], model.residuals(tokens)[2, 0] @ v.direction)
    ways = (said.readings[0] - v.baseline) / (v.target - v.baseline)
    torch.testing.assert_close(said.ways[0], ways)
    steered = model.explain("a text", vector.at(0).add(weight=9.0), read=v)
    torch.testing.assert_close(steered.readings[0], said.readings[0])
    assert said.d.shape == (0, len(said.tokens))
    assert "read L3" in str(said)


def test_several_prompts_have_their_own_edits(model, vector):
    prompts, edit = ["short", "a much longer prompt"], vector.at(1).add(weight=2.0)
    told = model.explain(prompts, [[edit], []])
    alone = [model.explain(prompts[0], edit), model.explain(prompts[1])]
    assert [str(one) for one in told] == [str(one) for one in alone]


def test_new_tokens_are_those_of_complete_and_the_last_is_not_run(model, vector):
    edits = [vector.at(1).add(weight=9.0, where=(0, 2)), vector.at(2).add(where="prompt")]
    said = model.explain("hello", edits, max_new_tokens=4)
    new = [token for token, at in zip(said.tokens, said.positions, strict=True) if at > 0]
    assert "".join(new) == repr(model.complete("hello", edits, max_new_tokens=4))[1:-1]
    assert [at for at, d in zip(said.positions, said.d[0].tolist(), strict=True) if d > 0] == [0, 1]
    assert ((said.d[1] > 0) == (torch.tensor(said.positions) < 0)).all()
    assert said.d[:, -1].isnan().all()
    assert said.odds[:, -1].isnan().all()
    assert not said.odds[:, :-1].isnan().any()


def test_the_table_reads_as_the_text_does(model, vector):
    model.tokenizer.vocabulary.add_tokens(["\n\n"])
    edit = vector.at(1).add(weight=2.0, where="generation")
    said = model.explain("a\n\nb", [edit], chat=False)
    assert said.tokens[-3:] == ["a", "\\n\\n", "b"]
    lines = str(said).split("\n")
    assert lines[1] == "  [0] <Edit terse at layer 1: bias=2, first=0>"
    assert len(lines) == 3 + len(said.tokens)
    (last,) = (line for line in lines if line.endswith("<- last prompt token"))
    assert last.split()[:2] == ["0", "b"]
    before = f"{float(said.before[0, -1]):.2f} -> {float(said.before[0, -1]) + 2:.2f}"
    assert before in last
    assert before.replace(">", "&gt;") in said._repr_html_()
    assert said._repr_html_().count("<tr") == 1 + len(said.tokens)


def test_plain_data_has_no_nan(model, vector):
    plain = model.explain("x", [vector.at(1).add()], max_new_tokens=1).as_dict()
    assert json.loads(json.dumps(plain, allow_nan=False))["d"][0][-1] is None


def test_the_command_prints_it(model, checkpoint, vector, tmp_path, capsys):
    from tinysteer.cli import main

    file = tmp_path / "v.safetensors"
    vector.save(file)
    folder = str(checkpoint("llama: grouped heads")[0])
    specs = ["--steer", f"{file}@1:add=3", "--read", f"{file}@0", "--read", f"{file}@2-3"]
    command = ["explain", "-m", folder, "hello", *specs]
    edit, read = vector.at(1).add(weight=3.0), vector.at([0, 2, 3])
    assert main(command) == 0
    expected = model.explain("hello", edit, read=read)
    assert capsys.readouterr().out == f"> hello\n{expected}\n\n"
    assert main([*command, "--json", "--max-new-tokens", "2"]) == 0
    expected = model.explain("hello", edit, read=read, max_new_tokens=2)
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads(json.dumps({"prompt": "hello", **expected.as_dict()}))


def test_what_cannot_be_run_is_refused(model, vector):
    with pytest.raises(ValueError, match="exceed the model's context"):
        model.explain("x", max_new_tokens=1000)
    with pytest.raises(ValueError, match="prompts must be a string or a list"):
        model.explain(None)
    assert model.explain([]) == []
    with pytest.raises(ValueError, match="2 lists of edits for 1 prompts"):
        model.explain("x", [[], []])
    for read in (vector, [vector.at(1).add()]):
        with pytest.raises(ValueError, match="read takes directions"):
            model.explain("x", read=read)
