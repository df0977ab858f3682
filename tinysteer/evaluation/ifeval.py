"""IFEval's 25 verifiable instructions: whether a response follows them, strictly or loosely.

After Zhou et al., "Instruction-Following Evaluation for Large Language Models" (2023). Where the
official code draws what an instruction lacks at random, here it is an error.

    check("keywords:frequency", "ha ha", keyword="ha", frequency=2, relation="at least")  # True

Five checks need `pip install "tinysteer[eval]"`: the three that tell languages apart, the count of
sentences and that of words in capitals.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinysteer.evaluation.checks import CHECKS
from tinysteer.text.files import read_jsonl

HUB_FILE = ("google/IFEval", "ifeval_input_data.jsonl")


def check(instruction_id: str, response: str, **kwargs) -> bool:
    """Whether the response follows one instruction. A blank response follows none.

    kwargs are the instruction's, as IFEval names them; those that are None are left out. ValueError
    for an unknown instruction, and for kwargs that are missing or too many.
    """
    verify, kwargs = prepare(instruction_id, kwargs)
    return bool(response.strip()) and verify(response, **kwargs)


def prepare(instruction_id: str, kwargs: Mapping) -> tuple[Callable[..., bool], dict]:
    if instruction_id not in CHECKS:
        raise ValueError(f"{instruction_id!r} is no instruction of IFEval: {', '.join(CHECKS)}")
    verify = CHECKS[instruction_id]
    _, *names = inspect.signature(verify).parameters
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if set(kwargs) != set(names):
        seen, due = ", ".join(kwargs) or "nothing", ", ".join(names) or "nothing"
        raise ValueError(f"{instruction_id} is given {seen}; it takes {due}")
    return verify, kwargs


def variants(response: str) -> Iterator[str]:
    """The response; without its first line, its last, or both; and all four without stars."""
    lines = response.split("\n")
    shorter = ("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))
    for text in (response, *shorter):
        yield text
        yield text.replace("*", "")


def each(
    instruction_id_list: Sequence[str],
    kwargs: Sequence[Mapping],
    response: str,
    mode: str = "strict",
) -> list[bool]:
    """Whether the response follows each instruction; kwargs are one mapping an instruction.

    mode "loose": whether any of the response's variants does. ValueError as for `check`.
    """
    if mode not in ("strict", "loose"):
        raise ValueError(f"mode is {mode!r}: use 'strict' or 'loose'")
    if len(instruction_id_list) != len(kwargs):
        raise ValueError(f"{len(instruction_id_list)} instructions have {len(kwargs)} kwargs")
    texts = [response] if mode == "strict" else list(variants(response))
    return [
        any(check(name, text, **given) for text in texts)
        for name, given in zip(instruction_id_list, kwargs, strict=True)
    ]


def follow(
    instruction_id_list: Sequence[str],
    kwargs: Sequence[Mapping],
    response: str,
    mode: str = "strict",
) -> bool:
    """Whether the response follows all instructions of its prompt. As `each`."""
    return all(each(instruction_id_list, kwargs, response, mode))


@dataclass(frozen=True)
class Accuracy:
    """Shares of prompts all of whose instructions are followed, and of instructions."""

    prompt: float
    instruction: float
    n_prompts: int
    n_instructions: int


def accuracy(rows: Iterable[Mapping], responses: Iterable[str], mode: str = "strict") -> Accuracy:
    """rows hold an `instruction_id_list` and `kwargs` each, as IFEval's do; a response a row."""
    verdicts = [
        each(row["instruction_id_list"], row["kwargs"], response, mode)
        for row, response in zip(rows, responses, strict=True)
    ]
    if not verdicts:
        raise ValueError("there are no rows to be accurate on")
    single = [verdict for row in verdicts for verdict in row]
    prompt = sum(map(all, verdicts)) / len(verdicts)
    return Accuracy(prompt, sum(single) / len(single), len(verdicts), len(single))


def load_prompts(path: str | Path | None = None) -> list[dict]:
    """IFEval's 541 rows from the Hub, or the rows of a JSONL file of the same form.

    ValueError for a row that no check can be made on, with its line.
    """
    if path is None:
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(*HUB_FILE, repo_type="dataset")
    rows = []
    for line, row in read_jsonl(path):
        try:
            for name, given in zip(row["instruction_id_list"], row["kwargs"], strict=True):
                prepare(name, given)
            row["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{line}: {error}") from error
        rows.append(row)
    return rows
