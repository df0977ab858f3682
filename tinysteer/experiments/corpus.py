"""What is asked where no file says it: requests and wordings of our own writing.

GENERAL, assets/requests.json, is for any model. The embedded models know 300 topics and ten kinds
of instruction, and so are asked about those, in their own wordings: assets/tasks.json.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tinysteer.experiments.texts import LANGUAGE, Item
from tinysteer.language_model import LanguageModel
from tinysteer.loading.hub import ASSETS, is_embedded

PARTS = {"pairs": (0, 50), "validation": (50, 70), "test": (70, 120)}  # of requests.json
LENGTHS = {"concise": "extra short", "verbose": "extra verbose"}
PAPERS = {"where": "all", "step": 2, "validation_tokens": 256}
# Vectors are read at the last prompt token, and there these models keep what an answer is to be.
# All their answers are shorter than 112 tokens.
OURS = {"where": (0, 1), "step": 1, "validation_tokens": 112, "max_new_tokens": 112}
# Which check fits. Bullets have none: IFEval's counts them, these wordings name no number.
CHECKED = {
    "capitals": "change_case:english_capital",
    "lowercase": "change_case:english_lowercase",
    "json": "detectable_format:json_format",
    "quotes": "startend:quotation",
    "no commas": "punctuation:no_comma",
}
NOTES = (
    "Where no file is given, requests and wordings are those that the embedded models know: they "
    "have no languages and no numbers of sentences, and bullets have no check that fits.",
)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Requests in three parts, and wordings of what is asked about them."""

    requests: Mapping[str, Sequence[Mapping[str, Any]]]  # part -> rows: text, words, unlikely
    formats: Mapping[str, Mapping[str, Any]]  # instruction -> its wordings and kwargs, in turn
    lengths: Mapping[str, Sequence[str]]  # "concise" and "verbose" -> wordings
    words: Mapping[str, Sequence[str]]  # "include" and "exclude" -> wordings with {word}
    sentences: Mapping[str, Any] = field(default_factory=dict)  # relation -> wordings with {n}
    defaults: Mapping[str, Any] = field(default_factory=dict)  # settings that nobody has chosen
    # Models so small that all is tried: each layer, each test request with each instruction.
    thorough: bool = False
    notes: Sequence[str] = ()

    def texts(self, part: str) -> list[str]:
        """The requests of "pairs", "validation" or "test"."""
        return [row["text"] for row in self.requests[part]]

    def with_words(self, part: str, kind: str = "words") -> list[tuple[str, str]]:
        """(request, a word that an answer may hold); kind: "words" likely, "unlikely" ones."""
        return [(row["text"], word) for row in self.requests[part] for word in row[kind]]

    def format_items(self, part: str) -> list[Item]:
        """Every request of a part with every instruction, wordings and numbers in turn.

        Of the test part each request has one instruction only, all of them as often, unless all
        are tried.
        """
        names, items = list(self.formats), []
        single = part == "test" and not self.thorough
        for r, request in enumerate(self.texts(part)):
            turn = r // len(names) if single else r
            for name in [names[r % len(names)]] if single else names:
                wordings, kwargs = self.formats[name]["wordings"], self.formats[name]["kwargs"]
                numbers = kwargs[turn % len(kwargs)]
                wording = wordings[turn % len(wordings)].format(**numbers)
                items.append(Item(request, f"{request} {wording}", name, numbers))
        return items

    def sentences_wordings(self, relation: str, n: int) -> list[str]:
        """How to ask for "at most", "exactly" or "at least" n sentences."""
        if n == 1:
            return self.sentences["one"][relation]
        return [wording.format(n=n) for wording in self.sentences[relation]]


@cache
def general() -> Corpus:
    asset = json.loads((ASSETS / "requests.json").read_text(encoding="utf-8"))
    languages = {
        f"{LANGUAGE}_{iso}": language | {"kwargs": [{"language": iso}]}
        for iso, language in asset["languages"].items()
    }
    return Corpus(
        {part: asset["requests"][slice(*ends)] for part, ends in PARTS.items()},
        asset["formats"] | languages,
        {name: asset["length"][wordings] for name, wordings in LENGTHS.items()},
        asset["words"],
        asset["sentences"],
        PAPERS,
    )


@cache
def embedded() -> Corpus:
    asset = json.loads((ASSETS / "tasks.json").read_text(encoding="utf-8"))
    instructions = asset["instructions"]

    def row(task: Mapping[str, Any], turn: int) -> dict[str, Any]:
        foreign = [word for word in asset["words"] if word not in task["likely"]]
        unlikely = foreign[turn % len(foreign)]
        return {"text": task["question"], "words": task["likely"][:1], "unlikely": [unlikely]}

    return Corpus(
        {part: [row(task, i) for i, task in enumerate(asset[part])] for part in PARTS},
        {id: {"wordings": instructions[n], "kwargs": [{}]} for n, id in CHECKED.items()},
        {"concise": instructions["brief"], "verbose": instructions["detailed"]},
        {"include": instructions["include"], "exclude": instructions["avoid"]},
        defaults=OURS,
        thorough=True,
        notes=NOTES,
    )


def corpus_for(*models: LanguageModel) -> Corpus:
    """What to ask of models that work together."""
    # A folder may bear an embedded model's name, but has no revision.
    ours = all(is_embedded(model.name) and model.revision for model in models)
    return embedded() if ours else general()
