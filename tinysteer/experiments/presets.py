"""The layers and weights that the paper chose, for the models that it steered.

Facts of its section 2 and of the authors' runs. "w/o": the prompt does not state the instruction;
"w/": it does. What is not named was left unsteered.
"""

from dataclasses import dataclass, field

from tinysteer.experiments.texts import LANGUAGE

FORMATS = """
    change_case:capital_word_frequency change_case:english_capital change_case:english_lowercase
    detectable_format:constrained_response detectable_format:json_format
    detectable_format:multiple_sections detectable_format:number_bullet_lists
    detectable_format:number_highlighted_sections detectable_format:title
    punctuation:no_comma startend:end_checker startend:quotation
"""
LANGUAGES = "ar bg bn de fa fi gu hi it mr pa pt ru sw ta te th ur vi"
INSTRUCTIONS = (*FORMATS.split(), *(f"{LANGUAGE}_{iso}" for iso in LANGUAGES.split()))
NONE = "-"
FORMAT = {  # model, setting -> a layer for each of INSTRUCTIONS
    ("phi-3-mini-4k-instruct", "w/o"): "18 28 18 - - - 20 26 - 10 - 26"
    " 18 22 - 16 20 20 - 22 16 30 - 16 16 20 - - - 28 20",
    ("phi-3-mini-4k-instruct", "w/"): "20 22 30 - 6 8 16 18 - 12 18 24"
    " 16 - - - - - 14 14 - 14 - - - - 6 - - - -",
    ("gemma-2-2b-it", "w/o"): "21 11 17 - - - 5 5 - 11 - 11"
    " - 19 - 15 - 15 - 15 15 17 - 15 15 - - - - - 15",
    ("gemma-2-2b-it", "w/"): "23 11 7 - 13 9 - - - 5 5 23 15 - - - - - - 7 - 15 - 7 - - - 7 5 15 -",
    ("mistral-7b-instruct-v0.1", "w/o"): "12 28 18 - 16 - 24 24 - 14 - -"
    " 22 18 - 16 - 20 - - 18 - - 16 18 - - - - - -",
    ("mistral-7b-instruct-v0.1", "w/"): "24 30 6 - - - 12 26 - 26 24 -"
    " - 6 18 - - 12 - - - - - - - 24 - - - - 12",
    ("gemma-2-9b-it", "w/o"): "16 28 22 - - - 16 12 34 22 - 34"
    " 20 22 20 20 22 22 - 22 20 24 - 20 22 22 22 20 20 28 20",
    ("gemma-2-9b-it", "w/"): "- 8 - - 10 28 12 10 - - - 12"
    " 20 - - - - - - 12 - - 8 - - 20 - - - - -",
    ("gemma-2-2b", "w/o"): "19 11 13 - 19 - - - - 5 - 7"
    " 21 15 19 15 - - 11 25 - - - 15 - - - - 15 - 17",
    ("gemma-2-2b", "w/"): "- - - 5 19 - 15 11 7 9 7 15 11 - 13 - - 25 - - - - - 9 - - - - - 19 11",
    ("gemma-2-2b from gemma-2-2b-it", "w/o"): "13 9 15 - 13 - - - - - - -"
    " 9 11 15 15 - 11 - 11 - - - - - 19 - 9 11 - -",
    ("gemma-2-2b from gemma-2-2b-it", "w/"): "21 9 25 11 13 - 25 25 - 5 13 25"
    " 9 - 7 - - 15 - 11 - - - 11 - - - - - 9 9",
    ("gemma-2-9b", "w/o"): "26 29 29 - 35 41 - - - 20 - 41"
    " 26 26 26 20 - 29 - 26 - - - 23 26 35 - 23 17 17 20",
    ("gemma-2-9b", "w/"): "- 23 11 - 8 23 26 32 - 20 17 - 35 8 - - - - - 17 - - - - - 20 - - - - -",
    ("gemma-2-9b from gemma-2-9b-it", "w/o"): "- 23 - - - - - - - 26 - 41"
    " 32 20 - 20 - - - 26 - - - - 23 - - 23 11 14 26",
    ("gemma-2-9b from gemma-2-9b-it", "w/"): "11 38 26 - 8 14 14 23 - 29 8 -"
    " - 11 - - - - - 11 - 26 26 - - 20 - - - - -",
}


@dataclass(frozen=True)
class Preset:
    """What the paper used for one model; None where it says nothing of it."""

    layers: dict[str, dict[str, int | None]] = field(default_factory=dict)  # setting, instruction
    length_layer: int | None = None
    length_weight: float = 20.0  # for a number of sentences, whatever the number
    length_sweep: tuple[float, ...] | None = None
    include: tuple[int, float] | None = None  # layer, weight
    exclude: tuple[int, float] | None = None


OTHERS = {  # what is added with a weight
    "phi-3-mini-4k-instruct": {
        "length_layer": 12,
        "length_sweep": (0, 5, 10, 20, 40, 60),  # 60 breaks the text
        "include": (24, 100.0),
        "exclude": (28, -100.0),
    },
    "gemma-2-2b-it": {"include": (24, 80.0), "exclude": (22, -120.0)},
    # By the vectors of gemma-2-9b-it: give it as the source.
    "gemma-2-9b": {"length_layer": 16, "length_sweep": (0, 50, 100, 150, 200)},
}


def preset(model: str, source: str | None = None) -> Preset:
    """By the last part of a model's name; an empty one for a model that the paper has not."""
    name = model.rstrip("/").split("/")[-1].lower()
    key = f"{name} from {source.rstrip('/').split('/')[-1].lower()}" if source else name
    layers = {
        setting: dict(zip(INSTRUCTIONS, numbers(text), strict=True))
        for (known, setting), text in FORMAT.items()
        if known == key
    }
    return Preset(layers, **OTHERS.get(name, {}))


def numbers(text: str) -> list[int | None]:
    return [None if word == NONE else int(word) for word in text.split()]
