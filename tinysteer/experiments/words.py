"""Words: an answer that holds a word, or keeps clear of it (paper, section 5).

Each word has a vector of its own, that of requests to include it. Its opposite keeps the word out;
the vector of requests to avoid it is tried beside it.
"""

from collections.abc import Sequence
from functools import partial

from tinysteer.evaluation import ifeval
from tinysteer.evaluation.selection import sweep_layers
from tinysteer.experiments.choosing import choose
from tinysteer.experiments.corpus import Corpus
from tinysteer.experiments.instructions import SETTINGS
from tinysteer.experiments.intervals import share
from tinysteer.experiments.presets import preset
from tinysteer.experiments.report import Findings, Table
from tinysteer.experiments.study import Ask, Study, Trial
from tinysteer.experiments.texts import Item, in_turn, read_items
from tinysteer.steering.edits import Edit
from tinysteer.steering.vectors import SteeringVector

INCLUDE, EXCLUDE = "keywords:existence", "keywords:forbidden_words"
KINDS = {"include": INCLUDE, "exclude": EXCLUDE}
FIELDS = {INCLUDE: "keywords", EXCLUDE: "forbidden_words"}
N_PAIRS = 20  # requests that a word's vector is made of
TOKENS = 1024
DEPTHS = (0.55, 0.7, 0.85)  # of the model, where the paper has no layer for it
SHARES = (0.5, 1.0, 1.5)  # of the vector's norm, likewise
Choice = tuple[int, float] | None  # a layer and a weight; None: unsteered


def word_of(item: Item) -> str:
    words = item.kwargs.get(FIELDS[item.instruction]) or []
    if len(words) != 1:
        raise ValueError(f"{item.prompt:.60}...: words come one a prompt, not {words}")
    return words[0]


def vector_of(study: Study, kind: str, word: str) -> SteeringVector:
    """kind: "include" or "exclude"."""
    requests = study.corpus.texts("pairs")[:N_PAIRS]
    asked = in_turn(requests, study.corpus.words[kind], word=word)
    return study.extract(study.source or study.model, f"{kind} {word}", asked, requests)


def builtin_items(corpus: Corpus, kind: str, part: str) -> list[Item]:
    """Requests with a word to hold that would not come by itself, or to avoid that might."""
    rows = corpus.with_words(part, "unlikely" if kind == "include" else "words")
    wordings, items = corpus.words[kind], []
    for i, (request, word) in enumerate(rows):
        prompt = f"{request} {wordings[i % len(wordings)].format(word=word)}"
        items.append(Item(request, prompt, KINDS[kind], {FIELDS[KINDS[kind]]: [word]}))
    return items


def test_items(study: Study, kind: str) -> list[Item]:
    file = study.settings.prompts
    items = read_items(file) if file else builtin_items(study.corpus, kind, "test")
    items = [item for item in items if item.instruction == KINDS[kind]][: study.settings.limit]
    for item in items:
        word_of(item)  # or its error, before anything is run
    return items


def follows(item: Item, text: str) -> bool:
    """Strictly: without its first or last line an answer may have lost the word."""
    return ifeval.check(item.instruction_id, text, **item.kwargs)


def edits(study: Study, vector: SteeringVector, choice: Choice) -> list[Edit]:
    if choice is None or not choice[1]:
        return []
    return [vector.at(choice[0]).add(weight=choice[1], where=study.settings.where)]


def grid(study: Study, kind: str, by: str) -> list[tuple[int, float] | None]:
    """Layers and weights to try: those given, or some later layers (or all), shares of a norm."""
    depth, layers = study.model.config.n_layers, [study.settings.layer]
    if layers == [None]:
        every, some = sweep_layers(depth, study.settings.step)[1:], [int(d * depth) for d in DEPTHS]
        layers = every if study.corpus.thorough else some
    first = vector_of(study, by, study.corpus.with_words("validation")[0][1])
    return [None] + [
        (layer, abs(weight) if kind == by else -abs(weight))
        for layer in layers
        for weight in study.settings.weights or (part * first.at(layer).norm for part in SHARES)
    ]


