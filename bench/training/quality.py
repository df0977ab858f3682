"""How well a tiny model answers and follows, on all 75 held-out topics.

    python bench/training/quality.py [MODEL]     (default: the embedded tiny-instruct)

True: the share of sentences that the corpus' grammar has about the very topic, so that they are
fluent and right. Followed: the share of answers that do what was asked, each of 75 questions in one
of the wordings.
"""

import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import corpus
from common import table, where

import tinysteer as ts
from tinysteer.demo.show import FORMATS

LIMITS = {"max_new_tokens": 200, "batch_size": 75}


def sentences(text: str) -> list[str]:
    """Of an answer in any layout."""
    text = re.sub(r'^\{"topic": "[^"]*", "answer": "|^- |["{}]', "", text, flags=re.M | re.I)
    return [part for part in re.split(r"(?<=\.)\s+", text.strip()) if part]


def followed(name: str, word: str, text: str) -> bool:
    n = len(sentences(text))
    checks = {
        "brief": n <= 2,
        "detailed": n >= 7,
        "include": word in text.lower(),
        "avoid": word not in text.lower(),
    }
    return checks[name] if name in checks else FORMATS[name](text)


def main() -> None:
    model = ts.load(*sys.argv[1:2], dtype="float32")
    print(where(), model, sep="; ", end="\n\n")
    topics = [topic for topic in corpus.TOPICS if topic.held_out]
    grammar = {topic.name: corpus.sayable(topic) for topic in topics}
    rows = []
    for name in ("nothing", *corpus.INSTRUCTIONS):
        rng = random.Random(name)
        words = [t.likely[0] if name == "avoid" else rng.choice(list(corpus.WORDS)) for t in topics]
        prompts = []
        for topic, word in zip(topics, words, strict=True):
            question = corpus.question(rng, topic, corpus.draw_aspect(rng))
            asked = corpus.instruction(rng, {} if name == "nothing" else {name: word})
            prompts.append(f"{question} {asked}".strip())
        texts = model.complete(prompts, **LIMITS)
        said = [(t, s) for t, text in zip(topics, texts, strict=True) for s in sentences(text)]
        true = sum(corpus.plain(s) in grammar[t.name] for t, s in said) / len(said)
        ok = [followed(name, *row) for row in zip(words, texts, strict=True) if name != "nothing"]
        rows.append([name, f"{100 * sum(ok) / len(ok):.0f} %" if ok else "", f"{100 * true:.0f} %"])
    print(table(["asked for", "followed", "true sentences"], rows))


if __name__ == "__main__":
    main()
