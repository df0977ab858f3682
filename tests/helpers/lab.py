"""The embedded models with what to ask them, and how far their answers follow."""

import json
import statistics
from collections.abc import Sequence
from functools import cached_property

import tinysteer as ts
from tinysteer.demo.show import FORMATS, percent
from tinysteer.extraction import mean_residuals
from tinysteer.loading.hub import ASSETS


def follow(texts: Sequence[str], name: str) -> float:
    """How many percent of the texts have a format."""
    return percent(FORMATS[name], texts)


def hold(words: Sequence[str], texts: Sequence[str]) -> float:
    """How many percent of the texts hold their word."""
    return 100 * statistics.mean(w in text.lower() for w, text in zip(words, texts, strict=True))


def mean_words(texts: Sequence[str]) -> float:
    return statistics.mean(len(text.split()) for text in texts)


class Lab:
    def __init__(self):
        self.model = ts.load("tiny-instruct", dtype="float32")
        self.tasks = json.loads((ASSETS / "tasks.json").read_text(encoding="utf-8"))

    @cached_property
    def base_model(self) -> ts.LanguageModel:
        return ts.load("tiny-base", dtype="float32")

    @cached_property
    def plain(self):
        """Of the pairs' questions, without an instruction."""
        return mean_residuals(self.model, self.questions("pairs"), batch_size=64)

    def questions(self, part: str) -> list[str]:
        """Of "pairs", "validation" or "test"."""
        return [task["question"] for task in self.tasks[part]]

    def ask(self, part: str, name: str, words: Sequence[str] = ("",)) -> list[str]:
        """The questions of a part with an instruction, its wordings and words in turn."""
        wordings = self.tasks["instructions"][name]
        return [
            f"{question} {wordings[i % len(wordings)]}".format(word=words[i % len(words)])
            for i, question in enumerate(self.questions(part))
        ]

    def vector(self, name: str) -> ts.SteeringVector:
        return ts.extract(self.model, self.ask("pairs", name), self.plain, name=name, batch_size=64)