def choose_weight(study: Study, kind: str, by: str = "include") -> tuple[Choice, list[dict]]:
    """The paper's, or the best of the grid without the instruction in the prompt; and that grid.

    by: whose vectors, "include" or "exclude".
    """
    told = getattr(preset(study.model.name), kind)
    if told and study.settings.layer is None and study.settings.weights is None:
        return told, []
    items = builtin_items(study.corpus, kind, "validation")[: study.settings.validation]
    group, trials = kind if by == "include" else f"{kind} by its own vector", []
    for choice in grid(study, kind, by):
        for i, item in enumerate(items):
            steer = edits(study, vector_of(study, by, word_of(item)), choice)
            labels = {"for": "validation", "kind": group, "choice": choice, "row": i}
            trials.append(
                Trial(group, choice, Ask(item.request, steer, labels), partial(follows, item))
            )
    chosen, rows = choose(study, trials)
    return chosen[group], rows


def run(study: Study) -> Findings:
    items = {kind: rows for kind in KINDS if (rows := test_items(study, kind))}
    if not items:
        raise ValueError(f"{study.settings.prompts} has no rows of {' or '.join(KINDS.values())}")
    table, notes, grids = Table("Accuracy in percent, strict"), [], []
    for kind, rows in items.items():
        choice, validated = choose_weight(study, kind)
        own = choice and (choice[0], -choice[1])
        notes.append(f"{kind}: {sentence(choice)}")
        grids += validated
        if study.corpus.thorough and kind == "exclude":
            own, validated = choose_weight(study, kind, kind)
            notes.append(f"{kind}: {sentence(own, kind)}")
            grids += validated
        table.rows += rows_of(study, kind, rows, choice, own)
    return Findings([table, *grid_table(grids)], notes, {"validation": grids})


def sentence(choice: Choice, by: str = "include") -> str:
    if choice is None:
        return "no weight beat no steering in validation, so all is unsteered."
    name = by.replace("de", "sion")
    return f"the word's {name} vector with weight {choice[1]:.3g} at layer {choice[0]}."


def grid_table(grid: Sequence[dict]) -> list[Table]:
    """What validation saw of each layer and weight."""
    table = Table("Validation, without the instruction: shares that follow, and that are spoilt")
    for row in grid:
        layer, weight = row["choice"] or (None, 0.0)
        shares = {"accuracy": row["accuracy"], "spoilt": row["spoilt"]}
        table.rows.append({"": row["group"], "layer": layer, "weight": weight} | shares)
    return [table] if grid else []


def rows_of(
    study: Study, kind: str, items: Sequence[Item], choice: Choice, own: Choice
) -> list[dict]:
    """The arms of one kind; "own" is the vector of requests to avoid the word."""
    arms = {"unsteered": None, "steered": choice, "random": choice}
    arms |= {"own": own} if kind == "exclude" else {}
    trials = []
    for setting, text in SETTINGS.items():
        for arm in arms:
            for i, item in enumerate(items):
                vector = vector_of(study, "exclude" if arm == "own" else "include", word_of(item))
                vector = vector.random_like(i) if arm == "random" else vector
                labels = {"kind": kind, "setting": setting, "arm": arm, "row": i}
                ask = Ask(getattr(item, text), edits(study, vector, arms[arm]), labels)
                trials.append(Trial(setting, arm, ask, partial(follows, item)))
    columns = {arm: arm for arm in ("unsteered", "steered", "random")}
    columns["own"] = "by its own vector"
    return [
        {"": f"{kind}, {setting} the instruction"}
        | {title: share(hits[arm]) if arm in arms else None for arm, title in columns.items()}
        for setting, hits in study.tally(trials, TOKENS).items()
    ]
