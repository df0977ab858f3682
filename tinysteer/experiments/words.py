"""Words: an answer that holds a word, or keeps clear of it (paper, section 5).

Each word has a vector of its own, that of requests to include it. Its opposite keeps the word out;
the vector of requests to avoid it is tried beside it.
"""

import functools
from collections.abc import Sequence
from functools import partial

from tinysteer.evaluation import ifeval
from tinysteer.experiments.choosing import Trial, choose
from tinysteer.experiments.intervals import share
from tinysteer.experiments.presets import preset
from tinysteer.experiments.report import Findings, Table
from tinysteer.experiments.study import Ask, Study
from tinysteer.experiments.texts import Item, built_in, in_turn, read_items, requests, with_words
from tinysteer.extraction import extract, mean_residuals
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


class Words:
    """Vectors of words, made when they are first asked for."""

    def __init__(self, study: Study):
        self.model, self.size = study.source or study.model, study.settings.batch_size
        self.base = requests("pairs")[:N_PAIRS]
        self.plain = functools.cache(
            lambda: mean_residuals(self.model, self.base, batch_size=self.size)
        )
        self.study = study
        self.made: dict[tuple[str, str], SteeringVector] = {}

    def vector(self, kind: str, word: str) -> SteeringVector:
        """kind: "include" or "exclude"."""
        if (kind, word) not in self.made:
            asked, name = in_turn(self.base, built_in()["words"][kind], word=word), f"{kind} {word}"
            self.made[kind, word] = self.study.vector(
                f"{name} of {self.model.name}",
                lambda: extract(self.model, asked, self.plain(), name=name, batch_size=self.size),
            )
        return self.made[kind, word]


def builtin_items(kind: str, part: str) -> list[Item]:
    """Requests with a word to hold that would not come by itself, or to avoid that might."""
    wordings, items = built_in()["words"][kind], []
    for i, (request, word) in enumerate(
        with_words(part, "unlikely" if kind == "include" else "words")
    ):
        prompt = f"{request} {wordings[i % len(wordings)].format(word=word)}"
        items.append(Item(request, prompt, KINDS[kind], {FIELDS[KINDS[kind]]: [word]}))
    return items


def test_items(study: Study, kind: str) -> list[Item]:
    file = study.settings.prompts
    items = read_items(file) if file else builtin_items(kind, "test")
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


def grid(study: Study, words: Words, kind: str) -> list[tuple[int, float] | None]:
    """Layers and weights to try: those given, or some of the later layers and shares of a norm."""
    depth, layer = study.model.config.n_layers, study.settings.layer
    layers = [int(part * depth) for part in DEPTHS] if layer is None else [layer]
    sign = 1.0 if kind == "include" else -1.0
    some = words.vector("include", with_words("validation")[0][1])
    return [None] + [
        (L, sign * abs(weight))
        for L in layers
        for weight in study.settings.weights or (part * some.at(L).norm for part in SHARES)
    ]


def choose_weight(
    study: Study, words: Words, kind: str
) -> tuple[tuple[int, float] | None, list[dict]]:
    """The paper's, or the best of the grid without the instruction in the prompt; and that grid."""
    known = getattr(preset(study.model.name), kind)
    if known and study.settings.layer is None and study.settings.weights is None:
        return known, []
    items = builtin_items(kind, "validation")[: study.settings.validation]
    trials = [
        Trial(
            kind,
            choice,
            Ask(
                item.request,
                edits(study, words.vector("include", word_of(item)), choice),
                {"for": "validation", "kind": kind, "choice": choice, "row": i},
            ),
            partial(follows, item),
        )
        for choice in grid(study, words, kind)
        for i, item in enumerate(items)
    ]
    chosen, rows = choose(study, trials)
    return chosen[kind], rows


def run(study: Study) -> Findings:
    items = {kind: test_items(study, kind) for kind in KINDS}
    if not any(items.values()):
        raise ValueError(f"{study.settings.prompts} has no rows of {' or '.join(KINDS.values())}")
    words, table, notes, grids = Words(study), Table("Accuracy in percent, strict"), [], []
    for kind, rows in items.items():
        if rows:
            choice, grid = choose_weight(study, words, kind)
            notes.append(f"{kind}: {told(choice)}")
            grids += grid
            table.rows += rows_of(study, words, kind, rows, choice)
    return Findings([table, *grid_table(grids)], notes, {"validation": grids})


def told(choice: tuple[int, float] | None) -> str:
    if choice is None:
        return "no weight beat no steering in validation, so all is unsteered."
    return f"the word's inclusion vector with weight {choice[1]:.3g} at layer {choice[0]}."


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
    words: Words,
    kind: str,
    items: Sequence[Item],
    choice: tuple[int, float] | None,
) -> list[dict]:
    """The arms of one kind; "own" is the vector of requests to avoid the word."""
    own = choice and (choice[0], -choice[1])
    arms = {"unsteered": None, "steered": None, "random": None}
    if kind == "exclude":
        arms["own"] = None
    asks, places = [], []
    for setting, text in (("w/o", "request"), ("w/", "prompt")):
        for arm in arms:
            for i, item in enumerate(items):
                word = word_of(item)
                vector = words.vector("include", word)
                steer = {
                    "unsteered": lambda: [],
                    "steered": lambda v=vector: edits(study, v, choice),
                    "random": lambda v=vector, i=i: edits(study, v.random_like(i), choice),
                    "own": lambda w=word: edits(study, words.vector("exclude", w), own),
                }[arm]()
                labels = {"kind": kind, "setting": setting, "arm": arm, "row": i}
                asks.append(Ask(getattr(item, text), steer, labels))
                places.append((setting, arm, item))
    texts = study.answer(asks, study.settings.max_new_tokens or TOKENS)
    hits: dict[tuple[str, str], list[bool]] = {}
    for (setting, arm, item), text in zip(places, texts, strict=True):
        hits.setdefault((setting, arm), []).append(follows(item, text))
    names = {"own": "by its own vector"}
    return [
        {"": f"{kind}, {setting} the instruction"}
        | {
            names.get(arm, arm): share(hits[setting, arm]) if arm in arms else None
            for arm in ("unsteered", "steered", "random", "own")
        }
        for setting in ("w/o", "w/")
    ]
