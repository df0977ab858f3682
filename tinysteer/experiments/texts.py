"""What the experiments ask: requests, instructions about form, length and words, and their pairs.

The built-in set is our own writing (assets/requests.json). Rows of the same fields as the paper's
data take its place: `prompt`, `prompt_without_instruction`, `instruction_id_list` (or
`single_instruction_id`) and `kwargs`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tinysteer.evaluation.ifeval import prepare
from tinysteer.loading.hub import ASSETS
from tinysteer.text.files import read_jsonl

LANGUAGE = "language:response_language"
PARTS = {"pairs": (0, 50), "validation": (50, 70), "test": (70, 120)}  # of the requests


@dataclass(frozen=True)
class Item:
    """A request, and the same with one instruction that `ifeval` can check."""

    request: str
    prompt: str
    instruction: str  # an id of IFEval; languages have one each, id_iso
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        return self.instruction.split(":")[0]

    @property
    def instruction_id(self) -> str:
        return LANGUAGE if self.instruction.startswith(LANGUAGE) else self.instruction


def name_of(instruction_id: str, kwargs: Mapping[str, Any]) -> str:
    """What shares a vector: an id whatever its numbers are, but each language by itself."""
    return (
        f"{instruction_id}_{kwargs['language']}" if instruction_id == LANGUAGE else instruction_id
    )


@cache
def built_in() -> dict[str, Any]:
    return json.loads((ASSETS / "requests.json").read_text(encoding="utf-8"))


def requests(part: str) -> list[str]:
    """Of "pairs", "validation" or "test"."""
    return [row["text"] for row in built_in()["requests"][slice(*PARTS[part])]]


def with_words(part: str, kind: str = "words") -> list[tuple[str, str]]:
    """(request, a word that an answer may hold); kind: "words" likely, "unlikely" ones."""
    rows = built_in()["requests"][slice(*PARTS[part])]
    return [(row["text"], word) for row in rows for word in row[kind]]


def format_items(part: str) -> list[Item]:
    """Every request of a part with every instruction, wordings and numbers in turn.

    Of the test part each request has one instruction only, all of them as often.
    """
    formats = dict(built_in()["formats"])
    for iso, language in built_in()["languages"].items():
        formats[f"{LANGUAGE}_{iso}"] = language | {"kwargs": [{"language": iso}]}
    names, items = list(formats), []
    for r, request in enumerate(requests(part)):
        turn, one = (r // len(names), names[r % len(names)]) if part == "test" else (r, None)
        for name in [one] if one else names:
            wordings, kwargs = formats[name]["wordings"], formats[name]["kwargs"]
            numbers = kwargs[turn % len(kwargs)]
            wording = wordings[turn % len(wordings)].format(**numbers)
            items.append(Item(request, f"{request} {wording}", name, numbers))
    return items


def read_items(path: str | Path) -> list[Item]:
    """A JSONL file's rows of one instruction. ValueError, with the line, for what is none."""
    return [item for _, item in placed_items(path)]


def placed_items(path: str | Path) -> Iterator[tuple[str, Item]]:
    """The same, each behind its file and line."""
    for line, row in read_jsonl(path):
        try:
            ids = row.get("instruction_id_list") or [row["single_instruction_id"]]
            kwargs = row.get("kwargs") or [{}]
            kwargs = {k: v for k, v in kwargs[0].items() if v is not None}
            asked, plain = row["prompt"], row["prompt_without_instruction"]
            item = Item(plain, asked, name_of(ids[0], kwargs), kwargs)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{line}: needs prompt, prompt_without_instruction, instruction_id_list "
                f"and kwargs ({type(error).__name__}: {error})"
            ) from None
        if len(ids) == 1:  # more instructions at once are no pair for one vector
            yield line, item


def read_requests(path: str | Path) -> list[str]:
    """Plain requests of a JSONL file: its `base`, or `prompt_without_instruction`."""
    texts = []
    for place, row in read_jsonl(path):
        text = row.get("base") or row.get("prompt_without_instruction")
        if not text:
            raise ValueError(f"{place}: no base, no prompt_without_instruction")
        texts.append(text)
    return list(dict.fromkeys(texts))


def checkable(items: Sequence[Item]) -> list[Item]:
    """Those whose instruction says all that its check needs."""
    kept = []
    for item in items:
        try:
            prepare(item.instruction_id, item.kwargs)
        except ValueError:
            continue
        kept.append(item)
    return kept


def of_instruction(items: Sequence[Item]) -> dict[str, list[Item]]:
    """By instruction, in their first one's order."""
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(item.instruction, []).append(item)
    return found


def in_turn(base: Sequence[str], wordings: Sequence[str], **values) -> list[str]:
    """Each request with a wording behind it, wordings in turn."""
    return [f"{text} {wordings[i % len(wordings)].format(**values)}" for i, text in enumerate(base)]


def sentences_wordings(relation: str, n: int) -> list[str]:
    """How to ask for "at most", "exactly" or "at least" n sentences."""
    wordings = built_in()["sentences"]
    return wordings["one"][relation] if n == 1 else [w.format(n=n) for w in wordings[relation]]
