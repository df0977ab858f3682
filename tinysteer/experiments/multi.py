"""Two instructions at once: a format and a length, lowercase and a word to avoid (paper, 6).

Each vector acts at its own layer. The authors' script reads the length vector at the format's
layer; here it is read where it is added, as the paper says.
"""

import random
from collections.abc import Callable, Sequence

from tinysteer.evaluation import ifeval
from tinysteer.evaluation.checks import sentences
from tinysteer.experiments import formats, instructions, length, words
from tinysteer.experiments.intervals import share
from tinysteer.experiments.report import Findings, Table
from tinysteer.experiments.study import Ask, Study
from tinysteer.experiments.texts import Item, built_in, of_instruction, sentences_wordings
from tinysteer.steering.edits import Edit

LOWERCASE = "change_case:english_lowercase"
TOKENS = 2048
Checks = dict[str, Callable[[int, str], bool]]  # name -> whether row i's answer holds to it


def run(study: Study) -> Findings:
    """`prompts` are those of the formats; words to avoid are the built-in ones."""
    items = formats.test_items(study)
    if LOWERCASE not in instructions.pairs_of(study)[0]:
        raise ValueError(f"{study.settings.pairs} has no pairs of {LOWERCASE}")
    vectors = instructions.all_instructed(study, study.model)
    wanted = [*dict.fromkeys([*of_instruction(items), LOWERCASE])]
    layers, validated = instructions.choose_layers(study, vectors, wanted)
    known = words.Words(study)
    choice, grid = words.choose_weight(study, known, "exclude")
    lengths = length.Lengths(study)
    tables = [
        format_and_length(study, items, vectors, layers, lengths),
        lowercase_and_word(study, vectors, layers, known, choice),
    ]
    concise = lengths.weight(lengths.vectors["concise"])
    notes = [
        "w/o, w/: the prompt is without or with both instructions.",
        f"Conciseness: weight {concise:.3g} at layer {lengths.layer}. Words: {words.told(choice)}",
        *formats.remarks(study, items, vectors),
    ]
    validation = [formats.flat(row) for row in validated]
    return Findings(tables, notes, {"layers": layers, "validation": validation, "weights": grid})


def format_and_length(
    study: Study,
    items: Sequence[Item],
    vectors: instructions.Vectors,
    layers: instructions.Layers,
    lengths: length.Lengths,
) -> Table:
    draw = random.Random(42)
    limits = [draw.randint(1, 5) for _ in items]
    concise = lengths.vectors["concise"]
    weight = lengths.weight(concise)

    def prompt(i: int) -> str:
        wordings = sentences_wordings("at most", limits[i])
        return f"{items[i].prompt} {wordings[i % len(wordings)]}"

    def edits(i: int, setting: str, at_random: bool) -> list[Edit]:
        name, made = items[i].instruction, []
        if name in vectors:
            made = vectors[name].edits(layers[setting][name], study.settings.where, at_random)
        return made + lengths.edits(concise.random_like(i) if at_random else concise, weight)

    return both(
        study,
        "A format, and at most n sentences",
        {"w/o": [item.request for item in items], "w/": [prompt(i) for i in range(len(items))]},
        edits,
        {
            "format": lambda i, text: instructions.follows(items[i], text),
            "length": lambda i, text: len(sentences(text)) <= limits[i],
        },
    )


def lowercase_and_word(
    study: Study,
    vectors: instructions.Vectors,
    layers: instructions.Layers,
    known: words.Words,
    choice: tuple[int, float] | None,
) -> Table:
    items = words.builtin_items("exclude", "test")[: study.settings.limit]
    wordings = built_in()["formats"][LOWERCASE]["wordings"]

    def edits(i: int, setting: str, at_random: bool) -> list[Edit]:
        word = known.vector("include", words.word_of(items[i]))
        layer, where = layers[setting][LOWERCASE], study.settings.where
        return [
            *words.edits(study, word.random_like(i) if at_random else word, choice),
            *vectors[LOWERCASE].edits(layer, where, at_random),
        ]

    asked = [f"{item.prompt} {wordings[i % len(wordings)]}" for i, item in enumerate(items)]
    return both(
        study,
        "Lowercase, and no such word",
        {"w/o": [item.request for item in items], "w/": asked},
        edits,
        {
            "lowercase": lambda i, text: ifeval.follow([LOWERCASE], [{}], text),
            "word": lambda i, text: words.follows(items[i], text),
        },
    )


def both(
    study: Study,
    title: str,
    prompts: dict[str, list[str]],
    edits: Callable[[int, str, bool], list[Edit]],
    checks: Checks,
) -> Table:
    """Each check and all at once, unsteered, steered, and with random directions."""
    asks, places = [], []
    for setting, texts in prompts.items():
        for arm in ("unsteered", "steered", "random"):
            for i, prompt in enumerate(texts):
                made = [] if arm == "unsteered" else edits(i, setting, arm == "random")
                labels = {"of": title, "setting": setting, "arm": arm, "row": i}
                asks.append(Ask(prompt, made, labels))
                places.append((setting, arm, i))
    answers = study.answer(asks, study.settings.max_new_tokens or TOKENS)
    hits: dict[tuple[str, str], list[list[bool]]] = {}
    for (setting, arm, i), text in zip(places, answers, strict=True):
        found = [bool(text.strip()) and check(i, text) for check in checks.values()]
        hits.setdefault((setting, arm), []).append(found)
    table = Table(f"{title}: accuracy in percent")
    for (setting, arm), rows in hits.items():
        columns = zip(checks, zip(*rows, strict=True), strict=True)
        shares = {name: share(column) for name, column in columns}
        table.rows.append({"": f"{setting}, {arm}"} | shares | {"both": share(map(all, rows))})
    return table
