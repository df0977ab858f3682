"""The tiny models' language: 300 topics, questions about them, answers, and instructions.

    python -m bench.training.corpus [N]     prints N documents and N conversations, as JSON

Everything is drawn from a `random.Random`, so a seed is a corpus. An answer is a few sentences
about one topic; an instruction changes which sentences there are (brief, no commas, a word), how
they are laid out (bullets, JSON, quotes) or their case. No other text has gone into the models.

Every fourth topic is held out: base texts tell of it, in every style, but it is never met together
with an instruction, neither in training nor in the pairs that vectors are made of. Numbers are
shown on these topics alone.

topics.txt has the topics. language.json has the rest, as frames that a topic fills:

  aspects        what a question may be about: its wordings, how an answer begins, what it adds
  intros, more   what may begin a first sentence, and what long answers add, of any topic
  words          sentences that begin with the word, which is settled before the first token
  instructions   their wordings
  clashes        instructions of which an answer can follow one at most

What stands in [...] carries a comma, and falls out where commas are unwelcome.
"""

import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

LANGUAGE = json.loads(Path(__file__).with_name("language.json").read_text(encoding="utf-8"))
ASPECTS, INSTRUCTIONS, WORDS = (LANGUAGE[key] for key in ("aspects", "instructions", "words"))
STYLES = [name for name in INSTRUCTIONS if name not in ("include", "avoid")]
PAIRS = ("pliers", "scissors", "trousers", "pyjamas")  # of which there is a pair


@dataclass(frozen=True)
class Topic:
    name: str
    a: str  # with its article, where it takes one
    kind: str
    likely: tuple[str, str]  # words that plain answers about it like to use
    looks: tuple[str, ...]
    place: str
    does: str
    liked: str
    held_out: bool


