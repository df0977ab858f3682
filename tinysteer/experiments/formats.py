"""Formats and languages: is an answer in the form that was asked for (paper, figure 3)?

Four ways: the prompt states the instruction or not, its vector sets the projection or not; and the
same with random directions.
"""

from collections.abc import Mapping, Sequence
from functools import partial

from tinysteer.experiments.instructions import (
    SETTINGS,
    Layers,
    Vectors,
    all_instructed,
    choose_layers,
    follows,
    pairs_of,
)
from tinysteer.experiments.intervals import share
from tinysteer.experiments.report import Findings, Table
from tinysteer.experiments.study import Ask, Study, Trial
from tinysteer.experiments.texts import (
    Item,
    checkable,
    of_instruction,
    read_items,
)

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
    vectors = all_instructed(study, study.model)
    wanted = list(of_instruction(items))
    layers, validated = choose_layers(study, vectors, wanted)
    tables = accuracies(study, items, {"steered": (vectors, layers)})
    data = {"layers": layers, "validation": [flat(row) for row in validated]}
    return Findings(tables, [NOTE, *remarks(study, items, vectors)], data)


def remarks(study: Study, items: Sequence[Item], vectors: Vectors) -> list[str]:
    """What a reader of the numbers should know of the texts."""
    notes, missing = [], sorted({item.instruction for item in items} - set(vectors))
    if missing:
        notes.append(f"Without pairs, and so unsteered: {', '.join(missing)}.")
    used = {item.request for part in pairs_of(study) for rows in part.values() for item in rows}
    shared = sum(item.request in used for item in items)
    if shared:
        notes.append(f"{shared} of the {len(items)} requests are also among the pairs' requests.")
    return notes


Way = tuple[Vectors, Layers]


def accuracies(study: Study, items: Sequence[Item], ways: Mapping[str, Way]) -> list[Table]:
    """Of unsteered answers, of each way's vectors at its layers, of the first way's controls."""
    where, first = study.settings.where, next(iter(ways))
    arms = {"unsteered": None, **{name: (*way, False) for name, way in ways.items()}}
    arms["random"] = (*ways[first], True)
    trials = []
    for setting, text in SETTINGS.items():
        for arm, way in arms.items():
            for i, item in enumerate(items):
                edits = []
                if way and item.instruction in way[0]:
                    layer = way[1][setting].get(item.instruction)
                    edits = way[0][item.instruction].edits(layer, where, control=way[2])
                labels = {"setting": setting, "arm": arm, "instruction": item.instruction, "row": i}
                ask = Ask(getattr(item, text), edits, labels)
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
