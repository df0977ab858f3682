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
    LANGUAGE,
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
FAMILIES = ("change_case", "detectable_format", "language", "punctuation", "startend")
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
    size, found = study.settings.batch_size, {}
    plain: dict[tuple[str, ...], MeanResiduals] = {}  # instructions may share their requests

    def without(items: Sequence[Item]) -> MeanResiduals:
        requests = tuple(item.request for item in items)
        if requests not in plain:
            plain[requests] = mean_residuals(model, requests, batch_size=size)
        return plain[requests]

    def make(name: str, items: Sequence[Item]) -> SteeringVector:
        asked = [item.prompt for item in items]
        return extract(model, asked, without(items), name=name, batch_size=size)

    def control(name: str, items: Sequence[Item]) -> SteeringVector:
        seed = zlib.crc32(name.encode())
        return found_vector(name, items).random_like(seed, without(items).mean)

    def found_vector(name: str, items: Sequence[Item]) -> SteeringVector:
        return study.vector(f"{name} of {model.name}", lambda: make(name, items))

    for name, items in tqdm(pairs_of(study)[0].items(), "vectors", leave=False, disable=None):
        found[name] = Instructed(
            found_vector(name, items),
            study.vector(f"{name} of {model.name}, random", lambda n=name, i=items: control(n, i)),
        )
    return found


def pairs_of(study: Study) -> tuple[dict[str, list[Item]], dict[str, list[Item]]]:
    """What vectors are made of, and what layers are validated on, by instruction.

    Of a user's pairs the last `validation` are held out where at least as many remain.
    """
    file, n = study.settings.pairs, study.settings.validation
    if not file:
        validation = of_instruction(format_items("validation"))
        return of_instruction(format_items("pairs")), first(validation, n)
    pairs = of_instruction(read_items(file))
    held = {name: items[-n:] if len(items) >= 2 * n else items for name, items in pairs.items()}
    made = {name: items[:-n] if len(items) >= 2 * n else items for name, items in pairs.items()}
    return made, first({name: checkable(items) for name, items in held.items()}, n)


def first(items: Mapping[str, Sequence[Item]], n: int) -> dict[str, list[Item]]:
    """So many of each instruction; of a language one, as in the paper."""
    return {name: list(i[: 1 if name.startswith(LANGUAGE) else n]) for name, i in items.items()}


def test_items(study: Study) -> list[Item]:
    file = study.settings.prompts
    items = [i for i in read_items(file) if i.family in FAMILIES] if file else format_items("test")
    if not items:
        raise ValueError(f"{file} has no row of one instruction about {', '.join(FAMILIES)}")
    whole = checkable(items)
    if len(whole) < len(items):
        study.notes.append(f"{len(items) - len(whole)} rows do not say what their check needs.")
    return whole[: study.settings.limit]


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
    _, validation = pairs_of(study)
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
        for name, items in validation.items()
        if name in wanted and name in vectors
        for layer in sweep_layers(study.model.config.n_layers, study.settings.step)
        for item in items
    ]
    chosen, rows = choose(study, trials)
    layers = {
        setting: {name: chosen.get((setting, name)) for name in wanted} for setting in SETTINGS
    }
    return layers, rows


def run(study: Study) -> Findings:
    items = test_items(study)
    vectors = all_instructed(study, study.model)
    wanted = list(of_instruction(items))
    layers, validated = choose_layers(study, vectors, wanted)
    tables = accuracies(study, items, {"steered": (vectors, layers)})
    data = {"layers": layers, "validation": [flat(row) for row in validated]}
    return Findings(tables, [NOTE, *remarks(study, items, vectors)], data)


def remarks(study: Study, items: Sequence[Item], vectors: Mapping[str, Instructed]) -> list[str]:
    """What a reader of the numbers should know of the texts."""
    found, missing = [], sorted({item.instruction for item in items} - set(vectors))
    if missing:
        found.append(f"Without pairs, and so unsteered: {', '.join(missing)}.")
    used = {item.request for part in pairs_of(study) for rows in part.values() for item in rows}
    shared = sum(item.request in used for item in items)
    if shared:
        found.append(f"{shared} of the {len(items)} requests are also among the pairs' requests.")
    return found


Vectors = Mapping[str, Instructed]  # by instruction
Layers = Mapping[str, Mapping[str, int | None]]  # by setting and instruction
Way = tuple[Vectors, Layers]


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
