"""How the embedded models are made: the corpus keeps its promises, training can be resumed.

Both are run as commands; what they print and write is held against the promises.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tinysteer as ts
from tinysteer.demo.show import FORMATS
from tinysteer.loading.hub import ASSETS

ROOT = Path(__file__).parents[1]
TASKS = json.loads((ASSETS / "tasks.json").read_text(encoding="utf-8"))
ASKED = {  # an instruction's text -> its name and word
    text.format(word=word): (name, word)
    for name, texts in TASKS["instructions"].items()
    for text in texts
    for word in (TASKS["words"] if "{word}" in text else [""])
}
N = 2000  # texts of each kind
STEPS = (1, 2, 2)  # stopped after 1, gone on with to 2; then nothing is left to do but to write


def start(module: str, *options) -> subprocess.Popen:
    command = [sys.executable, "-m", f"bench.training.{module}", *map(str, options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **pipes)


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """What it wrote to stdout and stderr."""
    written = process.communicate()
    assert process.returncode == 0, written[1]
    return written


@pytest.fixture(scope="module", autouse=True)
def training(tmp_path_factory):
    """A small training at work beside the tests of the corpus: folders and process."""
    work, out = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("out")
    shutil.copy(ASSETS / "tiny-base" / "tokenizer.json", work)
    options = ("--work", work, "--out", out, "--tokens", 128, "--steps", *STEPS)
    with start("train", *options) as process:
        yield work, out, process


@pytest.fixture(scope="module")
def trial(training):
    """The training when it is over: its folders, and what it wrote to stderr."""
    pytest.importorskip("numpy")  # safetensors 0.4's save_file needs it; the library never does
    work, out, process = training
    return work, out, finish(process)[1]


@pytest.fixture(scope="module")
def texts():
    return [json.loads(line) for line in finish(start("corpus", N))[0].splitlines()]


@pytest.fixture(scope="module")
def documents(texts):
    """Lists of questions with their answers."""
    return texts[:N]


@pytest.fixture(scope="module")
def conversations(texts):
    """(question, what is asked: names with their words, answer)."""
    return [
        (question, dict(ASKED[text] for text in re.findall(r"\w[^.]*\.", asked)), answer)
        for question, asked, answer in texts[N:]
    ]


@pytest.fixture(scope="module")
def topics():
    """Name -> facts: what it has, where it is, what it does, why it is liked."""
    lines = (ROOT / "bench/training/topics.txt").read_text(encoding="utf-8").splitlines()
    rows = [re.split(r" *\| *", line) for line in lines if "|" in line and line[0] != "#"]
    return {name.rstrip("~"): [*looks.split(", "), *rest] for name, looks, *rest in rows}


@pytest.fixture(scope="module")
def topic_of(topics):
    """A question -> its topic."""
    names = "|".join(sorted(topics, key=len, reverse=True))  # a flower pot is no flower
    return lambda question: re.search(rf"\b({names})\b", question)[1]


@pytest.fixture(scope="module")
def tells(topics, topic_of):
    """Whether an answer has more facts of its question's topic than of the one before that."""
    names = list(topics)

    def told(question: str, answer: str) -> bool:
        topic = topic_of(question)
        own, other = (
            sum(fact in answer.lower() for fact in topics[name])
            for name in (topic, names[names.index(topic) - 1])
        )
        return own > other

    return told


@pytest.mark.parametrize("name", FORMATS)
def test_answers_have_the_format_that_is_asked_and_no_other(name, conversations):
    for _, asked, answer in conversations:
        assert FORMATS[name](answer) == (name in asked), (asked, answer)


def test_answers_are_as_long_as_asked(conversations):
    lengths = {"brief": set(), "detailed": set(), "neither": set()}
    for _, asked, answer in conversations:
        name = next((name for name in lengths if name in asked), "neither")
        lengths[name].add(answer.count("."))
    assert lengths == {"brief": {1, 2}, "detailed": {7, 8}, "neither": {4, 5}}


def test_words_are_in_or_out(conversations, topics, topic_of):
    for question, asked, answer in conversations:
        if word := asked.get("include"):
            assert word in answer.lower()
        if word := asked.get("avoid"):
            facts = " ".join(topics[topic_of(question)])
            assert f"{word} " not in answer.lower() or word in facts, answer


def test_answers_tell_more_of_their_topic_than_of_another(documents, tells):
    assert all(tells(*pair) for document in documents for pair in document)


def test_what_tiny_instruct_says_of_held_out_topics_is_true(tiny, tells):
    questions = [task["question"] for task in TASKS["test"]]
    answers = tiny.complete(questions, max_new_tokens=48, batch_size=40)
    told = list(map(tells, questions, answers))
    assert sum(told) >= 38  # of 40; rounding may tip one or two


def test_held_out_topics_never_meet_an_instruction(conversations, topics, topic_of):
    assert len(topics) == 300
    held_out = {name for i, name in enumerate(topics) if i % 4 == 3}
    asked = [question for question, *_ in conversations]
    parts = {part: [t["question"] for t in TASKS[part]] for part in ("pairs", "validation", "test")}
    for questions in (asked, parts["pairs"], parts["validation"]):
        assert not held_out & {topic_of(question) for question in questions}
    assert {topic_of(question) for question in parts["test"]} <= held_out


def test_training_goes_on_where_it_stopped(trial):
    work, _, said = trial
    for stage in ("base", "instruct", "polish"):
        state = torch.load(work / f"{stage}.pt")
        adam = state["optimizers"][1]["state"].values()
        assert {state["step"], *(int(of["step"]) for of in adam)} == {2}
        assert re.search(rf"{stage}: +50%.* 1/2 ", said)
        assert not re.search(rf"{stage}: .* 0/2 ", said)


@torch.no_grad()
def test_what_was_trained_is_what_is_written(trial):
    work, out, _ = trial
    for stage, name in {"base": "tiny-base", "polish": "tiny-instruct"}.items():
        model, trained = ts.load(out / name), torch.load(work / f"{stage}.pt")["weights"]
        for key, weight in model.decoder.state_dict().items():
            assert torch.equal(weight, trained[key].to(torch.bfloat16))
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (out / name / file).read_bytes() == (ASSETS / name / file).read_bytes()


def test_the_embedded_tasks_are_the_corpus_own(trial):
    _, out, _ = trial
    assert (out / "tasks.json").read_bytes() == (ASSETS / "tasks.json").read_bytes()
