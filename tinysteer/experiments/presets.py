"""What the paper used for the models that it steered: presets.json, facts of its section 2.

"w/o": the prompt does not state the instruction; "w/": it does. What is not named there was left
unsteered. Layers and weights of what is added stand beside the layers of formats and languages.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Preset:
    """What the paper used for one model; empty or None where it says nothing of it."""

    model: str = ""
    source: str = ""  # whose vectors it is steered by, where not by its own
    layers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # setting, instruction
    length_layer: int | None = None
    length_weight: float | None = None  # for a number of sentences, whatever the number
    length_sweep: Sequence[float] | None = None  # the last of Phi-3's breaks the text
    include: tuple[int, float] | None = None  # a word: layer, weight
    exclude: tuple[int, float] | None = None


ADDED = ("length_layer", "length_weight", "length_sweep", "include", "exclude")
PRESETS = [
    Preset(**{name: tuple(v) if isinstance(v, list) else v for name, v in row.items()})
    for row in json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
]


def short(name: str | None) -> str:
    """The last part of a model's name: a Hub id and a folder of it are the same model."""
    return (name or "").rstrip("/").split("/")[-1].lower()


def preset(model: str, source: str | None = None) -> Preset:
    """An empty one for a model that the paper has not."""
    names = short(model), short(source)
    return next((p for p in PRESETS if (short(p.model), short(p.source)) == names), Preset())


def table(presets: Sequence[Preset]) -> Iterator[list[str]]:
    """A row for each instruction, a column for each model: its layers without / with, weights."""
    by = (f" by {short(p.source)}" if p.source else "" for p in presets)
    yield ["", *(short(p.model) + source for p, source in zip(presets, by, strict=True))]
    for name in sorted({name for p in presets for layers in p.layers.values() for name in layers}):
        settings = ([str(layers.get(name, "-")) for layers in p.layers.values()] for p in presets)
        yield [name, *map(" / ".join, settings)]
    for name in ADDED:
        values = [getattr(p, name) for p in presets]
        if any(values):
            yield [name, *("-" if value is None else str(value).strip("()") for value in values)]


def described(model: str) -> list[str]:
    """Lines for `tinysteer inspect`; none for a model that the paper has not."""
    rows = list(table([p for p in PRESETS if short(p.model) == short(model)]))
    if len(rows) == 1:
        return []
    head = (
        "  layers of the paper, the prompt without / with the instruction; (layer, weight) of words"
    )
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    lines = ("".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return ["", head, *(f"  {line}" for line in lines)]
