"""What an experiment found: estimates with their 95 % intervals, tables, a summary, a report."""

import datetime
import importlib.util
import json
import math
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tinysteer.evaluation.quality import Judge, judged, perplexity
from tinysteer.experiments.pictures import draw
from tinysteer.experiments.study import Ask, Study

Z = 1.959964  # of a normal distribution's middle 95 %
DRAWS = 2000  # of a bootstrap
GROUPS = ("kind", "setting", "arm", "weight")  # labels that part the answers
LONGEST = 300  # characters of an answer that the report shows


Estimate = dict[str, Any]  # value, low, high, n, and interval: Wilson's, or a bootstrap's
Cell = Estimate | float | int | str | None
Table = dict[str, Any]  # title, and rows of the same columns


def share(hits: Iterable[bool]) -> Estimate:
    """How many of n are true; Wilson's score interval, which holds for small n and near 0 and 1."""
    hits = [bool(hit) for hit in hits]
    n, k = len(hits), sum(hits)
    if not n:
        return {"value": None, "low": 0.0, "high": 1.0, "n": 0, "interval": "Wilson"}
    p, z = k / n, Z * Z / n
    middle = (p + z / 2) / (1 + z)
    half = math.sqrt(p * (1 - p) * z + z * z / 4) / (1 + z)
    low, high = max(middle - half, 0.0), min(middle + half, 1.0)
    return {"value": p, "low": low, "high": high, "n": n, "interval": "Wilson"}


def mean(values: Sequence[float]) -> Estimate:
    """The mean; its interval by drawing the values anew, with a fixed seed."""
    numbers = torch.tensor(list(values), dtype=torch.float64)
    seeded = torch.Generator().manual_seed(0)
    draws = torch.randint(len(numbers), (DRAWS, len(numbers)), generator=seeded)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = numbers[draws].mean(-1).quantile(ends).tolist()
    value, n = statistics.fmean(numbers.tolist()), len(numbers)
    return {"value": value, "low": low, "high": high, "n": n, "interval": "bootstrap"}


def table_of(title: str, cells: Mapping[tuple, Cell], head: str = "") -> Table:
    """Cells by row and column, both in the order in which they first appear."""
    rows, columns = (dict.fromkeys(key[i] for key in cells) for i in (0, 1))
    filled = [
        {head: row} | {column: cells.get((row, column)) for column in columns} for row in rows
    ]
    return {"title": title, "rows": filled}


def markdown(table: Table) -> str:
    heads = list(table["rows"][0]) if table["rows"] else ["nothing"]
    cells = [[shown(row.get(head)) for head in heads] for row in table["rows"]]
    lines = [heads, ["---"] * len(heads), *cells]
    return "\n".join([f"**{table['title']}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


def shown(cell: Cell) -> str:
    """Shares in percent; estimates with their interval."""
    if cell is None:
        return "-"
    if isinstance(cell, dict):
        if not cell["n"]:
            return "none"
        percent = cell["interval"] == "Wilson"
        value, low, high = (
            (100 if percent else 1) * cell[name] for name in ("value", "low", "high")
        )
        return "{:{f}} [{:{f}}, {:{f}}]".format(value, low, high, f=".1f" if percent else ".3g")
    return f"{cell:.3g}" if isinstance(cell, float) else f"{cell}".replace("|", "\\|")


@dataclass
class Findings:
    tables: list[Table]
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)  # what pictures need besides the tables


def write(
    out: Path, findings: Findings, about: Mapping[str, Any], seconds: float, said: str
) -> str:
    """summary.json, pictures where there is matplotlib, and report.md -> the report."""
    about = {**about, **circumstances(about["device"]), "seconds": round(seconds)}
    summary = about | vars(findings)
    text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    (out / "summary.json").write_text(text, encoding="utf-8")
    pictures = draw(summary, out) if importlib.util.find_spec("matplotlib") else []
    cells = [cell for table in findings.tables for row in table["rows"] for cell in row.values()]
    kinds = {cell["interval"] for cell in cells if isinstance(cell, dict)}
    parts = [
        f"# {about['experiment']}: {about['model']}",
        f"{about['dtype']}, {about['device']}, torch {about['torch']}, {about['date']}, "
        f"{about['seconds']} s since it was last begun; `{about['command']}`",
        *findings.notes,
        f"In brackets: 95 % intervals ({' and '.join(sorted(kinds))})." if kinds else "",
        *map(markdown, findings.tables),
        *(f"![{name}]({name})" for name in pictures),
        said,
    ]
    report = "\n\n".join(part for part in parts if part) + "\n"
    (out / "report.md").write_text(report, encoding="utf-8")
    return report


def quality(study: Study, judges: Mapping[str, Judge]) -> list[Table]:
    """What judges say of the test answers, by what they are answers of."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for ask, text in study.said:
        names = (shown(ask.labels.get(name, "")) for name in GROUPS)
        groups.setdefault(", ".join(filter(None, names)), []).append((ask.prompt, text))
    cells: dict[tuple, Cell] = {}
    for group, pairs in groups.items():
        values = judged(*zip(*pairs, strict=True), judges)
        if study.reader:
            responses = [text for _, text in pairs]
            values[f"perplexity to {study.reader.name}"] = perplexity(study.reader, responses)
        cells |= {(group, judge): mean(judgements) for judge, judgements in values.items()}
    return [table_of("Quality, whether or not an answer follows", cells)] if cells else []


def examples(study: Study) -> str:
    """What was answered to the first prompt of each instruction, but for the random arm."""
    firsts: dict[str, tuple[Ask, dict[str, str]]] = {}
    for ask, text in study.said:
        if ask.labels["arm"] != "random":
            first, arms = firsts.setdefault(ask.labels["instruction"], (ask, {}))
            if ask.prompt == first.prompt:
                arms[ask.labels["arm"]] = text
    lines = (
        ["**The first answers of each instruction; of several weights, by the last**"]
        if firsts
        else []
    )
    for instruction, (ask, arms) in firsts.items():
        quotes = [f"> {arm}: {cut(text)}" for arm, text in arms.items()]
        lines.append("\n>\n".join([f"> *{instruction}* {cut(ask.prompt)}", *quotes]))
    return "\n\n".join(lines)


def cut(text: str) -> str:
    """On one line, without what Markdown or a long answer would make of it."""
    line = " ".join(text.split())
    line = line if len(line) <= LONGEST else line[:LONGEST] + " [cut]"
    return "".join(f"\\{c}" if c in "\\`*_<>#|[]" else c for c in line) or "(nothing)"


def circumstances(device: str) -> dict[str, str]:
    """Machine, versions, date and command. device: the model's kind."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{processor}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "date": str(datetime.date.today()),
        "command": shlex.join(["tinysteer", *sys.argv[1:]]),
    }
