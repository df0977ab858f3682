"""Two instructions at once: a format and a length, lowercase and a word to avoid (paper, 6).

The embedded models know no numbers of sentences: there two formats take the first's place.
Each vector acts at its own layer. The authors' script reads the length vector at the format's
layer; here it is read where it is added, as the paper says.
"""

import random
from collections.abc import Sequence
from functools import partial

from tinysteer.evaluation import ifeval
from tinysteer.experiments import words
from tinysteer.experiments.formats import Way, read_pairs, remarks, test_items, way_of
from tinysteer.experiments.length import Lengths, has_sentences
from tinysteer.experiments.report import Findings, Table, share, table_of
from tinysteer.experiments.study import RandomEdits, Study, arms_of, crossed
from tinysteer.experiments.texts import Item, asked, by_instruction
from tinysteer.steering.edits import Edit

LOWERCASE = "change_case:english_lowercase"
CAPITALS, NO_COMMA = "change_case:english_capital", "punctuation:no_comma"
TWO = ((LOWERCASE, NO_COMMA), (LOWERCASE, "startend:quotation"), (CAPITALS, NO_COMMA))
TOKENS = 2048
Prompts = Sequence[tuple[str, str]]  # requests, and the same with both instructions


Part = tuple[Sequence[Item], RandomEdits]  # what a row's text is held to, what steers it there


def both(study: Study, title: str, prompts: Prompts, **parts: Part) -> Table:
    """Each part and all at once, unsteered, steered, and with random directions."""

    def held(row: int, text: str) -> list[bool]:
        return [bool(text.strip()) and items[row].followed(text) for items, _ in parts.values()]

    def edits(*row) -> list[Edit]:
        return [edit for _, steer in parts.values() for edit in steer(*row)]

    items = [Item(*pair, title, check=partial(held, i)) for i, pair in enumerate(prompts)]
    cells, asks = {}, crossed(items, arms_of(edits), kind=title)
    for (setting, arm), answers in study.tally(asks, TOKENS, "setting", "arm").items():
        hits = [*zip(*answers, strict=True), [all(answer) for answer in answers]]
        shares = zip((*parts, "both"), map(share, hits), strict=True)
        cells |= {(f"{setting}, {arm}", name): cell for name, cell in shares}
    return table_of(f"{title}: accuracy in percent", cells)


def strictly(way: Way, instruction: str, n: int) -> Part:
    items = [Item("", "", instruction, check=partial(ifeval.check, instruction))] * n
    return items, way.of(items)


def format_and_length(study: Study, items: Sequence[Item], way: Way, lengths: Lengths) -> Table:
    draw, concise = random.Random(42), lengths.vectors["concise"]
    limits, prompts, short = [draw.randint(1, 5) for _ in items], [], []
    for i, (item, n) in enumerate(zip(items, limits, strict=True)):
        wordings = study.corpus.sentences_wordings("at most", n)
        prompts.append((item.request, asked(item.prompt, wordings, i)))
        short.append(Item("", "", "at most", check=partial(has_sentences, "at most", n)))

    def shorter(at_random: bool, setting: str, i: int) -> list[Edit]:
        vector = concise.random_like(i) if at_random else concise
        return lengths.edits(vector, lengths.weight(concise))

    parts = {"format": (items, way.of(items)), "length": (short, shorter)}
    return both(study, "A format, and at most n sentences", prompts, **parts)


def lowercase_and_word(study: Study, way: Way, choice: words.Choice, by: str) -> Table:
    items = study.corpus.word_items("exclude", "test")[: study.settings.limit]
    wordings = study.corpus.formats[LOWERCASE]["wordings"]
    prompts = [(item.request, asked(item.prompt, wordings, i)) for i, item in enumerate(items)]
    parts = {"word": (items, words.edits_of(study, items, choice, by))}
    parts["lowercase"] = strictly(way, LOWERCASE, len(items))
    return both(study, "Lowercase, and no such word", prompts, **parts)


def two_formats(study: Study, items: Sequence[Item], way: Way) -> list[Table]:
    """A table for each two that some request is asked for, each by an edit at its own layer."""
    tables = []
    for names in TWO:
        first, second = ({i.request: i.prompt for i in items if i.instruction == n} for n in names)
        prompts = [(r, first[r] + second[r].removeprefix(r)) for r in first if r in second]
        parts = {name.split(":")[1]: strictly(way, name, len(prompts)) for name in names}
        if prompts:
            tables.append(both(study, " and ".join(parts), prompts, **parts))
    return tables


def run(study: Study) -> Findings:
    """`prompts` are those of the formats; words to avoid are the built-in ones."""
    items = test_items(study)
    if LOWERCASE not in read_pairs(study):
        raise ValueError(f"{study.settings.pairs} has no pairs of {LOWERCASE}")
    way = way_of(study, study.model, [*by_instruction(items), LOWERCASE])
    by = "exclude" if study.corpus.thorough else "include"  # `words` says what each is good for
    choice, grid = words.choose_weight(study, "exclude", by)
    note = f"Words: {words.sentence(choice, by)}"
    if study.corpus.sentences:
        lengths = Lengths(study)
        concise = lengths.weight(lengths.vectors["concise"])
        note = f"Conciseness: weight {concise:.3g} at layer {lengths.layer}. {note}"
        tables = [format_and_length(study, items, way, lengths)]
    else:
        tables = two_formats(study, items, way)
    tables.append(lowercase_and_word(study, way, choice, by))
    notes = ["w/o, w/: the prompt is without or with both instructions.", note]
    return Findings(tables, notes + remarks(study, items, way), way.data() | {"weights": grid})
