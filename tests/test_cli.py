"""The command line, in this process: what it prints, what it writes, how it ends."""

import io
import json

import pytest

import tinysteer as ts
from tinysteer.cli import main


@pytest.fixture
def folder(checkpoint):
    return str(checkpoint("llama: grouped heads")[0])


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"with": f"{word}, please", "without": word} for word in ("one", "two", "three")]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


@pytest.fixture
def vector(folder, pairs, tmp_path, capsys):
    path = tmp_path / "v.safetensors"
    assert main(["extract", "-m", folder, str(pairs), "-o", str(path)]) == 0
    assert "4 layers" in capsys.readouterr().out
    return path


def test_extract_writes_the_vector_that_python_gets(folder, vector):
    model = ts.load(folder)
    words = ["one", "two", "three"]
    expected = ts.extract(model, [f"{word}, please" for word in words], words)
    written = ts.SteeringVector.load(vector)
    assert (written.directions - expected.directions).abs().max() < 1e-6
    assert written.metadata["pairs"] == "3"


def test_the_papers_names_for_pairs_are_read_too(folder, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a b", "prompt_without_instruction": "a", "key": 1}\n')
    assert main(["extract", "-m", folder, str(path), "-o", str(tmp_path / "v.safetensors")]) == 0


def test_generate_prints_the_steered_text(folder, vector, capsys):
    spec = f"{vector}@2:add=40"
    assert main(["generate", "-m", folder, "hello", "--steer", spec, "--max-new-tokens", "9"]) == 0
    model, v = ts.load(folder), ts.SteeringVector.load(vector)
    expected = model.complete(["hello"], [v.at(2).add(weight=40.0)], max_new_tokens=9)[0]
    assert capsys.readouterr().out == expected + "\n"
    assert expected != model.complete(["hello"], max_new_tokens=9)[0]


def test_several_edits_act_in_order_where_they_should(folder, vector, capsys):
    specs = [f"{vector}@2:to_target=0.5:generation", f"{vector}@-1:add:-2,"]
    specs.append(f"{vector}@1:ablate:0,1")
    arguments = [part for spec in specs for part in ("--steer", spec)]
    arguments += ["--max-new-tokens", "9", "--json"]
    assert main(["generate", "-m", folder, "hello", *arguments]) == 0
    model, v = ts.load(folder), ts.SteeringVector.load(vector)
    edits = [v.at(2).to_target(0.5, where="generation"), v.at(3).add(where=(-2, None))]
    edits.append(v.at(1).ablate(where=(0, 1)))
    said = json.loads(capsys.readouterr().out)
    expected = model.complete(["hello"], edits, max_new_tokens=9)[0]
    assert said == {"prompt": "hello", "completion": expected}


def test_streaming_prints_the_same_text(folder, capsys):
    main(["generate", "-m", folder, "hello", "--max-new-tokens", "9"])
    whole = capsys.readouterr().out
    assert main(["generate", "-m", folder, "hello", "--max-new-tokens", "9", "--stream"]) == 0
    assert capsys.readouterr().out == whole


def test_every_option_of_generation_arrives(folder, capsys):
    flags = "--temperature 2 --top-k 50 --top-p 0.9 --min-p 0.01 --seed 3 --stop x --raw"
    main(["generate", "-m", folder, "hello", *flags.split(), "--max-new-tokens", "20"])
    options = {"temperature": 2, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "seed": 3}
    model = ts.load(folder)
    everything = {**options, "stop": "x", "chat": False, "max_new_tokens": 20}
    expected = model.complete("hello", **everything)
    assert capsys.readouterr().out == expected + "\n"
    for name, other in {"seed": 4, "top_k": 1, "temperature": 0.01, "chat": True}.items():
        assert model.complete("hello", **everything | {name: other}) != expected


def test_importing_brings_neither_transformers_nor_the_hub():
    import subprocess
    import sys

    code = "import sys, tinysteer.cli; print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"transformers", "matplotlib", "huggingface_hub", "jinja2"} & {*said.stdout.split()}


def test_several_prompts_are_told_apart(folder, capsys):
    main(["generate", "-m", folder, "first", "second", "--max-new-tokens", "3"])
    out = capsys.readouterr().out
    assert out.index("> first") < out.index("> second")


def test_prompts_come_from_stdin_a_line_each(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("first\nsecond\n"))
    assert main(["generate", "-m", folder, "-", "--json", "--max-new-tokens", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["first", "second"]


def test_inspect_tells_about_a_vector(vector, capsys):
    assert main(["inspect", str(vector)]) == 0
    out = capsys.readouterr().out
    assert "4 layers of width 48" in out
    assert "pairs: 3" in out
    assert f"{float(ts.SteeringVector.load(vector).norms[2]):.3f}" in out


def test_inspect_tells_about_a_model(folder, capsys):
    assert main(["inspect", folder]) == 0
    out = capsys.readouterr().out
    for part in ("llama", "4 (0 to 3), width 48", "128 tokens", "no chat template", "</s>"):
        assert part in out
    *_, heads, one, eight, many = out.splitlines()
    assert heads.split() == ["texts", "128", "tokens"]
    peaks = [float(row.split()[1]) for row in (one, eight, many)]
    assert peaks == sorted(peaks)


def test_inspect_reads_no_weights(checkpoint, tmp_path, capsys):
    import shutil

    folder = shutil.copytree(checkpoint("gemma2")[0], tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert main(["inspect", str(folder)]) == 0
    assert "2 layers see 6" in capsys.readouterr().out


MISTAKES = {  # one sentence on stderr, exit code 1; {pairs}, {v} and {model} are good files
    "no model": (["generate", "-m", "./nowhere", "x"], "there is no folder ./nowhere"),
    "no vector": (
        ["generate", "-m", "{model}", "x", "--steer", "w.safetensors@1:add"],
        "w.safetensors",
    ),
    "no plan": (["generate", "x", "--steer", "none.json"], "no plan none.json"),
    "no such layer": (["generate", "-m", "{model}", "x", "--steer", "{v}@9:add"], "layers 0 to 3"),
    "a weight that is NaN": (
        ["generate", "-m", "{model}", "x", "--steer", "{v}@1:add=nan"],
        "finite",
    ),
    "pairs are not there": (
        ["extract", "-m", "{model}", "none.jsonl", "-o", "v"],
        "no file none.jsonl",
    ),
    "no folder to write to": (["extract", "-m", "{model}", "{pairs}", "-o", "no/v"], "no folder"),
    "pairs to overwrite": (["extract", "{pairs}", "-o", "{pairs}"], "would overwrite the pairs"),
    "no such file": (["inspect", "none.safetensors"], "there is no file none.safetensors"),
    "a folder to write to": (["extract", "-m", "{model}", "{pairs}", "-o", "."], ". is a folder"),
    "too much of the best": (
        ["generate", "-m", "m", "x", "--top-p", "0.5"],
        "top_p changes nothing",
    ),
    "unknown device": (["generate", "-m", "{model}", "x", "--device", "gpu"], "no device 'gpu'"),
    "unknown dtype": (
        ["generate", "-m", "{model}", "x", "--dtype", "int3"],
        "int3 is not supported",
    ),
    "too long": (["generate", "-m", "{model}", "x", "--max-new-tokens", "999"], "context of 128"),
    "inspect neither": (["inspect", "./nowhere"], "there is no folder ./nowhere"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_users_mistake_is_one_sentence_and_exit_code_1(name, folder, vector, pairs, capsys):
    arguments, sentence = MISTAKES[name]
    arguments = [part.format(model=folder, v=vector, pairs=pairs) for part in arguments]
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("tinysteer: ")
    assert said.err.count("\n") == 1
    assert sentence in said.err


def test_empty_stdin_is_a_mistake(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(["generate", "-m", folder, "-"]) == 1
    assert "no prompts" in capsys.readouterr().err


def test_pairs_may_hold_any_character_and_begin_with_a_mark(folder, tmp_path):
    path, text = tmp_path / "pairs.jsonl", '{"with": "a\u2028b", "without": "a"}\r\n'
    path.write_text(text, encoding="utf-8-sig", newline="")
    assert main(["extract", "-m", folder, str(path), "-o", str(tmp_path / "v.safetensors")]) == 0


def test_a_vector_of_another_model_is_refused_before_weights_are_read(
    vector, checkpoint, tmp_path, capsys
):
    import shutil

    wider = shutil.copytree(checkpoint("phi3: partial rotary, tied (4-mini)")[0], tmp_path / "m")
    (wider / "model.safetensors").unlink()
    assert main(["generate", "-m", str(wider), "x", "--steer", f"{vector}@1:add"]) == 1
    assert "the vector is 48 wide, this model 64" in capsys.readouterr().err


BAD_LINES = {
    "not JSON": "{with: 1}",
    "no object": "[1, 2]",
    "other keys": '{"prompt": "a"}',
    "no strings": '{"with": 1, "without": 2}',
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_of_pairs_is_named(name, folder, pairs, tmp_path, capsys):
    pairs.write_text('{"with": "a", "without": "b"}\n' + BAD_LINES[name])
    assert main(["extract", "-m", folder, str(pairs), "-o", str(tmp_path / "v.safetensors")]) == 1
    assert f"{pairs}, line 2: " in capsys.readouterr().err


def test_an_empty_file_of_pairs_is_refused(folder, pairs, tmp_path, capsys):
    pairs.write_text("\n")
    assert main(["extract", "-m", folder, str(pairs), "-o", str(tmp_path / "v")]) == 1
    assert "holds no pairs" in capsys.readouterr().err


USAGE = {
    "an empty window": ["generate", "x", "--steer", "v.safetensors@1:add:3,3"],
    "no command": [],
    "unknown command": ["sing"],
    "no layer": ["generate", "-m", "m", "x", "--steer", "v.safetensors:add"],
    "unknown verb": ["generate", "-m", "m", "x", "--steer", "v.safetensors@1:push"],
    "no number": ["generate", "-m", "m", "x", "--steer", "v.safetensors@1:add=much"],
    "ablate takes no number": ["generate", "-m", "m", "x", "--steer", "v.safetensors@1:ablate=1"],
    "unknown window": ["generate", "-m", "m", "x", "--steer", "v.safetensors@1:add=1:sometimes"],
    "two ways to print": ["generate", "-m", "m", "x", "--json", "--stream"],
}


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage_is_exit_code_2(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main(USAGE[name])
    assert ended.value.code == 2
    assert "usage: tinysteer" in capsys.readouterr().err


def test_it_is_installed_as_a_command_and_as_a_module():
    import subprocess
    import sys

    command = [sys.executable, "-m", "tinysteer", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == f"tinysteer {ts.__version__}\n"
