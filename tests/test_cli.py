"""The command line, in this process: what it prints, what it writes, how it ends."""

import io
import json
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import tinysteer as ts
from tinysteer.cli import main, parser
from tinysteer.experiments.command import use_threads
from tinysteer.specs import parse_steer


@pytest.fixture
def folder(checkpoint):
    return str(checkpoint("llama: grouped heads")[0])


@pytest.fixture
def pairs(tmp_path):
    rows = [{"with": f"{word}, please", "without": word} for word in ("one", "two", "three")]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


@pytest.fixture
def vector(folder, pairs, tmp_path, capsys):
    path = tmp_path / "v.safetensors"
    assert main(["extract", "-m", folder, str(pairs), "-o", str(path)]) == 0
    assert "4 layers" in capsys.readouterr().out
    return path


def test_extract_writes_the_vector_that_python_gets(folder, vector):
    words = ["one", "two", "three"]
    expected = ts.extract(ts.load(folder), [f"{word}, please" for word in words], words)
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
    expected = model.complete("hello", v.at(2).add(weight=40.0), max_new_tokens=9)
    assert capsys.readouterr().out == expected + "\n"
    assert expected != model.complete("hello", max_new_tokens=9)


SPECS = {
    "1:add": lambda v: [v.at(1).add()],
    "1:add=1.5x": lambda v: [v.at(1).add(times=1.5)],
    "-1:at_most=0.5:last": lambda v: [v.at(3).at_most(0.5, where="last")],
    "1-3:add=-2x:,5": lambda v: v.at(range(1, 4)).add(times=-2.0, where=(None, 5)),
}


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_is_what_python_writes(spec, vector):
    assert parse_steer(f"{vector}@{spec}")() == SPECS[spec](ts.SteeringVector.load(vector))


def test_a_faint_weight_is_warned_of_once(folder, vector, capsys):
    command = ["generate", "-m", folder, "hello", "--max-new-tokens", "1"]
    assert main([*command, "--steer", f"{vector}@1-3:add=0.01"]) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"tinysteer: {vector}@1-3:add=0.01: a weight under a tenth")
    assert said.count("\n") == 1


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
    expected = model.generate("hello", edits, max_new_tokens=9)
    assert said == {"prompt": "hello", "completion": expected.text, "reason": expected.reason}


