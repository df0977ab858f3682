"""Does it work? Two instructions on held-out prompts: the tables and texts that README shows.

    python bench/steering.py MODEL     (written for SmolLM2-135M-Instruct)

Vectors come from bench/pairs, numbers from the prompts below, which are in no pair. Layers and
weights were chosen on other prompts; layer 15 was preferred to layer 14 after a look at the first
12, so brevity is shown for the second 12 alone too. Greedy, float32, at most 96 new tokens. The
control is a random direction at the same layer with the same weight.
"""

import json
import sys
from pathlib import Path

from common import table, where

import tinysteer as ts

PAIRS = Path(__file__).parent / "pairs"
PROMPTS = [
    "Why is the sea salty?",
    "How do I keep houseplants alive while I am on holiday?",
    "What is the purpose of a passport?",
    "Tell me about the elephants of Africa.",
    "Explain how a bicycle stays upright.",
    "What should I eat before running a marathon?",
    "Describe the main parts of a computer.",
    "How can I make new friends in a new city?",
    "What happened during the Apollo 11 mission?",
    "Recommend a book for a long flight and say why.",
    "How do vaccines protect us?",
    "Write an invitation to a garden party.",
    "Why do cats purr?",
    "How do I learn to play the guitar on my own?",
    "What is a black hole?",
    "Tell me about the Amazon rainforest.",
    "How does a microwave oven heat food?",
    "What should I do if I lose my wallet?",
    "Describe the taste of dark chocolate.",
    "How can I keep my kitchen clean every day?",
    "Who was Marie Curie?",
    "Explain why the sky is blue.",
    "What makes a good teacher?",
    "How do I write a thank-you note after an interview?",
]
CONCISE = " Be extremely concise."
JSON = (
    " Answer in JSON format.",
    " Format the response as JSON.",
    " Give the answer as a JSON object with suitable keys.",
    " Output only JSON.",
    " Wrap the whole answer in a JSON object.",
    " Your reply must be valid JSON and nothing else.",
)


def extract(model: ts.LanguageModel, name: str) -> ts.SteeringVector:
    rows = [json.loads(line) for line in (PAIRS / f"{name}.jsonl").read_text().splitlines()]
    return ts.extract(model, [row["with"] for row in rows], [row["without"] for row in rows])


def words(texts: list[str]) -> float:
    return sum(len(text.split()) for text in texts) / len(texts)


def opens_as_json(text: str) -> bool:
    return text.lstrip().startswith(("{", "[", "```json"))


def holds_json(text: str) -> bool:
    """Whether a whole JSON object can be read out of the text."""
    for at, character in enumerate(text):
        if character == "{":
            try:
                json.JSONDecoder().raw_decode(text[at:])
            except ValueError:
                continue
            return True
    return False


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    model = ts.load(sys.argv[1], dtype="float32")
    print(where(), model, sep="; ", end="\n\n")

    def complete(prompts, *steer):
        return model.complete(prompts, steer, max_new_tokens=96)

    vector = extract(model, "concise")
    concise = vector.at(15)
    asked = [prompt + CONCISE for prompt in PROMPTS]
    plain, steered = complete(PROMPTS), complete(PROMPTS, concise.add())
    ways = {
        "neither": plain,
        "steered": steered,
        "asked": complete(asked),
        "both": complete(asked, concise.add()),
        "a random direction": complete(PROMPTS, vector.random_like().at(15).add()),
    }
    rows = [[name, *(f"{words(part):.1f}" for part in (t, t[12:]))] for name, t in ways.items()]
    print(table(["concise, mean words", "24 prompts", "the second 12"], rows), end="\n\n")

    vector = extract(model, "json")
    as_json = vector.at(17)
    asked = [prompt + wording for prompt in PROMPTS[:12] for wording in JSON]
    control, weight = vector.random_like().at(17), 0.75 * as_json.norm
    ways = {
        "steered": complete(PROMPTS[:12], as_json.add(weight=weight)),
        "asked": complete(asked),
        "both": (both := complete(asked, as_json.add(weight=weight))),
        "asked, a random direction": complete(asked, control.add(weight)),
    }
    rows = [
        [
            name,
            *(f"{sum(map(test, texts))} of {len(texts)}" for test in (opens_as_json, holds_json)),
        ]
        for name, texts in ways.items()
    ]
    print(table(["JSON", "opens as JSON", "holds an object"], rows), end="\n\n")

    for i in (2, 14, 17):
        print(f"> {PROMPTS[i]}\n\n{plain[i]}\n\nsteered: {steered[i]}\n")
    print(f"> {asked[4 * 6 + 4]}\n\n{ways['asked'][4 * 6 + 4]}\n\nsteered: {both[4 * 6 + 4]}")


if __name__ == "__main__":
    main()
