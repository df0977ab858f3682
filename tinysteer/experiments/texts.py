"""Requests with an instruction, and the files that hold a user's own.

Rows of a file have the fields of the paper's data: `prompt`, `prompt_without_instruction`,
`instruction_id_list` (or `single_instruction_id`) and `kwargs`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinysteer.evaluation.ifeval import prepare
from tinysteer.text.files import read_jsonl

LANGUAGE = "language:response_language"


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


def read_items(path: str | Path) -> list[Item]:
    """A JSONL file's rows of one instruction. ValueError, with the line, for what is not one."""
    items = []
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
            items.append(item)
    return items


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