def test_compare_answers_without_the_edits_and_with(folder, vector, capsys):
    flags = ["--steer", f"{vector}@2:add=40", "--compare", "--max-new-tokens", "9"]
    assert main(["generate", "-m", folder, "hello", "you", *flags, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model, edit = ts.load(folder), ts.SteeringVector.load(vector).at(2).add(weight=40.0)
    for name, steer in {"plain": None, "steered": edit}.items():
        expected = model.complete(["hello", "you"], steer, max_new_tokens=9)
        assert [row[name]["completion"] for row in rows] == expected
    main(["generate", "-m", folder, "hello", *flags])
    plain, steered = (rows[0][name]["completion"] for name in ("plain", "steered"))
    assert capsys.readouterr().out == f"plain:   {plain}\nsteered: {steered}\n"


def test_a_system_message_stands_before_each_prompt(tiny, capsys):
    command = ["generate", "What is an owl?", "--system", "Be brief.", "--max-new-tokens", "20"]
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": command[1]}]
    (expected,) = tiny.complete([talk], max_new_tokens=20)
    assert expected != tiny.complete(command[1], max_new_tokens=20)
    for way in ([], ["--stream"]):
        assert main([*command, *way]) == 0
        assert capsys.readouterr().out == expected + "\n"


def test_threads_are_those_asked_for_or_one_for_a_small_model(monkeypatch, folder, capsys):
    used = []
    monkeypatch.setattr("torch.set_num_threads", used.append)
    monkeypatch.setattr("tinysteer.demo.show.measure", lambda say: None)
    runs = f"generate -m {folder} x --max-new-tokens 1", "reproduce lens --layer 99", "demo"
    for command in map(str.split, runs):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        main(command)
        main([*command, "--threads", "3"])
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        main(command)
    monkeypatch.delenv("OMP_NUM_THREADS")
    use_threads(None, SimpleNamespace(config=SimpleNamespace(dim=512), device=torch.device("cpu")))
    assert used == [1, 3] * 3


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
    code = "import sys, tinysteer.cli; print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"transformers", "matplotlib", "huggingface_hub", "jinja2"} & {*said.stdout.split()}


def test_several_prompts_are_told_apart(folder, capsys):
    main(["generate", "-m", folder, "first", "second", "--max-new-tokens", "3"])
    out = capsys.readouterr().out
    assert out.index("> first") < out.index("> second")


def test_prompts_come_from_stdin_a_line_each(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("b\nc\n"))
    assert main(["generate", "-m", folder, "a", "-", "d/e", "--json", "--max-new-tokens", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["a", "b", "c", "d/e"]


def test_inspect_tells_about_a_vector(vector, capsys):
    assert main(["inspect", str(vector)]) == 0
    out = capsys.readouterr().out
    assert "4 layers of width 48" in out
    assert "pairs: 3" in out
    assert f"{float(ts.SteeringVector.load(vector).norms[2]):.3f}" in out


def test_inspect_tells_about_a_model(folder, capsys):
    assert main(["inspect", folder]) == main(["inspect", "-m", folder]) == 0
    out, again = capsys.readouterr().out.split(f"{folder}: model\n")[1:]
    assert out == again
    for part in ("llama", "4 (0 to 3), width 48", "128 tokens", "no chat template", "</s>"):
        assert part in out
    *_, heads, one, eight, many = out.splitlines()
    assert heads.split() == ["texts", "128", "tokens"]
    peaks = [float(row.split()[1]) for row in (one, eight, many)]
    assert peaks == sorted(peaks)


def test_inspect_reads_no_weights(checkpoint, tmp_path, capsys):
    folder = shutil.copytree(checkpoint("gemma2")[0], tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert main(["inspect", str(folder)]) == 0
    assert "2 layers see 6" in capsys.readouterr().out


MISTAKES = {  # one sentence on stderr, exit code 1; {pairs}, {v} and {model} are good files
    "no model": ("generate -m ./nowhere x", "there is no folder ./nowhere"),
    "no vector": ("generate -m {model} x --steer w.safetensors@1:add", "w.safetensors"),
    "no plan": ("generate x --steer none.json", "no plan none.json"),
    "no such layer": ("generate -m {model} x --steer {v}@9:add", "layers 0 to 3"),
    "a weight that is NaN": ("generate -m {model} x --steer {v}@1:add=nan", "finite"),
    "pairs are not there": ("extract -m {model} none.jsonl -o v", "no file none.jsonl"),
    "no folder to write to": ("extract -m {model} {pairs} -o no/v", "no folder"),
    "pairs to overwrite": ("extract {pairs} -o {pairs}", "would overwrite the pairs"),
    "no such file": ("inspect none.safetensors", "there is no file none.safetensors"),
    "a folder to write to": ("extract -m {model} {pairs} -o .", ". is a folder"),
    "too much of the best": ("generate -m m x --top-p 0.5", "top_p changes nothing"),
    "unknown device": ("generate -m {model} x --device gpu", "no device 'gpu'"),
    "unknown dtype": ("generate -m {model} x --dtype int3", "int3 is not supported"),
    "too long": ("generate -m {model} x --max-new-tokens 999", "context of 128"),
    "a folder as a prompt": ("generate {model} x", "is a folder, not a prompt: as the model, "),
    "a model as a prompt": ("explain x tiny-base", "as the model, write -m tiny-base"),
    "nothing on stdin": ("generate -m m x -", "there are no prompts on the standard input"),
    "nothing to compare": ("generate -m m x --compare", "--compare needs --steer"),
    "two streams": ("generate x --compare --stream --steer {v}@1:add", "leave out --stream"),
    "a system message, raw": ("generate -m m x --raw --system s", "leave out --raw"),
    "no template": ("generate -m {model} x --system s", "without a chat template"),
    "no seed": ("generate -m m x --temperature 1 --seed -1", "seed is -1"),
    "fewer than no tokens": ("explain -m m x --max-new-tokens -1", "0 or more"),
    "layers backwards": ("generate x --steer {v}@3-1:add", "v.safetensors@3-1:add: layers 3 to 1"),
    "no batch": ("extract -m m p -o v --batch-size 0", "batch_size is 0"),
    "inspect neither": ("inspect ./nowhere", "there is no folder ./nowhere"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_users_mistake_is_one_sentence_and_exit_code_1(
    name, folder, vector, pairs, capsys, monkeypatch
):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    command, sentence = MISTAKES[name]
    arguments = [part.format(model=folder, v=vector, pairs=pairs) for part in command.split()]
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("tinysteer: ")
    assert said.err.count("\n") == 1
    assert sentence in said.err


def test_pairs_may_hold_any_character_and_begin_with_a_mark(folder, tmp_path):
    path, text = tmp_path / "pairs.jsonl", '{"with": "a\u2028b", "without": "a"}\r\n'
    path.write_text(text, encoding="utf-8-sig", newline="")
    assert main(["extract", "-m", folder, str(path), "-o", str(tmp_path / "v.safetensors")]) == 0


def test_a_vector_of_another_model_is_refused_before_weights_are_read(
    vector, checkpoint, tmp_path, capsys
):
    wider = shutil.copytree(checkpoint("phi3: partial rotary, tied (4-mini)")[0], tmp_path / "m")
    (wider / "model.safetensors").unlink()
    steer, read = ["generate", "--steer", f"{vector}@1:add"], ["explain", "--read", f"{vector}@1-2"]
    for command in (steer, read):
        assert main([*command, "-m", str(wider), "x"]) == 1
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
    assert f"{pairs}, line 2" in capsys.readouterr().err


def test_an_empty_file_of_pairs_is_refused(folder, pairs, tmp_path, capsys):
    pairs.write_text("\n")
    assert main(["extract", "-m", folder, str(pairs), "-o", str(tmp_path / "v")]) == 1
    assert "holds no pairs" in capsys.readouterr().err


V = "v.safetensors"
USAGE = {  # and the end of what is said
    f"generate x --steer {V}@1:add:3,3": "stop must be greater than first",
    f"generate x --steer {V}:add": "as in v.safetensors@12:add=1.5x",
    f"generate x --steer {V}@1:push": "is none of add, to_target, at_least, at_most, ablate",
    f"generate x --steer {V}@1:totarget": "; did you mean to_target?",
    f"generate x --steer {V}@1:add=much": "could not convert string to float: 'much'",
    f"generate x --steer {V}@1:ablate=1": "ablate takes no number",
    f"generate x --steer {V}@1:to_target=2x": "to_target takes no number with an x",
    f"generate x --steer {V}@1:add=1:sometimes": "and not FIRST,STOP",
    f"explain x --read {V}": "is not FILE@LAYERS, as in v.safetensors@12",
    "generate x --json --stream": "not allowed with argument --json",
    "inspect tiny-base -m tiny-base": "not allowed with argument FILE_OR_MODEL",
    "demo --threads 0": "'0' is not a whole number, 1 or more",
    "generate x --max-tokens 5": "--max-tokens 5; did you mean --max-new-tokens?",
    "genrate x": "; did you mean generate?",
    "extract p.jsonl -o v --method pac": "; did you mean pca?",
}


@pytest.mark.parametrize("command", USAGE)
def test_wrong_usage_is_exit_code_2_and_the_nearest_name(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: tinysteer")
    assert said.endswith(f"{USAGE[command]}\n")


def test_alone_it_prints_the_help_with_examples_that_are_commands(capsys):
    assert main([]) == 0
    *_, examples = capsys.readouterr().out.partition("examples:\n")
    for example in examples.splitlines():
        parser().parse_args(shlex.split(example)[1:])
    assert examples.count("tinysteer ") == 4


def test_it_is_installed_as_a_command_and_as_a_module():
    command = [sys.executable, "-m", "tinysteer", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == f"tinysteer {ts.__version__}\n"
