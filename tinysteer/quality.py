"""How good a text is, whether or not it follows: judges, functions of a prompt and its response.

The paper asks GPT-4o five questions about each response; any function will do in its place.
"""

from collections.abc import Callable, Mapping, Sequence

from tinysteer.language_model import LanguageModel
from tinysteer.selection import perplexity, repetition

Judge = Callable[[str, str], float]


def repeats(prompt: str, response: str) -> float:
    """`repetition` of the response."""
    return repetition(response)


def distinct(prompt: str, response: str, n: int = 2) -> float:
    """The share of different runs of n words among all (distinct-n); 1 for a text too short."""
    words = response.lower().split()
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def perplexity_under(model: LanguageModel) -> Judge:
    """A judge: how surprising the response is to a model, by itself (see `perplexity`)."""

    def judge(prompt: str, response: str) -> float:
        return perplexity(model, [response])[0]

    return judge


JUDGES: Mapping[str, Judge] = {"repetition": repeats, "distinct-2": distinct}


def judged(
    prompts: Sequence[str], responses: Sequence[str], judges: Mapping[str, Judge] = JUDGES
) -> dict[str, list[float]]:
    """Each judge's value for each response."""
    return {
        name: [judge(p, r) for p, r in zip(prompts, responses, strict=True)]
        for name, judge in judges.items()
    }
