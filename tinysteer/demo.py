"""The demo: the paper's method and its experiments in miniature, on the embedded models.

Vectors, layers and weights come from topics on which tiny-instruct was trained; every number is of
topics on which neither model ever met an instruction. tiny-instruct is steered everywhere but in
the last table, where its vectors steer tiny-base.
"""

import json
import statistics
from collections.abc import Callable, Sequence

GENERATION = {"max_new_tokens": 144, "batch_size": 128}
LOW_PERPLEXITY = 1.15  # under tiny-base; plain answers in its language have about 1.7
WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.0)  # of a brevity or word vector, in units of its norm


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


FORMATS: dict[str, Callable[[str], bool]] = {
    "capitals": str.isupper,
    "lowercase": str.islower,
    "json": is_json,
    "bullets": lambda text: all(line.startswith("- ") for line in text.split("\n")),
    "quotes": lambda text: len(text) > 1 and text[0] == text[-1] == '"',
    "no commas": lambda text: bool(text) and "," not in text,
}
PAIRS_OF_FORMATS = (("capitals", "bullets"), ("lowercase", "no commas"), ("capitals", "json"))


def percent(check: Callable[[str], bool], texts: Sequence[str]) -> float:
    return 100 * sum(map(check, texts)) / len(texts)


def mean_words(texts: Sequence[str]) -> float:
    return statistics.mean(len(text.split()) for text in texts)


def run_demo(as_json: bool) -> None: ...
