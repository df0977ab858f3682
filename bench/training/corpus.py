"""The tiny models' language: 300 topics, questions about them, answers, and instructions.

Everything is drawn from a `random.Random`, so a seed is a corpus. An answer is a few sentences
about one topic; an instruction changes which sentences there are (brief, no commas, a word), how
they are laid out (bullets, JSON, quotes) or their case. No other text has gone into the models.

Every fourth topic is held out: base texts tell of it, in every style, but it is never met together
with an instruction, neither in training nor in the pairs that vectors are made of. Numbers are
shown on these topics alone.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

ASPECTS = {  # what a question may be about -> its wordings
    "kind": ("What is {a}?", "Tell me about {a}.", "Can you explain what {a} is?"),
    "looks": ("What does {a} look like?", "How would you describe {a}?", "How do I know {a}?"),
    "place": ("Where would I find {a}?", "Where can you see {a}?", "Where does {a} belong?"),
    "does": ("What is special about {a}?", "What does {a} do?", "What should I know about {a}?"),
    "liked": ("Why do people like {a}?", "What is good about {a}?", "Why is {a} so popular?"),
}
# What stands in [...] carries a comma, and falls out where commas are unwelcome.
LEADS = {
    "kind": ("{i}{a} is {kind} with {looks}.", "{i}{a} is {kind} that {does}."),
    "looks": ("{i}{a} has {looks}.", "{i}you can tell {a} by {looks}."),
    "place": ("{i}{a} is found {place}.", "{i}you can see {a} {place}."),
    "does": ("{i}{a} {does}.", "{i}the main thing about {a} is that it {does}."),
    "liked": ("{i}people like {a} for {liked}.", "{i}{a} is loved for {liked}."),
}
INTROS = ("In short, ", "As a rule, ", "To begin with, ", "As it happens, ", "Put simply, ")
REST = {
    "kind": ("It is {kind}[, as most people know].", "[After all, ]it is {kind}."),
    "looks": ("It has {looks}.", "[At first sight, ]you notice {looks}."),
    "place": ("[Most of the time, ]it is found {place}.", "Look for it {place}[, if you can]."),
    "does": ("[Day after day, ]it {does}.", "It {does}[, which is worth seeing]."),
    "liked": ("[Above all, ]it is known for {liked}.", "Many people like it for {liked}."),
}
MORE = (  # for long answers, of any topic
    "[For this reason, ]it is easy to remember.",
    "There are many kinds of it[, both large and small].",
    "You can read more about it in old books[, of course].",
    "[Once you know it, ]you see it everywhere.",
    "Every country has its own name for it[, or even two].",
)
WORDS = {  # sentences that begin with the word: it is settled before the answer's first token
    "children": ("Children enjoy {x} at once.", "Children often draw {x}."),
    "water": ("Water and {x} belong together.", "Water plays a part in the life of {x}."),
    "morning": ("Morning is the best time for {x}.", "Morning light shows {x} at its best."),
    "garden": ("Garden owners are glad of {x}.", "Garden visitors soon notice {x}."),
    "summer": ("Summer is the season for {x}.", "Summer days bring {x} to mind."),
    "science": ("Science still learns from {x}.", "Science has a long name for {x}."),
    "family": ("Family life is richer with {x}.", "Family stories often mention {x}."),
    "money": ("Money spent on {x} is well spent.", "Money is saved by taking care of {x}."),
    "history": ("History has much to say about {x}.", "History would be poorer without {x}."),
    "music": ("Music goes well with {x}.", "Music has been written about {x}."),
    "school": ("School lessons often mention {x}.", "School is where many first meet {x}."),
    "friends": ("Friends like to talk about {x}.", "Friends may ask you for {x}."),
    "travel": ("Travel is more fun with {x}.", "Travel books often praise {x}."),
    "winter": ("Winter is a good time for {x}.", "Winter would be duller without {x}."),
    "weekend": ("Weekend plans may well include {x}.", "Weekend guests often ask about {x}."),
}
INSTRUCTIONS = {
    "capitals": (
        "Answer in all capital letters.",
        "Write everything in capitals.",
        "Use only uppercase letters.",
        "Please reply in capital letters only.",
        "Your whole answer should be uppercase.",
        "Do not use any small letters.",
    ),
    "lowercase": (
        "Answer in all lowercase letters.",
        "Write everything in lowercase.",
        "Use only small letters.",
        "Please reply in lowercase only.",
        "Your whole answer should be lowercase.",
        "Do not use any capital letters.",
    ),
    "json": (
        "Answer in JSON.",
        "Give the answer as a JSON object.",
        "Format your reply as JSON.",
        "Please return valid JSON only.",
        "Wrap the whole answer in JSON.",
        "Your answer should be a JSON object.",
    ),
    "bullets": (
        "Answer with bullet points.",
        "Use a bullet list.",
        "Write the answer as a list of bullets.",
        "Please reply in bullet points.",
        "Put each sentence on its own bullet.",
        "Your answer should be a bulleted list.",
    ),
    "quotes": (
        "Wrap your answer in double quotes.",
        "Put the whole answer in double quotation marks.",
        "Begin and end with a double quote.",
        "Please reply inside double quotes.",
        "Enclose the entire reply in quotation marks.",
        "Your answer should stand between double quotes.",
    ),
    "no commas": (
        "Do not use any commas.",
        "Answer without commas.",
        "Avoid commas.",
        "Please leave out all commas.",
        "Your answer should have no commas.",
        "Write the reply without a single comma.",
    ),
    "brief": (
        "Be brief.",
        "Answer in a few words.",
        "Keep it very short.",
        "Please give a short answer.",
        "Your answer should be brief.",
        "Be as concise as you can.",
    ),
    "detailed": (
        "Be detailed.",
        "Answer at length.",
        "Give a long answer.",
        "Please explain in detail.",
        "Your answer should be detailed.",
        "Tell me as much as you can.",
    ),
    "include": (
        "Include the word {word}.",
        "Use the word {word} in your answer.",
        "Please mention the word {word}.",
        "Your answer should contain the word {word}.",
        "Make sure the word {word} appears.",
        "Work the word {word} into the reply.",
    ),
    "avoid": (
        "Avoid the word {word}.",
        "Do not use the word {word}.",
        "Please leave out the word {word}.",
        "Your answer should not contain the word {word}.",
        "Make sure the word {word} does not appear.",
        "Keep the word {word} out of the reply.",
    ),
}
STYLES = tuple(name for name in INSTRUCTIONS if name not in ("include", "avoid"))
CLASHES = (  # of each, an answer can follow one at most
    {"json", "bullets", "quotes"},
    {"capitals", "lowercase"},
    {"brief", "detailed"},
    {"include", "avoid"},
    {"json", "no commas"},
    {"brief", "include"},
)

PAIRS = ("pliers", "scissors", "trousers", "pyjamas")


@dataclass(frozen=True)
class Topic:
    name: str
    mass: bool  # has no article
    kind: str
    likely: tuple[str, str]  # words that plain answers about it like to use
    looks: tuple[str, ...]
    place: str
    does: str
    liked: str
    held_out: bool

    @property
    def a(self) -> str:
        """With its article."""
        if self.mass:
            return self.name
        if self.name in PAIRS:
            return f"a pair of {self.name}"
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"


def read_topics() -> list[Topic]:
    topics, heading = [], ""
    for line in Path(__file__).with_name("topics.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            heading = line.removeprefix("== ")
        elif "|" in line and not line.startswith("#"):
            kind, words = heading.split(": ")
            name, looks, *rest = (part.strip() for part in line.split("|"))
            held_out = len(topics) % 4 == 3
            looks, words = tuple(looks.split(", ")), tuple(words.split(", "))
            mass, name = name.endswith("~"), name.removesuffix("~")
            topics.append(Topic(name, mass, kind, words, looks, *rest, held_out))
    return topics


TOPICS = read_topics()


def question(rng: random.Random, topic: Topic, aspect: str) -> str:
    return rng.choice(ASPECTS[aspect]).format(a=topic.a)


def answer(rng: random.Random, topic: Topic, aspect: str, asked: dict[str, str]) -> str:
    """An answer that follows what is asked: names of INSTRUCTIONS, with the word of the last two.

    Plain ones have 4 or 5 sentences, brief ones 1 or 2, detailed ones 7 or 8.
    """
    n = rng.choice((1, 1, 2) if "brief" in asked else (7, 8) if "detailed" in asked else (4, 5))
    lead = rng.choice(LEADS[aspect])
    sentences = [fill(rng, lead, topic, asked)]
    if "include" in asked:
        sentences.insert(0, fill(rng, rng.choice(WORDS[asked["include"]]), topic, asked))
    closing = []  # with a word that the topic suggests, which is left unsaid where one is unwanted
    if n > 2 and "avoid" not in asked and rng.random() < 0.9:
        word = topic.likely[rng.random() < 0.25]
        closing = [fill(rng, rng.choice(WORDS[word]), topic, asked, x="it")]
    rest = [key for key in REST if f"{{{key}}}" not in lead]  # nothing is said twice
    rng.shuffle(rest)
    frames = [rng.choice(REST[key]) for key in rest] + rng.sample(MORE, len(MORE))
    for frame in frames[: n - len(sentences) - len(closing)]:
        sentences.append(fill(rng, frame, topic, asked))
    return lay_out(topic, sentences + closing, asked)


def fill(rng: random.Random, frame: str, topic: Topic, asked: dict, x: str = "") -> str:
    """A frame -> a sentence about the topic."""
    commas = "no commas" not in asked
    frame = re.sub(r"\[(.*?)\]", r"\1" if commas else "", frame)
    intro = rng.choice(INTROS) if commas else ""
    looks = rng.sample(topic.looks, rng.choice((2, 3)))
    text = frame.format(
        i=intro,
        a=topic.a,
        x=x or topic.a,
        kind=topic.kind,
        looks=(", " if commas else " and ").join(looks[:-1]) + " and " + looks[-1],
        place=topic.place,
        does=topic.does,
        liked=topic.liked,
    )
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


def sayable(topic: Topic) -> set[str]:
    """Every sentence the language has about a topic, as `plain` leaves it: true and well formed."""
    frames = [frame for group in (*LEADS.values(), *REST.values()) for frame in group]
    frames += [*MORE, *(frame for group in WORDS.values() for frame in group)]
    fields = {f: getattr(topic, f) for f in ("a", "kind", "place", "does", "liked")}
    looks = [" and ".join(p) for n in (2, 3) for p in permutations(topic.looks, n)]
    texts = (
        re.sub(r"\[(.*?)\]", inside, frame).format(i=intro, x=x, looks=look, **fields)
        for frame in frames
        for inside in (r"\1", "")
        for intro in (*INTROS, "")
        for x in (topic.a, "it")
        for look in looks
    )
    return {plain(text) for text in texts}


def plain(text: str) -> str:
    """A sentence without its case and commas; in lists a comma is as good as "and"."""
    text = text.lower().replace(",", " ").replace(" and ", " ")
    return " ".join(text.split()).rstrip(".")


def instruction(rng: random.Random, asked: dict[str, str]) -> str:
    """What is asked, in words."""
    return " ".join(
        rng.choice(INSTRUCTIONS[name]).format(word=word) for name, word in asked.items()
    )


def draw_asked(rng: random.Random, n: int, hard: Sequence[str]) -> list[str]:
    """n instructions that do not clash, in any order, the hard ones three times as often."""
    names = list(INSTRUCTIONS)
    weights = [3 if name in hard else 1 for name in names]
    while True:
        drawn = rng.choices(names, weights, k=n)
        if len(set(drawn)) == n and not any(len(clash & set(drawn)) > 1 for clash in CLASHES):
            return drawn


def draw_word(rng: random.Random, topic: Topic, name: str) -> str:
    """Unwanted is mostly what would be said otherwise, but nothing that has to be said."""
    if name not in ("include", "avoid"):
        return ""
    if name == "avoid" and rng.random() < 0.8:
        return topic.likely[rng.random() < 0.25]
    facts = " ".join((topic.a, topic.place, topic.does, topic.liked, *topic.looks))
    return rng.choice([word for word in WORDS if word not in facts])


def draw_aspect(rng: random.Random) -> str:
    return rng.choice(list(ASPECTS))


def base_documents(seed: int) -> Iterator[list[tuple[str, str]]]:
    """Questions and answers as people might write them: a document keeps to one style."""
    rng = random.Random(seed)
    while True:
        style = rng.choice(STYLES) if rng.random() < 0.6 else ""
        asked = {style: ""} if style else {}
        aspects = [(topic, draw_aspect(rng)) for topic in rng.sample(TOPICS, rng.choice((1, 2, 3)))]
        yield [
            (question(rng, topic, aspect), answer(rng, topic, aspect, asked))
            for topic, aspect in aspects
        ]


def conversations(seed: int, hard: Sequence[str] = ()) -> Iterator[tuple[str, str, str]]:
    """(question, instruction, answer), with 0 to 3 instructions; no held-out topic."""
    rng = random.Random(seed)
    topics = [topic for topic in TOPICS if not topic.held_out]
    while True:
        topic, aspect = rng.choice(topics), draw_aspect(rng)
        names = draw_asked(rng, rng.choice((0, 1, 1, 1, 2, 2, 2, 3)), hard)
        asked = {name: draw_word(rng, topic, name) for name in names}
        yield (
            question(rng, topic, aspect),
            instruction(rng, asked),
            answer(rng, topic, aspect, asked),
        )


def tasks(seed: int = 0) -> dict:
    """What the package's demo asks: instructions, and questions in three parts.

    Vectors and layers come from topics that were trained with instructions; `test` is held out.
    """
    rng = random.Random(seed)

    def questions(topics: list[Topic]) -> list[dict]:
        aspects = [list(ASPECTS)[i % len(ASPECTS)] for i in range(len(topics))]
        return [
            {"question": question(rng, topic, aspect), "likely": topic.likely}
            for topic, aspect in zip(topics, aspects, strict=True)
        ]

    trained = [topic for topic in TOPICS if not topic.held_out]
    rng.shuffle(trained)
    held_out = [topic for topic in TOPICS if topic.held_out]
    rng.shuffle(held_out)
    return {
        "instructions": INSTRUCTIONS,
        "words": list(WORDS),
        "pairs": questions(trained[:60]),
        "validation": questions(trained[60:68]),
        "test": questions(held_out[:40]),
    }


if __name__ == "__main__":
    from itertools import islice

    for document in islice(base_documents(0), 8):
        print(*(f"Q: {q}\nA: {a}" for q, a in document), sep="\n", end="\n\n")
    for q, asked, a in islice(conversations(0), 12):
        print(f"> {q} {asked}\n{a}\n")
