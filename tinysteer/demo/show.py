"""`tinysteer demo`: a question answered plain and steered, then six formats with their controls.

Edits act on the last prompt token alone, where vectors are read and where tiny-instruct keeps what
style an answer is to have; the paper edits all positions.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch

from tinysteer.evaluation.quality import repetition
from tinysteer.evaluation.selection import choose_layer, sweep, sweep_layers
from tinysteer.extraction import extract, mean_residuals
from tinysteer.language_model import LanguageModel, load
from tinysteer.loading.hub import ASSETS
from tinysteer.steering.edits import Edit
from tinysteer.steering.vectors import SteeringVector

QUESTION, LAYER = "What is a bakery?", 4  # steered to capitals there; the table chooses its layers
REPETITIVE = 0.3  # the share of repeated runs of three words from which on a text is broken
OPTIONS = {"max_new_tokens": 112, "batch_size": 256}
TABLE = """
FORMATS: percent of the answers to {} more questions that have one
neither: plain. steered: by the format's vector, at a layer chosen on {} others.
random: by random directions, mean of two. asked: by the prompt, without a vector.
            neither  steered   random    asked  layer"""
COMMANDS = (
    f'tinysteer generate "{QUESTION} Answer in JSON."',
    f"""\
echo '{{"with": "What is a fox? Answer in capitals.", "without": "What is a fox?"}}' > fox.jsonl &&
tinysteer extract fox.jsonl -o capitals.safetensors &&
tinysteer generate "{QUESTION}" --steer capitals.safetensors@{LAYER}:to_target:last""",
    "tinysteer reproduce words",
)


def is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


FORMATS: dict[str, Callable[[str], bool]] = {
    "capitals": str.isupper,
    "lowercase": str.islower,
    "json": is_json,
    "bullets": lambda text: all(line.startswith("- ") for line in text.split("\n")),
    "quotes": lambda text: len(text) > 1 and text[0] == text[-1] == '"',
    "no commas": lambda text: bool(text) and "," not in text,
}


def run_demo(as_json: bool, threads: int | None = None) -> None:
    """Print the demo as it goes, or with `as_json` all of it at the end as one JSON object.

    threads: torch's; default OMP_NUM_THREADS, else one, as more make so small a model no faster.
    """
    if threads or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or 1)
    data = measure((lambda *said, **how: None) if as_json else partial(print, flush=True))
    if as_json:
        print(json.dumps(data, indent=1))


def measure(say: Callable[..., None]) -> dict[str, Any]:
    """Say each text and row, as by print, as soon as it is known -> all of it as plain data."""
    began, began_cpu = time.perf_counter(), time.process_time()
    model = load(dtype="float32")
    say(f"{model} comes with the package and needs neither a GPU nor the network.")
    say(f"It answers a question, plain and steered, and then fills a table.\n\n> {QUESTION}")
    data: dict[str, Any] = {"model": str(model), "question": QUESTION}
    data["plain"] = model.complete(QUESTION)
    say(f"plain: {data['plain']}")
    base = mean_residuals(model, ask("pairs"), batch_size=64)
    vectors = {n: extract(model, ask("pairs", n), base, name=n, batch_size=64) for n in FORMATS}
    say(f"By a vector from {base.n} other questions with and without a request for capitals:")
    data["steered"] = model.complete(QUESTION, to_target(vectors["capitals"], LAYER))
    say(f"steered: {data['steered']}")

    plain, data["formats"] = model.complete(ask("test"), **OPTIONS), {}
    say(TABLE.format(len(plain), len(ask("validation"))))
    for name, vector in vectors.items():
        layer = best_layer(model, name, vector)
        used = [vector, *(vector.random_like(f"{name} {draw}", base.mean) for draw in range(2))]
        settings = {i: to_target(v, layer) for i, v in enumerate(used)}
        texts = [plain, *sweep(model, ask("test"), settings, **OPTIONS).values()]
        texts.append(model.complete(ask("test", name), **OPTIONS))
        neither, steered, *random, asked = (percent(FORMATS[name], t) for t in texts)
        row = {"neither": neither, "steered": steered, "random": sum(random) / 2, "asked": asked}
        data["formats"][name] = row | {"layer": layer}
        say(f"{name:9}", *map("{:8.1f}".format, row.values()), f"{layer or '-':>6}")

    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    data |= {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "cores": os.cpu_count()}
    data |= {"device": str(model.device), "torch": torch.__version__, "commands": COMMANDS}
    say("\n{seconds} s, {cpu_seconds} CPU s, {device}, {cores} cores, torch {torch}".format(**data))
    say("\nTo go on:", *COMMANDS, sep="\n\n")
    return data


def ask(part: str, name: str = "") -> list[str]:
    """The questions of "pairs", "validation" or "test", with an instruction's wordings in turn."""
    tasks = json.loads((ASSETS / "tasks.json").read_text(encoding="utf-8"))
    wordings = cycle(tasks["instructions"][name] if name else [""])
    return [f"{task['question']} {next(wordings)}".strip() for task in tasks[part]]


def to_target(vector: SteeringVector, layer: int | None) -> list[Edit]:
    return [] if layer is None else [vector.at(layer).to_target(where="last")]


def best_layer(model: LanguageModel, name: str, vector: SteeringVector) -> int | None:
    """The paper's rule on validation questions: a layer from 1 on, or None for no steering."""
    layers = sweep_layers(model.config.n_layers, step=1)  # not every second: there are only six
    texts = sweep(model, ask("validation"), {l: to_target(vector, l) for l in layers}, **OPTIONS)
    accuracy = {l: percent(FORMATS[name], texts[l]) for l in layers}
    broken = {l: percent(lambda text: repetition(text) > REPETITIVE, texts[l]) for l in layers}
    return choose_layer(accuracy, broken)


def percent(has: Callable[[str], bool], texts: Sequence[str]) -> float:
    return 100 * sum(map(has, texts)) / len(texts)
