"""`tinysteer demo`: steering at work on the embedded models, in tables and texts."""

import json
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from tinysteer.demo import tables
from tinysteer.demo.measures import FORMATS, Lab
from tinysteer.demo.tables import Table


def run_demo(as_json: bool) -> None:
    """Print the demo, or with `as_json` its numbers and texts as one JSON object."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "steering tiny-base")  # the last table is about that
        data = measure((lambda text: None) if as_json else lambda text: print(text, flush=True))
    if as_json:
        print(json.dumps(data, indent=1))


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """All tables and three texts, each said as soon as it is there -> the same as plain data."""
    began = time.perf_counter()
    lab = Lab.load()
    vectors = {name: lab.vector(name) for name in FORMATS}
    n_pairs, n = len(lab.tasks["pairs"]), len(lab.tasks["test"])
    say(
        f"{lab.model}\n"
        f"Vectors from {n_pairs} pairs each; {n} questions on other topics; percent of answers.\n"
        "Edits act on the last prompt token, at a layer chosen on other questions (-: none).\n"
        "neither: no instruction, no steering. random: random directions. asked: by the prompt.\n"
        "both: by prompt and vector, where some layer improves on asking."
    )
    data: dict[str, Any] = {}
    data["formats"], texts = tables.formats(lab, vectors)
    say(table("FORMATS: answers that have one, by to_target", data["formats"]))
    data["length"], brief = tables.brevity(lab)
    say(table("MEAN WORDS of an answer, by adding brevity with a weight", data["length"]))
    data["words"] = tables.words(lab)
    say(
        table(
            "A WORD: answers that hold it, by adding a vector of its own",
            data["words"],
        )
    )
    layers = {name: row["layer"] for name, row in data["formats"].items()}
    data["two at once"] = tables.two_at_once(lab, vectors, layers)
    say(table("TWO AT ONCE: by two edits, or by the vectors' sum", data["two at once"]))
    data["transfer"] = tables.transfer(lab, vectors)
    say(table("ANOTHER MODEL: formats of tiny-base, by tiny-instruct's vectors", data["transfer"]))

    steered = {**texts, "brief": brief}
    data["examples"] = [
        {"question": question, "plain": lab.answers[i], name: steered[name][i]}
        for i, (question, name) in enumerate(
            zip(lab.questions("test"), ("capitals", "json", "brief"), strict=False)
        )
    ]
    for example in data["examples"]:
        question, *answers = example.items()
        say("\n".join(["", f"> {question[1]}", *(f"{how}: {text}" for how, text in answers)]))
    data["seconds"] = round(time.perf_counter() - began, 1)
    say(
        f"\n{data['seconds']:.0f} s on {lab.model.device}, {os.cpu_count()} CPU cores, "
        f"torch {torch.__version__}"
    )
    return data


def table(title: str, rows: Table) -> str:
    columns = list(next(iter(rows.values())))
    cells = [[name, *(cell(row[column]) for column in columns)] for name, row in rows.items()]
    cells.insert(0, ["", *columns])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells
    )
    return "\n".join(["", title, *lines])


def cell(value: float | int | None) -> str:
    """Percentages and words are floats, layers are not; None is a layer too: no steering."""
    return "-" if value is None else f"{value:.1f}" if isinstance(value, float) else f"{value}"
