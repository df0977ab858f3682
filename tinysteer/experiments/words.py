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


def word_of(item: Item) -> str:
    found = item.kwargs.get(FIELDS[item.instruction]) or []
    if len(found) != 1:
        raise ValueError(f"{item.prompt:.60}...: words come one a prompt, not {found}")
    return found[0]


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


def edits(study: Study, vector: SteeringVector, choice: tuple[int, float] | None) -> list[Edit]:
    """choice: a layer and a weight, or nothing."""
    if choice is None or not choice[1]:
        return []
    return [vector.at(choice[0]).add(weight=choice[1], where=study.settings.where)]


def grid(study: Study, kind: str, by: str) -> list[tuple[int, float] | None]:
    """Layers and weights to try: those given, or some of the later layers and shares of a norm.

    Where all is tried, every layer.
    """
    depth, layer = study.model.config.n_layers, study.settings.layer
    layers = [int(part * depth) for part in DEPTHS] if layer is None else [layer]
    if study.corpus.thorough and layer is None:
        layers = sweep_layers(depth, study.settings.step)[1:]
    sign = 1.0 if kind == by else -1.0
    some = vector_of(study, by, study.corpus.with_words("validation")[0][1])
    return [None] + [
        (L, sign * abs(weight))
        for L in layers
        for weight in study.settings.weights or (part * some.at(L).norm for part in SHARES)
    ]


def choose_weight(
    study: Study, kind: str, by: str = "include"
) -> tuple[tuple[int, float] | None, list[dict]]:
    """The paper's, or the best of the grid without the instruction in the prompt; and that grid.

    by: whose vectors, "include" or "exclude".
    """
    known = getattr(preset(study.model.name), kind)
    if known and study.settings.layer is None and study.settings.weights is None:
        return known, []
    items = builtin_items(study.corpus, kind, "validation")[: study.settings.validation]
    group = kind if by == "include" else f"{kind} by its own vector"
    trials = [
        Trial(
            group,
            choice,
            Ask(
                item.request,
                edits(study, vector_of(study, by, word_of(item)), choice),
                {"for": "validation", "kind": group, "choice": choice, "row": i},
            ),
            partial(follows, item),
        )
        for choice in grid(study, kind, by)
        for i, item in enumerate(items)
    ]
    chosen, rows = choose(study, trials)
    return chosen[group], rows


def run(study: Study) -> Findings:
    items = {kind: test_items(study, kind) for kind in KINDS}
    if not any(items.values()):
        raise ValueError(f"{study.settings.prompts} has no rows of {' or '.join(KINDS.values())}")
    table, notes, grids = Table("Accuracy in percent, strict"), [], []
    for kind, rows in items.items():
        if rows:
            choice, grid = choose_weight(study, kind)
            own = choice and (choice[0], -choice[1])
            notes.append(f"{kind}: {told(choice)}")
            grids += grid
            if study.corpus.thorough and kind == "exclude":
                own, grid = choose_weight(study, kind, kind)
                notes.append(f"{kind}: {told(own, 'exclusion')}")
                grids += grid
            table.rows += rows_of(study, kind, rows, choice, own)
    return Findings([table, *grid_table(grids)], notes, {"validation": grids})


def told(choice: tuple[int, float] | None, by: str = "inclusion") -> str:
    if choice is None:
        return "no weight beat no steering in validation, so all is unsteered."
    return f"the word's {by} vector with weight {choice[1]:.3g} at layer {choice[0]}."


def grid_table(grid: Sequence[dict]) -> list[Table]:
    """What validation saw of each layer and weight."""
    table = Table("Validation, without the instruction: shares that follow, and that are spoilt")
    for row in grid:
        layer, weight = row["choice"] or (None, 0.0)
        shares = {"accuracy": row["accuracy"], "spoilt": row["spoilt"]}
        table.rows.append({"": row["group"], "layer": layer, "weight": weight} | shares)
    return [table] if grid else []


def rows_of(
    study: Study,
    kind: str,
    items: Sequence[Item],
    choice: tuple[int, float] | None,
    own: tuple[int, float] | None,
) -> list[dict]:
    """The arms of one kind; "own" is the vector of requests to avoid the word."""
    arms = ("unsteered", "steered", "random", *(["own"] if kind == "exclude" else []))
    trials = []
    for setting, text in (("w/o", "request"), ("w/", "prompt")):
        for arm in arms:
            for i, item in enumerate(items):
                word = word_of(item)
                vector = vector_of(study, "include", word)
                steer = {
                    "unsteered": lambda: [],
                    "steered": lambda v=vector: edits(study, v, choice),
                    "random": lambda v=vector, i=i: edits(study, v.random_like(i), choice),
                    "own": lambda w=word: edits(study, vector_of(study, "exclude", w), own),
                }[arm]()
                labels = {"kind": kind, "setting": setting, "arm": arm, "row": i}
                ask = Ask(getattr(item, text), steer, labels)
                trials.append(Trial(setting, arm, ask, partial(follows, item)))
    hits = study.tally(trials, TOKENS)
    names = {"own": "by its own vector"}
    return [
        {"": f"{kind}, {setting} the instruction"}
        | {
            names.get(arm, arm): share(hits[setting][arm]) if arm in arms else None
            for arm in ("unsteered", "steered", "random", "own")
        }
        for setting in ("w/o", "w/")
    ]
