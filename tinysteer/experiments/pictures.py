"""Pictures of what an experiment found. Needs matplotlib: the extra `tinysteer[plot]`."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinysteer.experiments.intervals import Estimate
from tinysteer.experiments.report import Findings

NOTHING = Estimate(0.0, 0.0, 0.0, 0, "Wilson")  # where a row has no such bar


def draw(findings: Findings, out: Path) -> None:
    """Accuracy bars, length histograms, curves of similarity, a map of the layers tried."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError('pictures need matplotlib: pip install "tinysteer[plot]"') from None
    matplotlib.use("Agg")
    for table in findings.tables:
        bars(table.title, table.rows, out)
    for name, picture in {"words": histograms, "curves": lines}.items():
        if name in findings.data:
            picture(findings.data[name], out)
    rows = [row for row in findings.data.get("validation", []) if row.get("instruction")]
    for vectors in dict.fromkeys(row.get("vectors", "") for row in rows):
        some = [row for row in rows if row.get("vectors", "") == vectors]
        heat_map(some, out, f"layers {vectors}".strip())


@contextmanager
def panels(out: Path, name: str, width: float, height: float, n: int = 1) -> Iterator[list]:
    """n axes side by side; they are a picture in the folder `out` when the block is left."""
    import matplotlib.pyplot as plt

    size = {"figsize": (width, height), "layout": "constrained"}
    chart, axes = plt.subplots(1, n, squeeze=False, sharey=True, **size)
    yield list(axes[0])
    if axes[0][-1].get_legend_handles_labels()[0]:  # beside the axes, where it hides nothing
        axes[0][-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    chart.savefig(out / f"{name}.png", dpi=120)
    plt.close(chart)


def bars(title: str, rows: Sequence[dict], out: Path) -> None:
    """Shares with their intervals: a group of bars a row. Nothing for a table without shares."""
    estimates = [k for row in rows for k, v in row.items() if isinstance(v, Estimate)]
    names = [
        name
        for name in dict.fromkeys(estimates)
        if all(row[name] is None or row[name].interval == "Wilson" for row in rows)
    ]
    if not names:
        return
    file = re.sub(r"\W+", "-", title.split(" in percent")[0].lower())
    width = 0.8 / len(names)
    with panels(out, file, min(2 + 0.25 * len(rows) * len(names), 18), 4) as (axes,):
        for j, name in enumerate(names):
            cells = [row[name] or NOTHING for row in rows]
            values = [100 * c.value for c in cells]
            ends = zip(*((c.value - c.low, c.high - c.value) for c in cells), strict=True)
            error = [[max(100 * length, 0) for length in lengths] for lengths in ends]
            places = [i + (j - (len(names) - 1) / 2) * width for i in range(len(rows))]
            axes.bar(places, values, width, yerr=error, label=name, error_kw={"linewidth": 0.7})
        axes.set_xticks(range(len(rows)), [str(row[""]).split(":")[-1] for row in rows])
        axes.tick_params(axis="x", rotation=30 if len(rows) > 3 else 0)
        axes.set(ylabel="percent", ylim=(0, 105), title=title)


def histograms(words: dict[str, list[int]], out: Path) -> None:
    """Words of answers, one histogram a weight."""
    top = max(max(numbers) for numbers in words.values()) + 1
    bins = [top * i / 24 for i in range(25)]
    with panels(out, "lengths", 8, 4) as (axes,):
        for name, numbers in words.items():
            if "random" not in name:
                style = "--" if name.startswith("verbose") else "-"  # ten colours are too few
                axes.hist(numbers, bins, histtype="step", label=name, linestyle=style)
        axes.set(xlabel="words of an answer", ylabel="answers")


def lines(curves: dict[str, dict[str, list[float]]], out: Path) -> None:
    """Similarity by layer, a panel an instruction."""
    with panels(out, "similarity", 4 * len(curves), 3.2, len(curves)) as row:
        for axes, (name, values_of) in zip(row, curves.items(), strict=True):
            for label, values in values_of.items():
                axes.plot(values, label=label)
            axes.set(xlabel="layer", title=name.split(":")[-1])
        row[0].set_ylabel("mean cosine")


def heat_map(validation: Sequence[dict[str, Any]], out: Path, name: str) -> None:
    """Validation accuracy by instruction and layer, the prompts without the instruction."""
    rows = [row for row in validation if row["setting"] == "w/o"]
    accuracy = {(r["instruction"], r["layer"]): r["accuracy"] for r in rows}
    names, layers = dict.fromkeys(n for n, _ in accuracy), {layer for _, layer in accuracy}
    layers = sorted(layers, key=lambda layer: -1 if layer is None else layer)
    table = [[accuracy.get((n, layer), float("nan")) for layer in layers] for n in names]
    with panels(out, name, 3 + 0.3 * len(layers), 1 + 0.3 * len(names)) as (axes,):
        image = axes.imshow(table, vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(layers)), ["none" if n is None else n for n in layers])
        axes.set_yticks(range(len(names)), [name.split(":")[-1] for name in names])
        axes.set(xlabel="layer", title="validation accuracy, without the instruction")
        axes.figure.colorbar(image)