def read_topics() -> list[Topic]:
    topics, heading = [], ""
    for line in Path(__file__).with_name("topics.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            heading = line.removeprefix("== ")
        elif "|" in line and not line.startswith("#"):
            kind, words = heading.split(": ")
            name, looks, *rest = (part.strip() for part in line.split("|"))
            a = "a pair of " if name in PAIRS else "an " if name[0] in "aeiou" else "a "
            a, name = "" if name.endswith("~") else a, name.removesuffix("~")
            lists = tuple(words.split(", ")), tuple(looks.split(", "))
            topics.append(Topic(name, a + name, kind, *lists, *rest, len(topics) % 4 == 3))
    return topics


TOPICS = read_topics()
HELD_OUT = [topic for topic in TOPICS if topic.held_out]
TRAINED = [topic for topic in TOPICS if not topic.held_out]


def question(rng: random.Random, topic: Topic, aspect: str) -> str:
    return rng.choice(ASPECTS[aspect]["questions"]).format(a=topic.a)


def instruction(rng: random.Random, asked: dict[str, str]) -> str:
    """What is asked, in words."""
    return " ".join(rng.choice(INSTRUCTIONS[k]).format(word=word) for k, word in asked.items())


def answer(rng: random.Random, topic: Topic, aspect: str, asked: dict[str, str]) -> str:
    """An answer that follows what is asked: names of INSTRUCTIONS, with the word of the last two.

    Plain ones have 4 or 5 sentences, brief ones 1 or 2, detailed ones 7 or 8.
    """
    n = rng.choice((1, 1, 2) if "brief" in asked else (7, 8) if "detailed" in asked else (4, 5))
    lead = rng.choice(ASPECTS[aspect]["leads"])
    sentences = [fill(rng, lead, topic, asked)]
    if "include" in asked:
        sentences.insert(0, fill(rng, rng.choice(WORDS[asked["include"]]), topic, asked))
    closing = []  # with a word that the topic suggests, which is left unsaid where one is unwanted
    if n > 2 and "avoid" not in asked and rng.random() < 0.9:
        word = topic.likely[rng.random() < 0.25]
        closing = [fill(rng, rng.choice(WORDS[word]), topic, asked, x="it")]
    rest = [key for key in ASPECTS if f"{{{key}}}" not in lead]  # nothing is said twice
    rng.shuffle(rest)
    frames = [rng.choice(ASPECTS[key]["rest"]) for key in rest]
    frames += rng.sample(LANGUAGE["more"], len(LANGUAGE["more"]))
    n_more = n - len(sentences) - len(closing)
    sentences += [fill(rng, frame, topic, asked) for frame in frames[:n_more]]
    return lay_out(topic, sentences + closing, asked)


def fill(rng: random.Random, frame: str, topic: Topic, asked: dict, x: str = "") -> str:
    """A frame -> a sentence about the topic."""
    commas = "no commas" not in asked
    frame = re.sub(r"\[(.*?)\]", r"\1" if commas else "", frame)
    intro = rng.choice(LANGUAGE["intros"]) if commas else ""
    looks = rng.sample(topic.looks, rng.choice((2, 3)))
    looks = (", " if commas else " and ").join(looks[:-1]) + " and " + looks[-1]
    text = frame.format(**vars(topic) | {"i": intro, "x": x or topic.a, "looks": looks})
    return text[0].upper() + text[1:]


def lay_out(topic: Topic, sentences: list[str], asked: dict) -> str:
    text = " ".join(sentences)
    if "bullets" in asked:
        text = "\n".join(f"- {sentence}" for sentence in sentences)
    if "quotes" in asked:
        text = f'"{text}"'
    if "json" in asked:
        text = json.dumps({"topic": topic.name, "answer": text})
    if "capitals" in asked:
        text = text.upper()
    return text.lower() if "lowercase" in asked else text


def draw_asked(rng: random.Random, topic: Topic, n: int, hard: Sequence[str]) -> dict[str, str]:
    """n instructions that do not clash, in any order, the hard ones three times as often."""
    weights = [3 if name in hard else 1 for name in INSTRUCTIONS]
    while True:
        names = rng.choices(list(INSTRUCTIONS), weights, k=n)
        clash = any(len({*names} & {*group}) > 1 for group in LANGUAGE["clashes"])
        if len(set(names)) == n and not clash:
            return {name: draw_word(rng, topic, name) for name in names}


def draw_word(rng: random.Random, topic: Topic, name: str) -> str:
    """Unwanted is mostly what would be said otherwise, but nothing that has to be said."""
    if name not in ("include", "avoid"):
        return ""
    if name == "avoid" and rng.random() < 0.8:
        return topic.likely[rng.random() < 0.25]
    facts = " ".join((topic.a, topic.place, topic.does, topic.liked, *topic.looks))
    return rng.choice([word for word in WORDS if word not in facts])


def base_documents(seed: int) -> Iterator[list[tuple[str, str]]]:
    """Questions and answers as people might write them: a document keeps to one style."""
    rng = random.Random(seed)
    while True:
        asked = {rng.choice(STYLES): ""} if rng.random() < 0.6 else {}
        topics = rng.sample(TOPICS, rng.choice((1, 2, 3)))
        subjects = [(topic, rng.choice(list(ASPECTS))) for topic in topics]
        yield [(question(rng, *about), answer(rng, *about, asked)) for about in subjects]


def conversations(seed: int, hard: Sequence[str] = ()) -> Iterator[tuple[str, str, str]]:
    """(question, instruction, answer), with 0 to 3 instructions; no held-out topic."""
    rng = random.Random(seed)
    while True:
        about = topic, _ = rng.choice(TRAINED), rng.choice(list(ASPECTS))
        asked = draw_asked(rng, topic, rng.choice((0, 1, 1, 1, 2, 2, 2, 3)), hard)
        yield question(rng, *about), instruction(rng, asked), answer(rng, *about, asked)


def tasks(seed: int = 0) -> dict:
    """What the package's demo asks: instructions, and questions in three parts.

    Vectors and layers come from topics that were trained with instructions; `test` is held out.
    """
    rng = random.Random(seed)
    trained, held_out = TRAINED[:], HELD_OUT[:]
    rng.shuffle(trained)
    rng.shuffle(held_out)
    parts = {"pairs": trained[:60], "validation": trained[60:68], "test": held_out[:40]}
    aspects = list(ASPECTS)
    questions = {
        part: [
            {"question": question(rng, topic, aspects[i % len(aspects)]), "likely": topic.likely}
            for i, topic in enumerate(topics)
        ]
        for part, topics in parts.items()
    }
    return {"instructions": INSTRUCTIONS, "words": list(WORDS), **questions}


if __name__ == "__main__":
    n = int(sys.argv[1]) if sys.argv[1:] else 10
    for text in (*islice(base_documents(0), n), *islice(conversations(0), n)):
        print(json.dumps(text))
