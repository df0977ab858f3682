"""Pictures of a run's summary. Needs matplotlib: the extra `tinysteer[plot]`."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

PANELS = {"w/o": "the prompt does not state the instruction", "w/": "the prompt states it"}


def draw(summary: Mapping[str, Any], out: Path) -> list[str]:
    """Shares as bars, words by weight, curves of similarity, the layers tried -> their files."""
    data, files = summary["data"], []
    for table in summary["tables"]:
        rows = table["rows"]
        if "weight" in rows[0] and "mean" in rows[0]:
            files.append(lengths(table["title"], rows, out))
        elif columns := [name for name in rows[0] if any(is_share(row[name]) for row in rows)]:
            files.append(bars(table["title"], rows, columns, out))
    if "curves" in data:
        files.append(similarity(data["curves"], out))
    tried = [row for row in data.get("validation", []) if "layer" in row]
    for vectors in dict.fromkeys(row.get("vectors") for row in tried):
        layers = data["layers"].get(vectors, data["layers"])
        own = [row for row in tried if row.get("vectors") == vectors]
        files.append(heat_maps(own, layers, out, f"layers-{vectors}" if vectors else "layers"))
    return files


def panels(out: Path, name: str, title: str, size: tuple[float, float], fill: Mapping) -> str:
    """A picture of panels, four a row: by title what fills each; size in inches -> its file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns, lines = min(len(fill), 4), -(-len(fill) // 4)
    inches = size[0] * columns, size[1] * lines + 0.4
    chart, axes = plt.subplots(
        lines, columns, squeeze=False, sharey=True, figsize=inches, layout="constrained"
    )
    for panel, (heading, draw_in) in zip(axes.flat, fill.items(), strict=False):
        draw_in(panel)
        panel.set_title(heading, fontsize="medium")
    for panel in axes.flat[len(fill) :]:
        panel.set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:  # below the axes, where it hides nothing
        chart.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    chart.suptitle(title)
    chart.savefig(out / f"{name}.png", dpi=120)
    plt.close(chart)
    return f"{name}.png"


def is_share(cell: Any) -> bool:
    return isinstance(cell, dict) and cell["interval"] == "Wilson" and cell["n"] > 0


def bars(title: str, rows: Sequence[Mapping], columns: Sequence[str], out: Path) -> str:
    """Shares lying with their intervals, a group a row, a panel a setting."""
    split = columns[0].startswith("w/")
    parts = {f"{setting} ": said for setting, said in PANELS.items()} if split else {"": ""}
    n = len(columns) // len(parts)

    def fill(prefix: str, panel) -> None:
        for j, column in enumerate(name for name in columns if name.startswith(prefix)):
            cells = {i: row[column] for i, row in enumerate(rows) if is_share(row[column])}
            places = [i + 0.8 * ((j + 0.5) / n - 0.5) for i in cells]
            values = [100 * cell["value"] for cell in cells.values()]
            low = [max(100 * (c["value"] - c["low"]), 0) for c in cells.values()]
            high = [max(100 * (c["high"] - c["value"]), 0) for c in cells.values()]
            label = column.removeprefix(prefix)
            thin = {"linewidth": 0.7}
            panel.barh(places, values, 0.8 / n, xerr=[low, high], label=label, error_kw=thin)
        names = [row[""].split(":")[-1].removeprefix("response_") for row in rows]
        panel.set_yticks(range(len(rows)), names)
        panel.set(xlabel="percent", xlim=(0, 105), ylim=(len(rows) - 0.5, -0.5))

    filled = {said: partial(fill, prefix) for prefix, said in parts.items()}
    name = re.sub(r"\W+", "-", title.split(" in percent")[0].lower())
    size = 8 / len(parts) + 1, 1.1 + len(rows) * (0.13 * n + 0.1)
    return panels(out, name, title, size, filled)


def lengths(title: str, rows: Sequence[Mapping], out: Path) -> str:
    """Mean words by weight with their interval, and those of the random control."""

    def fill(panel) -> None:
        for i, name in enumerate(dict.fromkeys(row[""] for row in rows)):
            plain = name.removesuffix(", random")
            own = [
                row for row in rows if row[""] == name or (row[""] == plain and not row["weight"])
            ]
            weights, means = [row["weight"] for row in own], [row["mean"] for row in own]
            style = {"color": f"C{i // 2}", "linestyle": "-" if name == plain else "--"}
            values = [mean["value"] for mean in means]
            panel.plot(weights, values, marker="o", markersize=3, label=name, **style)
            ends = [mean["low"] for mean in means], [mean["high"] for mean in means]
            panel.fill_between(weights, *ends, color=style["color"], alpha=0.2, linewidth=0)
        panel.set(xlabel="weight", ylabel="words of an answer", ylim=(0, None))

    return panels(out, "lengths", title, (7, 4), {"": fill})


def similarity(curves: Mapping[str, Mapping[str, Sequence[float]]], out: Path) -> str:
    """Mean cosines by layer, a panel an instruction."""

    def fill(values_of: Mapping[str, Sequence[float]], panel) -> None:
        for label, values in values_of.items():
            panel.plot(values, label=label)
        panel.set_xlabel("layer")

    filled = {name.split(":")[-1]: partial(fill, values) for name, values in curves.items()}
    return panels(out, "similarity", "Mean cosine of the last token's states", (3.2, 3), filled)


def heat_maps(rows: Sequence[Mapping], layers: Mapping, out: Path, name: str) -> str:
    """Validation accuracy by instruction and layer, a panel a setting; the chosen are marked."""
    names = list(dict.fromkeys(row["instruction"] for row in rows))
    tried = list(dict.fromkeys(row["layer"] for row in rows))

    def fill(setting: str, panel) -> None:
        own = {
            (r["instruction"], r["layer"]): r["accuracy"] for r in rows if r["setting"] == setting
        }
        table = [[own.get((name, layer), float("nan")) for layer in tried] for name in names]
        image = panel.imshow(table, vmin=0, vmax=1, aspect="auto")
        chosen = [tried.index(layers[setting].get(name)) for name in names]
        panel.scatter(chosen, range(len(names)), s=60, facecolors="none", edgecolors="red")
        panel.set_xticks(range(len(tried)), ["none" if n is None else n for n in tried])
        panel.set_yticks(
            range(len(names)), [n.split(":")[-1].removeprefix("response_") for n in names]
        )
        panel.set_xlabel("layer")
        panel.figure.colorbar(image) if setting == "w/" else None

    size = max(1 + 0.35 * len(tried), 4.5), 1.2 + 0.28 * len(names)
    filled = {said: partial(fill, setting) for setting, said in PANELS.items()}
    return panels(out, name, "Validation accuracy by layer; rings: what was chosen", size, filled)
