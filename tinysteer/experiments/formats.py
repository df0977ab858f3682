"""Formats and languages: is an answer in the form that was asked for (paper, figure 3)?

Four ways: the prompt states the instruction or not, its vector sets the projection or not; and the
same with random directions.
"""

from collections.abc import Mapping, Sequence
from functools import partial

from tinysteer.experiments import instructions
from tinysteer.experiments.instructions import SETTINGS, Layers, Vectors, follows
from tinysteer.experiments.intervals import share
from tinysteer.experiments.report import Findings, Table
from tinysteer.experiments.study import Ask, Study, Trial
from tinysteer.experiments.texts import Item, checkable, of_instruction, read_items
from tinysteer.steering.edits import Edit

FAMILIES = ("change_case", "detectable_format", "language", "punctuation", "startend")
TOKENS = 2048
NOTE = (
    "w/o, w/: the prompt is without or with the instruction. Where there is no layer, a row is "
    "unsteered in all columns."
)


def test_items(study: Study) -> list[Item]:
    file = study.settings.prompts
    items = read_items(file) if file else study.corpus.format_items("test")
    items = [item for item in items if item.family in FAMILIES]
    if not items:
        raise ValueError(f"{file} has no row of one instruction about {', '.join(FAMILIES)}")
    whole = checkable(items)
    if len(whole) < len(items):
        study.notes.append(f"{len(items) - len(whole)} rows do not say what their check needs.")
    return whole[: study.settings.limit]


def run(study: Study) -> Findings:
    items = test_items(study)
    vectors = instructions.all_instructed(study, study.model)
    layers, validated = instructions.choose_layers(study, vectors, list(of_instruction(items)))
    tables = accuracies(study, items, {"steered": (vectors, layers)})
    data = {"layers": layers, "validation": validated}
    return Findings(tables, [NOTE, *remarks(study, items, vectors)], data)


def remarks(study: Study, items: Sequence[Item], vectors: Vectors) -> list[str]:
    """What a reader of the numbers should know of the texts."""
    notes, missing = [], sorted({item.instruction for item in items} - set(vectors))
    if missing:
        notes.append(f"Without pairs, and so unsteered: {', '.join(missing)}.")
    parts = instructions.pairs_of(study)
    used = {item.request for part in parts for rows in part.values() for item in rows}
    shared = sum(item.request in used for item in items)
    if shared:
        notes.append(f"{shared} of the {len(items)} requests are also among the pairs' requests.")
    return notes


Way = tuple[Vectors, Layers]


def edits(study: Study, way: Way, name: str, setting: str, control: bool = False) -> list[Edit]:
    """What a way does for an instruction: nothing where it has no vector or no layer."""
    vectors, layers = way
    if name not in vectors:
        return []
    return vectors[name].edits(layers[setting].get(name), study.settings.where, control)


def accuracies(study: Study, items: Sequence[Item], ways: Mapping[str, Way]) -> list[Table]:
    """Of unsteered answers, of each way's vectors at its layers, of the first way's controls."""
    arms = {"unsteered": ({}, {})} | dict(ways) | {"random": next(iter(ways.values()))}
    trials = []
    for setting, text in SETTINGS.items():
        for arm, way in arms.items():
            for i, item in enumerate(items):
                steer = edits(study, way, item.instruction, setting, arm == "random")
                labels = {"setting": setting, "arm": arm, "instruction": item.instruction, "row": i}
                ask = Ask(getattr(item, text), steer, labels)
                trials.append(Trial(setting, arm, ask, partial(follows, item)))
    hits = study.tally(trials, TOKENS)

    def row(name: str, rows: Sequence[int]) -> dict:
        cells: dict = {"": name}
        for setting in SETTINGS:
            for arm in arms:
                cells[f"{setting} {arm}"] = share(hits[setting][arm][i] for i in rows)
            for way, (_, layers) in ways.items():
                if name != "all":
                    cells[f"{setting} layer, {way}"] = layers[setting].get(name)
        return cells

    by_name: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        by_name.setdefault(item.instruction, []).append(i)
    return [
        Table("Accuracy in percent, loose", [row("all", range(len(items)))]),
        Table("By instruction", [row(name, rows) for name, rows in by_name.items()]),
    ]
