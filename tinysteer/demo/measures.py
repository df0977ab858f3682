"""What the demo measures with: the embedded models, their questions, and what counts as following.

Edits act on the last prompt token alone, where vectors are read and where these models keep what
style an answer is to have; the paper edits all positions.
"""

import contextlib
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tinysteer.evaluation.quality import repetition
from tinysteer.extraction import MeanResiduals, extract, mean_residuals
from tinysteer.language_model import LanguageModel, load
from tinysteer.loading.hub import ASSETS
from tinysteer.steering.edits import Edit
from tinysteer.steering.vectors import SteeringVector

OPTIONS = {"max_new_tokens": 112, "batch_size": 256}
WHERE = (0, 1)  # the last prompt token
REPETITIVE = 0.3  # the share of repeated runs of three words from which on a text is broken
DRAWS = range(2)  # of random directions


def is_json(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return isinstance(json.loads(text), dict)
    return False


FORMATS: dict[str, Callable[[str], bool]] = {
    "capitals": str.isupper,
    "lowercase": str.islower,
    "json": is_json,
    "bullets": lambda text: all(line.startswith("- ") for line in text.split("\n")),
    "quotes": lambda text: len(text) > 1 and text[0] == text[-1] == '"',
    "no commas": lambda text: bool(text) and "," not in text,
}


def percent(hits: Iterable[bool]) -> float:
    hits = list(hits)
    return 100 * sum(hits) / len(hits)


def follow(texts: Sequence[str], *names: str) -> float:
    """How many texts have all these formats."""
    return percent(all(FORMATS[name](text) for name in names) for text in texts)


def hold(words: Sequence[str], texts: Sequence[str]) -> float:
    """How many texts hold their word."""
    return percent(word in text.lower() for word, text in zip(words, texts, strict=True))


def mean_words(texts: Sequence[str]) -> float:
    return statistics.mean(len(text.split()) for text in texts)


def broken(texts: Sequence[str]) -> float:
    """How many texts repeat themselves.

    The paper finds those by a low perplexity under GPT-2; tiny-base, which never saw any in
    training, finds them improbable instead.
    """
    return percent(repetition(text) > REPETITIVE for text in texts)


def to_target(vector: SteeringVector, layer: int | None) -> list[Edit]:
    return [] if layer is None else [vector.at(layer).to_target(where=WHERE)]


def add(vector: SteeringVector, layer: int, weight: float) -> list[Edit]:
    """weight: in norms."""
    v = vector.at(layer)
    return [v.add(weight=weight * v.norm, where=WHERE)]


@dataclass(frozen=True)
class Lab:
    """The two models, what to ask them (assets/tasks.json), and what they say unsteered."""

    model: LanguageModel
    base_model: LanguageModel
    tasks: dict[str, Any]
    plain: MeanResiduals  # of the pairs' questions, without an instruction
    answers: list[str]  # to the test questions, without an instruction
    base_answers: list[str]

    @classmethod
    def load(cls) -> "Lab":
        model, base_model = (load(name, "float32") for name in ("tiny-instruct", "tiny-base"))
        tasks = json.loads((ASSETS / "tasks.json").read_text(encoding="utf-8"))
        pairs, test = ([t["question"] for t in tasks[part]] for part in ("pairs", "test"))
        plain = mean_residuals(model, pairs, batch_size=64)
        answers = (m.complete(test, **OPTIONS) for m in (model, base_model))
        return cls(model, base_model, tasks, plain, *answers)

    def questions(self, part: str) -> list[str]:
        """Of "pairs", "validation" or "test"."""
        return [task["question"] for task in self.tasks[part]]

    def ask(self, part: str, *names: str, words: Sequence[str] = ("",)) -> list[str]:
        """The questions of a part with instructions, their wordings (and words) in turn."""
        wordings = [self.tasks["instructions"][name] for name in names]
        return [
            " ".join([question, *(w[i % len(w)] for w in wordings)]).format(
                word=words[i % len(words)]
            )
            for i, question in enumerate(self.questions(part))
        ]

    def vector(self, name: str, word: str = "") -> SteeringVector:
        asked = self.ask("pairs", name, words=[word])
        label = f"{name} {word}".strip()
        return extract(self.model, asked, self.plain, name=label, batch_size=64)

    def random(self, vector: SteeringVector) -> list[SteeringVector]:
        """Its controls, other directions for each vector."""
        seeds = (f"{vector.label} {draw}" for draw in DRAWS)
        return [vector.random_like(seed, self.plain.mean) for seed in seeds]
