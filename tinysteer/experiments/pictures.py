"""Pictures of what an experiment found. Needs matplotlib: the extra `tinysteer[plot]`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinysteer.experiments.intervals import Estimate
from tinysteer.experiments.report import Findings

NOTHING = Estimate(0.0, 0.0, 0.0, 0, "Wilson")  # where a row has no such bar


def draw(findings: Findings, out: Path) -> list[Path]:
    """Accuracy bars, length histograms, curves of similarity, a map of the layers tried."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError('pictures need matplotlib: pip install "tinysteer[plot]"') from None
    matplotlib.use("Agg")
    paths = [bars(table.title, table.rows, out) for table in findings.tables if table.rows]
    data = findings.data
    paths.append(histograms(data["words"], out) if "words" in data else None)
    paths.append(lines(data["curves"], out) if "curves" in data else None)
    validation = data.get("validation", [])
    for vectors in dict.fromkeys(row.get("vectors", "") for row in validation):
        rows = [row for row in validation if row.get("vectors", "") == vectors]
        if rows[0].get("instruction"):
            paths.append(heat_map(rows, out, f"layers {vectors}".strip()))
    return [path for path in paths if path]


def figure(width: float, height: float):
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")


def save(chart, out: Path, name: str) -> Path:
    import matplotlib.pyplot as plt

    path = out / f"{name}.png"
    chart.savefig(path, dpi=120)
    plt.close(chart)
    return path


def bars(title: str, rows: Sequence[dict], out: Path) -> Path | None:
    """Shares with their intervals: a group of bars a row."""
    shares = [k for row in rows for k, v in row.items() if isinstance(v, Estimate)]
    names = [k for k in dict.fromkeys(shares) if is_share(rows, k)]
    if not names:
        return None
    chart, axes = figure(min(2 + 0.25 * len(rows) * len(names), 18), 4)
    width = 0.8 / len(names)
    for j, name in enumerate(names):
        cells = [row[name] or NOTHING for row in rows]
        values = [100 * c.value for c in cells]
        low = [max(100 * (c.value - c.low), 0) for c in cells]
        high = [max(100 * (c.high - c.value), 0) for c in cells]
        places = [i + (j - (len(names) - 1) / 2) * width for i in range(len(rows))]
        axes.bar(places, values, width, yerr=[low, high], label=name, error_kw={"linewidth": 0.7})
    axes.set_xticks(range(len(rows)), [str(row[""]).split(":")[-1] for row in rows])
    axes.tick_params(axis="x", rotation=30 if len(rows) > 3 else 0)
    axes.set(ylabel="percent", ylim=(0, 105), title=title)
    axes.legend(fontsize="small")
    return save(chart, out, re.sub(r"\W+", "-", title.split(" in percent")[0].lower()))


def is_share(rows: Sequence[dict], name: str) -> bool:
    return all(row[name] is None or row[name].interval == "Wilson" for row in rows)


def histograms(words: dict[str, list[int]], out: Path) -> Path:
    """Words of answers, one histogram a weight."""
    chart, axes = figure(7, 4)
    top = max(max(found) for found in words.values()) + 1
    bins = [top * i / 24 for i in range(25)]
    for name, found in words.items():
        if "random" not in name:
            axes.hist(found, bins, histtype="step", label=name)
    axes.set(xlabel="words of an answer", ylabel="answers")
    axes.legend(fontsize="small")
    return save(chart, out, "lengths")


def lines(curves: dict[str, dict[str, list[float]]], out: Path) -> Path:
    """Similarity by layer, a panel an instruction."""
    import matplotlib.pyplot as plt

    size = {"figsize": (4 * len(curves), 3.2), "layout": "constrained"}
    chart, panels = plt.subplots(1, len(curves), squeeze=False, sharey=True, **size)
    for axes, (name, found) in zip(panels[0], curves.items(), strict=True):
        for label, values in found.items():
            axes.plot(values, label=label)
        axes.set(xlabel="layer", title=name.split(":")[-1])
    panels[0][0].set_ylabel("mean cosine")
    panels[0][0].legend(fontsize="small")
    return save(chart, out, "similarity")


def heat_map(validation: Sequence[dict[str, Any]], out: Path, name: str) -> Path:
    """Validation accuracy by instruction and layer, the prompts without the instruction."""
    rows = [row for row in validation if row["setting"] == "w/o"]
    names = list(dict.fromkeys(row["instruction"] for row in rows))
    layers = sorted({-1 if row["layer"] is None else row["layer"] for row in rows})
    table = [[float("nan")] * len(layers) for _ in names]
    for row in rows:
        place = -1 if row["layer"] is None else row["layer"]
        table[names.index(row["instruction"])][layers.index(place)] = row["accuracy"]
    chart, axes = figure(3 + 0.3 * len(layers), 1 + 0.3 * len(names))
    image = axes.imshow(table, vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(layers)), ["none" if n < 0 else n for n in layers])
    axes.set_yticks(range(len(names)), [name.split(":")[-1] for name in names])
    axes.set(xlabel="layer", title="validation accuracy, without the instruction")
    chart.colorbar(image)
    return save(chart, out, name)
