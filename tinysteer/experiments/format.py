"""Formats and languages: is an answer in the form that was asked for (paper, figure 3)?

Four ways: the prompt states the instruction or not, its vector sets the projection or not; and the
same with random directions.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from tinysteer import ifeval
from tinysteer.edits import Edit, Where
from tinysteer.experiments.choosing import Trial, choose
from tinysteer.experiments.presets import preset
from tinysteer.experiments.report import Findings, Table
from tinysteer.experiments.statistics import share
from tinysteer.experiments.study import Ask, Study
from tinysteer.experiments.texts import (
    Item,
    checkable,
    format_items,
    of_instruction,
    read_items,
)
from tinysteer.extraction import MeanResiduals, extract, mean_residuals
from tinysteer.language_model import LanguageModel
from tinysteer.selection import sweep_layers
from tinysteer.vectors import SteeringVector

SETTINGS = {"w/o": "request", "w/": "prompt"}  # which text of an item is the prompt
TOKENS = 2048
NOTE = (
    "w/o, w/: the prompt is without or with the instruction. Where there is no layer, a row is "
    "unsteered in all columns."
)


@dataclass(frozen=True)
class Instructed:
    """An instruction's vector, and a random one of the same norms and baselines."""

    vector: SteeringVector
    control: SteeringVector

    def edits(self, layer: int | None, where: Where, control: bool = False) -> list[Edit]:
        if layer is None:
            return []
        return [(self.control if control else self.vector).at(layer).to_target(where=where)]


def all_instructed(study: Study, model: LanguageModel) -> dict[str, Instructed]:
    """The vector of every instruction that there are pairs of."""
    file, size = study.settings.pairs, study.settings.batch_size
    pairs = of_instruction(read_items(file) if file else format_items("pairs"))
    plain: dict[tuple[str, ...], MeanResiduals] = {}  # instructions may share their requests
    found = {}
    for name, items in tqdm(pairs.items(), "vectors", leave=False, disable=None):
        requests = tuple(item.request for item in items)
        if requests not in plain:
            plain[requests] = mean_residuals(model, requests, batch_size=size)
        without, asked = plain[requests], [item.prompt for item in items]
        vector = extract(model, asked, without, name=name, batch_size=size)
        control = vector.random_like(zlib.crc32(name.encode()), without.mean)
        found[name] = Instructed(vector, control)
    return found


def test_items(study: Study) -> list[Item]:
    file = study.settings.prompts
    items = checkable(read_items(file) if file else format_items("test"))
    return items[: study.settings.limit]


def follows(item: Item, text: str) -> bool:
    """Loosely, as the paper counts."""
    return ifeval.follow([item.instruction_id], [item.kwargs], text, mode="loose")


def choose_layers(
    study: Study,
    vectors: Mapping[str, Instructed],
    wanted: Sequence[str],
    source: str | None = None,
) -> tuple[dict[str, dict[str, int | None]], list[dict]]:
    """setting -> instruction -> layer: as told, as in the paper, or by validation.

    source: the name of the model that the vectors come from, where it is another one.
    """
    known = study.settings.layers or preset(study.model.name, source).layers
    if known:
        return {s: {name: known[s].get(name) for name in wanted} for s in SETTINGS}, []
    file = study.settings.pairs
    rows = checkable(read_items(file) if file else format_items("validation"))
    trials = [
        Trial(
            (setting, name),
            layer,
            Ask(
                getattr(item, text),
                vectors[name].edits(layer, study.settings.where),
                {"validation": setting, "vectors": source, "instruction": name, "layer": layer},
            ),
            partial(follows, item),
        )
        for setting, text in SETTINGS.items()
        for name, items in of_instruction(rows).items()
        if name in wanted and name in vectors
        for layer in sweep_layers(study.model.config.n_layers, study.settings.step)
        for item in items[: study.settings.validation]
    ]
    chosen, rows = choose(study, trials)
    layers = {
        setting: {name: chosen.get((setting, name)) for name in wanted} for setting in SETTINGS
    }
    return layers, rows


def run(study: Study) -> Findings:
    items = test_items(study)
    vectors = all_instructed(study, study.model)
    layers, validated = choose_layers(study, vectors, list(of_instruction(items)))
    tables = accuracies(study, items, {"steered": (vectors, layers)})
    data = {"layers": layers, "validation": [flat(row) for row in validated]}
    return Findings(tables, [NOTE], data)


Way = tuple[Mapping[str, Instructed], Mapping[str, Mapping[str, int | None]]]  # and layers


def accuracies(study: Study, items: Sequence[Item], ways: Mapping[str, Way]) -> list[Table]:
    """Of unsteered answers, of each way's vectors at its layers, of the first way's controls."""
    where, first = study.settings.where, next(iter(ways))
    arms = {"unsteered": None, **{name: (*way, False) for name, way in ways.items()}}
    arms["random"] = (*ways[first], True)
    asks, places = [], []
    for setting, text in SETTINGS.items():
        for arm, way in arms.items():
            for i, item in enumerate(items):
                edits = []
                if way and item.instruction in way[0]:
                    layer = way[1][setting].get(item.instruction)
                    edits = way[0][item.instruction].edits(layer, where, control=way[2])
                labels = {"setting": setting, "arm": arm, "instruction": item.instruction, "row": i}
                asks.append(Ask(getattr(item, text), edits, labels))
                places.append((setting, arm, i))
    texts = study.answer(asks, study.settings.max_new_tokens or TOKENS)
    hits = {place: follows(items[place[2]], t) for place, t in zip(places, texts, strict=True)}

    def row(name: str, rows: Sequence[int]) -> dict:
        cells: dict = {"": name}
        for setting in SETTINGS:
            for arm in arms:
                cells[f"{setting} {arm}"] = share(hits[setting, arm, i] for i in rows)
            for way, (_, layers) in ways.items():
                if name != "all":
                    cells[f"{setting} layer, {way}"] = layers[setting].get(name)
        return cells

    by_name = {
        name: [i for i, it in enumerate(items) if it.instruction == name]
        for name in of_instruction(items)
    }
    return [
        Table("Accuracy in percent, loose", [row("all", range(len(items)))]),
        Table("By instruction", [row(name, rows) for name, rows in by_name.items()]),
    ]


def flat(row: dict) -> dict:
    """A validation's row for JSON."""
    setting, name = row["group"]
    rest = {k: v for k, v in row.items() if k not in ("group", "choice")}
    return {"setting": setting, "instruction": name, "layer": row["choice"]} | rest
