"""What models are asked: requests and wordings of our own, and rows of a user's file.

assets/requests.json is for any model. The embedded models know 300 topics and ten kinds of
instruction, and so are asked about those: assets/tasks.json. A file's rows have the fields of the
paper's data: `prompt`, `prompt_without_instruction`, `instruction_id_list` (or
`single_instruction_id`) and `kwargs`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tinysteer.evaluation import ifeval
from tinysteer.language_model import LanguageModel
from tinysteer.loading.hub import ASSETS, is_embedded
from tinysteer.text.files import read_jsonl

LANGUAGE = "language:response_language"
PARTS = {"pairs": (0, 50), "validation": (50, 70), "test": (70, 120)}  # of requests.json
SETTINGS = {"w/o": "request", "w/": "prompt"}  # which text of an item is the prompt
KINDS = {  # of what is asked about a word: IFEval's id, its field, which words of a request
    "include": ("keywords:existence", "keywords", "unlikely"),  # would not come by itself
    "exclude": ("keywords:forbidden_words", "forbidden_words", "words"),  # might
}
PAPERS = {"where": "all", "step": 2, "validation_tokens": 256}
# Vectors are read at the last prompt token, and there these models keep what an answer is to be.
# All their answers are shorter than 112 tokens.
OURS = {"where": (0, 1), "step": 1, "validation_tokens": 112, "max_new_tokens": 112}
NOTE = (
    "Where no file is given, requests and wordings are those that the embedded models know: they "
    "have no languages and no numbers of sentences, and bullets have no check that fits."
)
# Which check fits. Bullets have none: IFEval's counts them, these wordings name no number.
CHECKED = {
    "capitals": "change_case:english_capital",
    "lowercase": "change_case:english_lowercase",
    "json": "detectable_format:json_format",
    "quotes": "startend:quotation",
    "no commas": "punctuation:no_comma",
}


@dataclass(frozen=True)
class Item:
    """A request, and the same with an instruction, which `ifeval` can check unless `check` does."""

    request: str
    prompt: str
    instruction: str  # an id of IFEval; languages have one each, id_iso
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[str], Any] | None = None

    @property
    def id(self) -> str:
        return LANGUAGE if self.instruction.startswith(LANGUAGE) else self.instruction

    def followed(self, text: str) -> Any:
        """Loosely, as the paper counts; a word strictly, which a first line may hold."""
        if self.check:
            return self.check(text)
        mode = "strict" if self.id.startswith("keywords:") else "loose"
        return ifeval.follow([self.id], [self.kwargs], text, mode)

    @property
    def word(self) -> str:
        """The one that is to be put in or kept out."""
        words = [word for words in self.kwargs.values() for word in words]
        if len(words) != 1:
            raise ValueError(f"{self.prompt:.60}: give one word a prompt, not {words}")
        return words[0]


def checkable(items: Sequence[Item]) -> list[Item]:
    """Those whose instruction says all that its check needs."""
    whole = []
    for item in items:
        with suppress(ValueError):
            ifeval.prepare(item.id, item.kwargs)
            whole.append(item)
    return whole


def read_items(path: str | Path) -> list[Item]:
    """A JSONL file's rows of one instruction. ValueError, with the line, for what is not one."""
    items = []
    for line, row in read_jsonl(path):
        try:
            ids = row.get("instruction_id_list") or [row["single_instruction_id"]]
            kwargs = {k: v for k, v in (row.get("kwargs") or [{}])[0].items() if v is not None}
            name = f"{LANGUAGE}_{kwargs['language']}" if ids[0] == LANGUAGE else ids[0]
            item = Item(row["prompt_without_instruction"], row["prompt"], name, kwargs)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            needs = "prompt, prompt_without_instruction, instruction_id_list and kwargs"
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"{line}: needs {needs} ({why})") from None
        items += [item] if len(ids) == 1 else []  # more at once are no pair for one vector
    if not items:
        raise ValueError(f"{path} has no row of one instruction")
    return items


def read_requests(path: str | Path) -> list[str]:
    """Plain requests of a JSONL file: its `base`, or `prompt_without_instruction`."""
    texts = {}
    for line, row in read_jsonl(path):
        text = row.get("base") or row.get("prompt_without_instruction")
        if not text:
            raise ValueError(f"{line}: no base, no prompt_without_instruction")
        texts[text] = True
    return list(texts)


def by_instruction(items: Sequence[Item]) -> dict[str, list[Item]]:
    """In the order of each instruction's first item."""
    names = dict.fromkeys(item.instruction for item in items)
    return {name: [item for item in items if item.instruction == name] for name in names}


def asked(request: str, wordings: Sequence[str], turn: int, **values) -> str:
    """A request with a wording behind it, wordings in turn."""
    return f"{request} {wordings[turn % len(wordings)].format(**values)}"


def in_turn(requests: Sequence[str], wordings: Sequence[str], **values) -> list[str]:
    return [asked(request, wordings, i, **values) for i, request in enumerate(requests)]


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
                items.append(
                    Item(request, asked(request, wordings, turn, **numbers), name, numbers)
                )
        return items

    def word_items(self, kind: str, part: str) -> list[Item]:
        """Requests with a word to "include" or "exclude"."""
        id, name, column = KINDS[kind]
        rows = [(row["text"], word) for row in self.requests[part] for word in row[column]]
        return [
            Item(request, asked(request, self.words[kind], i, word=word), id, {name: [word]})
            for i, (request, word) in enumerate(rows)
        ]

    def sentences_wordings(self, relation: str, n: int) -> list[str]:
        """How to ask for "at most", "exactly" or "at least" n sentences."""
        if n == 1:
            return self.sentences["one"][relation]
        return [wording.format(n=n) for wording in self.sentences[relation]]


def asset(name: str) -> dict[str, Any]:
    return json.loads((ASSETS / name).read_text(encoding="utf-8"))


@cache
def general() -> Corpus:
    texts = asset("requests.json")
    languages = {
        f"{LANGUAGE}_{iso}": language | {"kwargs": [{"language": iso}]}
        for iso, language in texts["languages"].items()
    }
    return Corpus(
        {part: texts["requests"][slice(*ends)] for part, ends in PARTS.items()},
        texts["formats"] | languages,
        {"concise": texts["length"]["extra short"], "verbose": texts["length"]["extra verbose"]},
        texts["words"],
        texts["sentences"],
        PAPERS,
    )


@cache
def embedded() -> Corpus:
    texts = asset("tasks.json")
    wordings = texts["instructions"]

    def row(task: Mapping[str, Any], turn: int) -> dict[str, Any]:
        foreign = [word for word in texts["words"] if word not in task["likely"]]
        unlikely = foreign[turn % len(foreign)]
        return {"text": task["question"], "words": task["likely"][:1], "unlikely": [unlikely]}

    return Corpus(
        {part: [row(task, i) for i, task in enumerate(texts[part])] for part in PARTS},
        {id: {"wordings": wordings[name], "kwargs": [{}]} for name, id in CHECKED.items()},
        {"concise": wordings["brief"], "verbose": wordings["detailed"]},
        {"include": wordings["include"], "exclude": wordings["avoid"]},
        defaults=OURS,
        thorough=True,
        notes=[NOTE],
    )


def corpus_for(*models: LanguageModel) -> Corpus:
    """What to ask of models that work together."""
    # A folder may bear an embedded model's name, but has no revision.
    ours = all(is_embedded(model.name) and model.revision for model in models)
    return embedded() if ours else general()
