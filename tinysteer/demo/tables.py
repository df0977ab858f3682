"""The paper's experiments in miniature, on the embedded models: each function is one table.

Vectors, layers and weights come from topics on which tiny-instruct was trained; every number is of
topics that neither model ever met together with an instruction. Numbers are percentages of the
answers, unless their function says otherwise. "random" is the mean of two random directions of the
same norm, with a target as far from the states without the instruction.
"""

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from tinysteer.demo.measures import (
    DRAWS,
    OPTIONS,
    Lab,
    add,
    broken,
    follow,
    hold,
    mean_words,
    to_target,
)
from tinysteer.evaluation.selection import choose_layer, sweep, sweep_layers
from tinysteer.language_model import LanguageModel
from tinysteer.steering.edits import Edit
from tinysteer.steering.vectors import SteeringVector

WEIGHTS = (0.0, 0.75, 1.0, 1.25, 1.5)  # in units of a vector's norm
BOTH = (("lowercase", "no commas"), ("lowercase", "bullets"), ("capitals", "no commas"))
Table = dict[str, dict[str, Any]]


def layers(model: LanguageModel) -> list[int | None]:
    """What the paper tries, but every layer rather than every second one: there are only six."""
    return sweep_layers(model.config.n_layers, step=1)


def best_layer(
    model: LanguageModel, prompts: list[str], vector: SteeringVector, name: str
) -> int | None:
    """The paper's rule, for `to_target` on validation prompts."""
    settings = {layer: to_target(vector, layer) for layer in layers(model)}
    texts = sweep(model, prompts, settings, **OPTIONS)
    accuracy = {layer: follow(answers, name) for layer, answers in texts.items()}
    return choose_layer(accuracy, {layer: broken(answers) for layer, answers in texts.items()})


def formats(lab: Lab, vectors: dict[str, SteeringVector]) -> tuple[Table, dict[str, list[str]]]:
    """Answers that have a format, by `to_target` (the paper's Figure 3), and the steered texts.

    As in the paper the layer is chosen for questions without and with the instruction apart.
    """
    table, steered = {}, {}
    for name, vector in vectors.items():
        layer = best_layer(lab.model, lab.questions("validation"), vector, name)
        layer_asked = best_layer(lab.model, lab.ask("validation", name), vector, name)
        ways, steered[name] = unasked(lab, lab.model, lab.answers, name, vector, layer)
        settings = {"asked": [], "both": to_target(vector, layer_asked)}
        texts = sweep(lab.model, lab.ask("test", name), settings, **OPTIONS)
        ways |= {way: follow(answers, name) for way, answers in texts.items()}
        table[name] = {**ways, "layer": layer, "layer if asked": layer_asked}
    return table, steered


def unasked(
    lab: Lab,
    model: LanguageModel,
    answers: list[str],
    name: str,
    vector: SteeringVector,
    layer: int | None,
) -> tuple[dict[str, float], list[str]]:
    """Answers without the instruction that have a format, and the steered texts.

    answers: the model's own, without steering.
    """
    settings = {way: to_target(v, layer) for way, v in enumerate(lab.random(vector))}
    settings["steered"] = to_target(vector, layer)
    texts = sweep(model, lab.questions("test"), settings, **OPTIONS)
    ways = {
        "neither": follow(answers, name),
        "steered": follow(texts["steered"], name),
        "random": statistics.mean(follow(texts[draw], name) for draw in DRAWS),
    }
    return ways, texts["steered"]


def brevity(lab: Lab) -> tuple[Table, list[str]]:
    """Mean words of an answer against the weight of `add` in norms, and the last weight's texts.

    The layer is the one at which validation answers get shorter at most of the steps, and of those
    the one at which they end shortest.
    """
    vector = lab.vector("brief")
    tried = {(l, w): add(vector, l, w) for l in layers(lab.model)[1:] for w in WEIGHTS}
    texts = sweep(lab.model, lab.questions("validation"), tried, **OPTIONS)

    def rank(layer: int) -> tuple[int, float]:
        words = [mean_words(texts[layer, weight]) for weight in WEIGHTS]
        return sum(b < a for a, b in pairwise(words)), -words[-1]

    layer = max(layers(lab.model)[1:], key=rank)
    used = {"steered": vector} | dict(enumerate(lab.random(vector)))
    settings = {(way, w): add(v, layer, w) for way, v in used.items() for w in WEIGHTS[1:]}
    texts = sweep(lab.model, lab.questions("test"), settings, **OPTIONS)
    texts |= {(way, WEIGHTS[0]): lab.answers for way in used}
    words = {setting: mean_words(answers) for setting, answers in texts.items()}
    table = {
        "steered": {f"{w:g}": words["steered", w] for w in WEIGHTS},
        "random": {f"{w:g}": statistics.mean(words[d, w] for d in DRAWS) for w in WEIGHTS},
    }
    table = {way: row | {"layer": layer} for way, row in table.items()}
    return table, texts["steered", WEIGHTS[-1]]


