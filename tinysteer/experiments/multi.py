"""Two instructions at once: a format and a length, lowercase and a word to avoid (paper, 6).

The embedded models know no numbers of sentences: there two formats take the first's place.
Each vector acts at its own layer. The authors' script reads the length vector at the format's
layer; here it is read where it is added, as the paper says.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial

from tinysteer.evaluation import ifeval
from tinysteer.evaluation.checks import sentences
from tinysteer.experiments import formats, instructions, length, words
from tinysteer.experiments.intervals import share
from tinysteer.experiments.report import Findings, Table
from tinysteer.experiments.study import Ask, Study, Trial
from tinysteer.experiments.texts import Item, of_instruction
from tinysteer.steering.edits import Edit

LOWERCASE = "change_case:english_lowercase"
CAPITALS, NO_COMMA = "change_case:english_capital", "punctuation:no_comma"
TWO = ((LOWERCASE, NO_COMMA), (LOWERCASE, "startend:quotation"), (CAPITALS, NO_COMMA))
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
    way = vectors, layers
    by = "exclude" if study.corpus.thorough else "include"  # `words` says what each is good for
    choice, grid = words.choose_weight(study, "exclude", by)
    note = f"Words: {words.sentence(choice, by)}"
    if study.corpus.sentences:
        lengths = length.Lengths(study)
        concise = lengths.weight(lengths.vectors["concise"])
        note = f"Conciseness: weight {concise:.3g} at layer {lengths.layer}. {note}"
        tables = [format_and_length(study, items, way, lengths)]
    else:
        tables = two_formats(study, items, way)
    tables.append(lowercase_and_word(study, way, choice, by))
    notes = ["w/o, w/: the prompt is without or with both instructions.", note]
    notes += formats.remarks(study, items, vectors)
    return Findings(tables, notes, {"layers": layers, "validation": validated, "weights": grid})


def format_and_length(
    study: Study, items: Sequence[Item], way: formats.Way, lengths: length.Lengths
) -> Table:
    draw = random.Random(42)
    limits = [draw.randint(1, 5) for _ in items]
    concise = lengths.vectors["concise"]
    weight = lengths.weight(concise)

    def prompt(i: int) -> str:
        wordings = study.corpus.sentences_wordings("at most", limits[i])
        return f"{items[i].prompt} {wordings[i % len(wordings)]}"

    def edits(i: int, setting: str, at_random: bool) -> list[Edit]:
        shorter = lengths.edits(concise.random_like(i) if at_random else concise, weight)
        return [*formats.edits(study, way, items[i].instruction, setting, at_random), *shorter]

    return both(
        study,
        "A format, and at most n sentences",
        {"w/o": [item.request for item in items], "w/": [*map(prompt, range(len(items)))]},
        edits,
        {
            "format": lambda i, text: instructions.follows(items[i], text),
            "length": lambda i, text: len(sentences(text)) <= limits[i],
        },
    )


def lowercase_and_word(study: Study, way: formats.Way, choice: words.Choice, by: str) -> Table:
    items = words.builtin_items(study.corpus, "exclude", "test")[: study.settings.limit]
    wordings = study.corpus.formats[LOWERCASE]["wordings"]

    def edits(i: int, setting: str, at_random: bool) -> list[Edit]:
        word = words.vector_of(study, by, words.word_of(items[i]))
        away = words.edits(study, word.random_like(i) if at_random else word, choice)
        return away + formats.edits(study, way, LOWERCASE, setting, at_random)

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


def two_formats(study: Study, items: Sequence[Item], way: formats.Way) -> list[Table]:
    """A table for each two that some request is asked for, each by an edit at its own layer."""
    by_name, tables = of_instruction(items), []
    for names in TWO:
        first, second = ({i.request: i for i in by_name.get(name, ())} for name in names)
        requests = [request for request in first if request in second]
        asked = [first[r].prompt + second[r].prompt.removeprefix(r) for r in requests]

        def edits(i: int, setting: str, at_random: bool, names=names) -> list[Edit]:
            first, second = (formats.edits(study, way, n, setting, at_random) for n in names)
            return first + second

        checks = {
            name.split(":")[1]: lambda i, text, name=name: ifeval.follow([name], [{}], text)
            for name in names
        }
        if requests:
            prompts = {"w/o": requests, "w/": asked}
            tables.append(both(study, " and ".join(checks), prompts, edits, checks))
    return tables


def both(
    study: Study,
    title: str,
    prompts: dict[str, list[str]],
    edits: Callable[[int, str, bool], list[Edit]],
    checks: Checks,
) -> Table:
    """Each check and all at once, unsteered, steered, and with random directions."""
    trials = []
    for setting, texts in prompts.items():
        for arm in ("unsteered", "steered", "random"):
            for i, prompt in enumerate(texts):
                made = [] if arm == "unsteered" else edits(i, setting, arm == "random")
                labels = {"of": title, "setting": setting, "arm": arm, "row": i}
                ask = Ask(prompt, made, labels)
                trials.append(Trial((setting, arm), "", ask, partial(held, checks, i)))
    table = Table(f"{title}: accuracy in percent")
    for (setting, arm), answers in study.tally(trials, TOKENS).items():
        columns = zip(checks, zip(*answers[""], strict=True), strict=True)
        shares = {name: share(column) for name, column in columns}
        shares["both"] = share(map(all, answers[""]))
        table.rows.append({"": f"{setting}, {arm}"} | shares)
    return table


def held(checks: Checks, i: int, text: str) -> list[bool]:
    return [bool(text.strip()) and check(i, text) for check in checks.values()]
