"""Words: an answer that holds a word, or keeps clear of it (paper, section 5).

Each word has a vector of its own, that of requests to include it. Its opposite keeps the word out;
the vector of requests to avoid it is tried beside it.
"""

from collections.abc import Sequence
from functools import partial

from tinysteer.evaluation.selection import sweep_layers
from tinysteer.experiments.presets import preset
from tinysteer.experiments.report import Findings, share, table_of
from tinysteer.experiments.study import RandomEdits, Study, arms_of, crossed
from tinysteer.experiments.texts import KINDS, Item, in_turn, read_items
from tinysteer.steering.edits import Edit
from tinysteer.steering.vectors import SteeringVector

N_PAIRS = 20  # requests that a word's vector is made of
TOKENS = 1024
DEPTHS = (0.55, 0.7, 0.85)  # of the model, where the paper has no layer for it
SHARES = (0.5, 1.0, 1.5)  # of the vector's norm, likewise
Choice = tuple[int, float] | None  # a layer and a weight; None: unsteered


def vector_of(study: Study, by: str, word: str) -> SteeringVector:
    """by: "include" or "exclude", what the word's vector is made of requests to do."""
    requests = study.corpus.texts("pairs")[:N_PAIRS]
    asked = in_turn(requests, study.corpus.words[by], word=word)
    return study.extract(study.source or study.model, f"{by} {word}", asked, requests)


def edits_of(
    study: Study, items: Sequence[Item], choice: Choice, by: str = "include"
) -> RandomEdits:
    def edits(at_random: bool, setting: str, row: int) -> list[Edit]:
        if choice is None:
            return []
        vector = vector_of(study, by, items[row].word)
        return study.added(vector.random_like(row) if at_random else vector, *choice)

    return edits


def grid(study: Study, kind: str, by: str) -> list[Choice]:
    """Layers and weights to try: those given, or some later layers (or all), shares of a norm."""
    depth, layers = study.model.config.n_layers, [study.settings.layer]
    if layers == [None]:
        every, some = sweep_layers(depth, study.settings.step)[1:], [int(d * depth) for d in DEPTHS]
        layers = every if study.corpus.thorough else some
    first = vector_of(study, by, study.corpus.word_items("exclude", "validation")[0].word)
    return [None] + [
        (layer, abs(weight) if kind == by else -abs(weight))
        for layer in layers
        for weight in study.settings.weights or (part * first.at(layer).norm for part in SHARES)
    ]


def choose_weight(study: Study, kind: str, by: str = "include") -> tuple[Choice, list[dict]]:
    """The paper's, or the best of the grid without the instruction in the prompt; and that grid."""
    told = getattr(preset(study.model.name), kind)
    if told and study.settings.layer is None and study.settings.weights is None:
        return told, []
    items = study.corpus.word_items(kind, "validation")[: study.settings.validation]
    group = kind if by == "include" else f"{kind} by its own vector"
    tried = {choice: edits_of(study, items, choice, by) for choice in grid(study, kind, by)}
    arms = {choice: partial(edits, False) for choice, edits in tried.items()}
    chosen, rows = study.choose(crossed(items, arms, ["w/o"], kind=group), "kind")
    return chosen[(group,)], rows


def sentence(choice: Choice, by: str = "include") -> str:
    if choice is None:
        return "no weight beat no steering in validation, so all is unsteered."
    name = by.replace("de", "sion")
    return f"the word's {name} vector with weight {choice[1]:.3g} at layer {choice[0]}."


def run(study: Study) -> Findings:
    file, items, cells, notes, grids = study.settings.prompts, {}, {}, [], []
    for kind, (instruction, *_) in KINDS.items():
        rows = read_items(file) if file else study.corpus.word_items(kind, "test")
        rows = [item for item in rows if item.instruction == instruction][: study.settings.limit]
        items |= {kind: rows} if all(item.word for item in rows) and rows else {}
    if not items:
        ids = " or ".join(instruction for instruction, *_ in KINDS.values())
        raise ValueError(f"{file} has no rows of {ids}")
    for kind, rows in items.items():
        choice, validated = choose_weight(study, kind)
        own = choice and (choice[0], -choice[1])
        notes.append(f"{kind}: {sentence(choice)}")
        grids += validated
        if study.corpus.thorough and kind == "exclude":
            own, validated = choose_weight(study, kind, kind)
            notes.append(f"{kind}: {sentence(own, kind)}")
            grids += validated
        arms = arms_of(edits_of(study, rows, choice))
        if kind == "exclude":
            arms["own"] = partial(edits_of(study, rows, own, kind), False)
        hits = study.tally(crossed(rows, arms, kind=kind), TOKENS, "setting", "arm")
        for (setting, arm), some in hits.items():
            column = arm.replace("own", "by its own vector")
            cells[f"{kind}, {setting} the instruction", column] = share(some)
    tables = [table_of("Accuracy in percent, strict", cells)]
    if grids:
        title = "Validation, without the instruction: shares that follow, and that are spoilt"
        tables.append({"title": title, "rows": [grid_row(**row) for row in grids]})
    return Findings(tables, notes, {"validation": grids})


def grid_row(kind: str, arm: Choice, **shares: float) -> dict:
    layer, weight = arm or (None, 0.0)
    return {"": kind, "layer": layer, "weight": weight} | shares