def words(lab: Lab) -> Table:
    """Answers that hold a word: put in, or kept out in two ways (the paper's section on words).

    Put in is a word that the topic does not suggest, kept out the one that it suggests most.
    """
    names = lab.tasks["words"]
    vectors = {kind: {w: lab.vector(kind, w) for w in names} for kind in ("include", "avoid")}

    def foreign(part: str) -> list[str]:
        others = [[w for w in names if w not in task["likely"]] for task in lab.tasks[part]]
        return [w[i % len(w)] for i, w in enumerate(others)]

    def likely(part: str) -> list[str]:
        return [task["likely"][0] for task in lab.tasks[part]]

    return {
        "put in": steer_words(lab, "include", vectors["include"], 1, foreign),
        "kept out by -include": steer_words(lab, "avoid", vectors["include"], -1, likely),
        "kept out by avoid": steer_words(lab, "avoid", vectors["avoid"], 1, likely),
    }


def steer_words(
    lab: Lab,
    wish: str,
    vectors: dict[str, SteeringVector],
    sign: int,
    choose: Callable[[str], list[str]],
) -> dict[str, Any]:
    """One way to "include" or "avoid" words: each prompt by its word's vector, times `sign`.

    choose: part of the tasks -> a word for each question. Layer and weight, in norms, are those
    that fulfil the wish most often on validation questions.
    """

    def rows(part: str, layer: int, weight: float, draw: int | None = None) -> list[list[Edit]]:
        used = [vectors[word] for word in choose(part)]
        used = used if draw is None else [lab.random(v)[draw] for v in used]
        return [add(v, layer, sign * weight) for v in used]

    tried = [(layer, weight) for layer in layers(lab.model)[1:] for weight in WEIGHTS[2:]]
    settings = {setting: rows("validation", *setting) for setting in tried}
    texts = sweep(lab.model, lab.questions("validation"), settings, **OPTIONS)
    held = {setting: hold(choose("validation"), answers) for setting, answers in texts.items()}
    done = {s: rate if wish == "include" else 100 - rate for s, rate in held.items()}
    layer, weight = choose_layer(done, {s: broken(answers) for s, answers in texts.items()})

    settings = {draw: rows("test", layer, weight, draw) for draw in DRAWS}
    settings["steered"] = rows("test", layer, weight)
    chosen, texts = choose("test"), sweep(lab.model, lab.questions("test"), settings, **OPTIONS)
    asked = lab.model.complete(lab.ask("test", wish, words=chosen), **OPTIONS)
    return {
        "neither": hold(chosen, lab.answers),
        "steered": hold(chosen, texts["steered"]),
        "random": statistics.mean(hold(chosen, texts[draw]) for draw in DRAWS),
        "asked": hold(chosen, asked),
        "layer": layer,
        "weight": sign * weight,
    }


def two_at_once(
    lab: Lab, vectors: dict[str, SteeringVector], alone: dict[str, int | None]
) -> Table:
    """Answers that have two formats, by two edits, each at its layer `alone`, or by the sum.

    Which of them, and the sum's layer, is what gives both most often on validation questions.
    """
    table = {}
    for names in BOTH:
        pair = [vectors[name] for name in names]
        controls = zip(*map(lab.random, pair), strict=True)
        choices = [tuple(alone[name] for name in names), *layers(lab.model)[1:]]
        tried = {choice: both(pair, choice) for choice in choices}
        texts = sweep(lab.model, lab.questions("validation"), tried, **OPTIONS)
        choice = max(choices, key=lambda choice: follow(texts[choice], *names))
        settings = {draw: both(control, choice) for draw, control in enumerate(controls)}
        settings["steered"] = both(pair, choice)
        texts = sweep(lab.model, lab.questions("test"), settings, **OPTIONS)
        asked = lab.model.complete(lab.ask("test", *names), **OPTIONS)
        table[" + ".join(names)] = {
            "neither": follow(lab.answers, *names),
            "steered": follow(texts["steered"], *names),
            "random": statistics.mean(follow(texts[draw], *names) for draw in DRAWS),
            "asked": follow(asked, *names),
            "layers": f"sum at {choice}" if isinstance(choice, int) else "{}, {}".format(*choice),
        }
    return table


def both(pair: Sequence[SteeringVector], layers: int | tuple[int, int]) -> list[Edit]:
    """Two vectors each at its own layer, or their sum at one."""
    if isinstance(layers, int):
        return to_target(pair[0] + pair[1], layers)
    return [edit for v, layer in zip(pair, layers, strict=True) for edit in to_target(v, layer)]


def transfer(lab: Lab, vectors: dict[str, SteeringVector]) -> Table:
    """Formats of tiny-base, which never saw an instruction, by tiny-instruct's vectors."""
    table = {}
    for name, vector in vectors.items():
        layer = best_layer(lab.base_model, lab.questions("validation"), vector, name)
        ways, _ = unasked(lab, lab.base_model, lab.base_answers, name, vector, layer)
        table[name] = {**ways, "layer": layer}
    return table
