"""Formats and languages: is an answer in the form that was asked for (paper, figure 3)?

The prompt states the instruction or not; its vector sets the projection, or a random one does, or
nothing. Transfer (section 7): vectors of an instruction-tuned sibling, beside the model's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from tinysteer.evaluation.selection import sweep_layers
from tinysteer.experiments.presets import preset
from tinysteer.experiments.report import Findings, Table, share, table_of
from tinysteer.experiments.study import RandomEdits, Study, always, crossed
from tinysteer.experiments.texts import (
    LANGUAGE,
    SETTINGS,
    Item,
    by_instruction,
    checkable,
    read_items,
)
from tinysteer.language_model import LanguageModel
from tinysteer.steering.edits import Edit
from tinysteer.steering.vectors import SteeringVector

FAMILIES = ("change_case:", "detectable_format:", "language:", "punctuation:", "startend:")
TOKENS = 2048
NOTE = (
    "w/o, w/: the prompt is without or with the instruction. Where there is no layer, a row is "
    "unsteered in all columns."
)
Vectors = Mapping[str, tuple[SteeringVector, SteeringVector]]  # instruction -> own, random


@dataclass(frozen=True)
class Way:
    """Vectors of a model, and the layer that each acts at."""

    study: Study
    vectors: Vectors
    layers: Mapping[str, Mapping[str, int | None]]  # by setting and instruction
    validation: Sequence[dict] = ()  # what was seen of the layers that were tried

    def edits(self, setting: str, instruction: str, random: bool = False) -> list[Edit]:
        """The projection set to the mean of those with the instruction; nothing without a layer."""
        layer = self.layers[setting].get(instruction)
        if layer is None or instruction not in self.vectors:
            return []
        vector = self.vectors[instruction][random]
        return [vector.at(layer).to_target(where=self.study.settings.where)]

    def of(self, items: Sequence[Item]) -> RandomEdits:
        return lambda random, setting, i: self.edits(setting, items[i].instruction, random)

    def data(self) -> dict[str, Any]:
        return {"layers": self.layers, "validation": self.validation}


def test_items(study: Study) -> list[Item]:
    file = study.settings.prompts
    items = read_items(file) if file else study.corpus.format_items("test")
    items = [item for item in items if item.instruction.startswith(FAMILIES)]
    if not items:
        raise ValueError(f"{file} has no row of one instruction about {', '.join(FAMILIES)}")
    whole = checkable(items)
    if len(whole) < len(items):
        study.notes.append(f"{len(items) - len(whole)} rows do not say what their check needs.")
    return whole[: study.settings.limit]


def read_pairs(study: Study) -> dict[str, list[Item]]:
    """All there are, a user's or our own, by instruction."""
    file = study.settings.pairs
    return by_instruction(read_items(file) if file else study.corpus.format_items("pairs"))


def pairs_of(study: Study) -> tuple[dict[str, list[Item]], dict[str, list[Item]]]:
    """What vectors are made of, and what layers are validated on, by instruction.

    Of a user's pairs the last `validation` are held out where at least as many remain.
    """
    pairs, held = read_pairs(study), by_instruction(study.corpus.format_items("validation"))
    n = study.settings.validation
    if study.settings.pairs:
        held = {
            name: checkable(items[-n:] if len(items) >= 2 * n else items)
            for name, items in pairs.items()
        }
        pairs = {
            name: items[:-n] if len(items) >= 2 * n else items for name, items in pairs.items()
        }
    # Of a language one, as in the paper.
    return pairs, {k: rows[: 1 if k.startswith(LANGUAGE) else n] for k, rows in held.items()}


def vectors_of(study: Study, model: LanguageModel) -> Vectors:
    """Of every instruction that there are pairs of; random ones have the same baselines."""
    vectors = {}
    for name, items in pairs_of(study)[0].items():
        requests = [item.request for item in items]
        own = study.extract(model, name, [item.prompt for item in items], requests)
        like = partial(own.random_like, name, study.plain(model, requests).mean)
        vectors[name] = own, study.vector(f"{name} of {model.name}, random", like)
    return vectors


def way_of(study: Study, model: LanguageModel, wanted: Sequence[str]) -> Way:
    """A model's vectors, and for each instruction a layer as told, the paper's, or validated."""
    vectors = vectors_of(study, model)
    source = model.name if model is study.source else None
    told = study.settings.layers or preset(study.model.name, source).layers
    if told:
        return Way(study, vectors, {s: {n: told[s].get(n) for n in wanted} for s in SETTINGS})
    asks, tried = [], sweep_layers(study.model.config.n_layers, study.settings.step)
    for setting, (name, items) in product(SETTINGS, pairs_of(study)[1].items()):
        if name in wanted and name in vectors:
            ways = {layer: Way(study, vectors, {setting: {name: layer}}) for layer in tried}
            arms = {layer: always(way.edits(setting, name)) for layer, way in ways.items()}
            asks += crossed(items, arms, [setting])
    chosen, rows = study.choose(asks, "setting", "instruction")
    rows = [{"layer": row.pop("arm")} | row for row in rows]
    layers = {s: {name: chosen.get((s, name)) for name in wanted} for s in SETTINGS}
    return Way(study, vectors, layers, rows)


def accuracies(study: Study, items: Sequence[Item], ways: Mapping[str, Way]) -> list[Table]:
    """Of unsteered answers, of each way's vectors at its layers, of the first way's controls."""
    arms = {name: partial(way.of(items), False) for name, way in ways.items()}
    arms = {"unsteered": always([])} | arms
    arms["random"] = partial(next(iter(ways.values())).of(items), True)
    hits = study.tally(crossed(items, arms), TOKENS, "setting", "arm", "instruction")
    names, whole, each = list(by_instruction(items)), {}, {}
    for setting in SETTINGS:
        for arm in arms:
            column = f"{setting} {arm}"
            whole["all", column] = share(hit for name in names for hit in hits[setting, arm, name])
            each |= {(name, column): share(hits[setting, arm, name]) for name in names}
        for kind, way in ways.items():
            column = f"{setting} layer, {kind}"
            each |= {(name, column): way.layers[setting].get(name) for name in names}
    return [table_of("Accuracy in percent, loose", whole), table_of("By instruction", each)]


def remarks(study: Study, items: Sequence[Item], way: Way) -> list[str]:
    """What a reader of the numbers should know of the texts."""
    notes, missing = [], sorted({item.instruction for item in items} - set(way.vectors))
    if missing:
        notes.append(f"Without pairs, and so unsteered: {', '.join(missing)}.")
    used = {i.request for part in pairs_of(study) for rows in part.values() for i in rows}
    shared = sum(item.request in used for item in items)
    if shared:
        notes.append(f"{shared} of the {len(items)} requests are also among the pairs' requests.")
    return notes


def run(study: Study) -> Findings:
    """By the model's own vectors; in transfer by those of a source, and beside them its own."""
    models = {"steered": study.model}
    items, notes = test_items(study), [NOTE]
    if study.source:
        models = {"cross": study.source, "own": study.model}
        notes += [f"cross: vectors and targets of {study.source.name}; own: of the model itself."]
    wanted = list(by_instruction(items))
    ways = {name: way_of(study, model, wanted) for name, model in models.items()}
    tables = accuracies(study, items, ways)
    if not study.source:
        way = ways["steered"]
        return Findings(tables, notes + remarks(study, items, way), way.data())
    layers = {name: way.layers for name, way in ways.items()}
    rows = [{"vectors": name} | row for name, way in ways.items() for row in way.validation]
    return Findings(tables, notes, {"layers": layers, "validation": rows})
