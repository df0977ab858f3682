"""What an experiment found: a summary as JSON, and tables in Markdown for people."""

import datetime
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tinysteer.evaluation.quality import Judge, judged, perplexity
from tinysteer.experiments.intervals import Estimate, mean
from tinysteer.experiments.study import Study

Cell = Estimate | float | int | str | None


@dataclass
class Table:
    """Rows of the same columns. Estimates are shown with their interval."""

    title: str
    rows: list[dict[str, Cell]] = field(default_factory=list)

    def markdown(self) -> str:
        heads = list(self.rows[0]) if self.rows else ["nothing"]
        cells = [[shown(row.get(head)) for head in heads] for row in self.rows]
        lines = [heads, ["---"] * len(heads), *cells]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])

    def as_dict(self) -> dict:
        rows = [{k: plain(v) for k, v in row.items()} for row in self.rows]
        return {"title": self.title, "rows": rows}


@dataclass
class Findings:
    tables: list[Table]
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)  # what pictures need besides the tables

    def write(self, out: Path, about: dict[str, Any], seconds: float) -> str:
        """summary.json and report.md in a folder -> the report."""
        about = about | where(about["device"]) | {"seconds": round(seconds)}
        tables = [table.as_dict() for table in self.tables]
        summary = about | {"notes": self.notes, "tables": tables, "data": self.data}
        text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
        (out / "summary.json").write_text(text, encoding="utf-8")
        kinds = {
            cell.interval
            for table in self.tables
            for row in table.rows
            for cell in row.values()
            if isinstance(cell, Estimate)
        }
        brackets = f"In brackets: 95 % intervals ({' and '.join(sorted(kinds))})." if kinds else ""
        head = [
            f"# {about['experiment']}: {about['model']}",
            f"{about['dtype']}, {about['device']}, torch {about['torch']}, {about['date']}, "
            f"{about['seconds']} s since it was last begun; `{about['command']}`",
            *self.notes,
            brackets,
        ]
        parts = [part for part in head if part] + [table.markdown() for table in self.tables]
        text = "\n\n".join(parts) + "\n"
        (out / "report.md").write_text(text, encoding="utf-8")
        return text


GROUPS = ("kind", "of", "relation", "setting", "arm", "weight")  # labels that part the answers


def quality(study: Study, judges: Mapping[str, Judge]) -> list[Table]:
    """What judges say of the test answers, by what they are answers of."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for labels, prompt, text in study.said:
        if "arm" in labels:
            values = (labels[name] for name in GROUPS if name in labels)
            name = ", ".join(shown(value) for value in values)
            groups.setdefault(name, []).append((prompt, text))
    table = Table("Quality, whether or not an answer follows")
    for name, pairs in groups.items():
        values = judged(*zip(*pairs, strict=True), judges)
        if study.reader:
            responses = [text for _, text in pairs]
            values[f"perplexity to {study.reader.name}"] = perplexity(study.reader, responses)
        table.rows.append({"": name} | {judge: mean(found) for judge, found in values.items()})
    return [table] if table.rows else []


def shown(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, Estimate):
        if not cell.n:
            return "none"
        percent = cell.interval == "Wilson"
        value, low, high = (100 * x if percent else x for x in (cell.value, cell.low, cell.high))
        return "{:{f}} [{:{f}}, {:{f}}]".format(value, low, high, f=".1f" if percent else ".3g")
    return f"{cell:.3g}" if isinstance(cell, float) else f"{cell}".replace("|", "\\|")


def plain(cell: Cell) -> Any:
    if isinstance(cell, Estimate):
        return {k: v for k, v in asdict(cell).items() if v is not None and v == v}
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def where(device: str) -> dict[str, str]:
    """Machine, versions, date and command. device: the model's kind."""
    cuda = device == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{processor()}, {os.cpu_count()} cores"
    return {
        "device": name,
        "torch": torch.__version__,
        "date": str(datetime.date.today()),
        "command": shlex.join(["tinysteer", *sys.argv[1:]]),
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
