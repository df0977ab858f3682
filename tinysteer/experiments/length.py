"""Length: words by the weight of conciseness or verbosity, and numbers of sentences (paper, 4)."""

import functools
from collections.abc import Sequence
from statistics import median

from tinysteer.evaluation.checks import sentences
from tinysteer.experiments.intervals import mean, share
from tinysteer.experiments.presets import preset
from tinysteer.experiments.report import Findings, Table
from tinysteer.experiments.study import Ask, Study
from tinysteer.experiments.texts import (
    built_in,
    in_turn,
    read_requests,
    requests,
    sentences_wordings,
)
from tinysteer.extraction import extract, mean_residuals
from tinysteer.steering.edits import Edit
from tinysteer.steering.vectors import SteeringVector

CLASSES = {"concise": "extra short", "verbose": "extra verbose"}
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the vector's norm: the sweep where the paper has none
SENTENCES = range(1, 6)
DEPTH = 3 / 8  # of the model: layer 12 of 32
TOKENS = 1024
RELATIONS = {
    "at most": lambda n, limit: n <= limit,
    "exactly": lambda n, limit: n == limit,
    "at least": lambda n, limit: n >= limit,
}


class Lengths:
    """The vectors of length, and how much of them to add at which layer."""

    def __init__(self, study: Study):
        self.study, self.known = study, preset(study.model.name)
        model = study.source or study.model
        given, depth = study.settings.layer, model.config.n_layers
        self.layer = (
            int(DEPTH * depth) if self.known.length_layer is None else self.known.length_layer
        )
        self.layer = self.layer if given is None else given
        self.base = requests("pairs")
        size = study.settings.batch_size
        self.plain = functools.cache(lambda: mean_residuals(model, self.base, batch_size=size))
        self.vectors = {
            name: self._vector(in_turn(self.base, built_in()["length"][wordings]), name)
            for name, wordings in CLASSES.items()
        }

    def _vector(self, asked: Sequence[str], name: str) -> SteeringVector:
        model, size = self.study.source or self.study.model, self.study.settings.batch_size
        return self.study.vector(
            f"{name} of {model.name}",
            lambda: extract(model, asked, self.plain(), name=name, batch_size=size),
        )

    def of_sentences(self, n: int) -> SteeringVector:
        """The vector of "exactly n sentences"."""
        return self._vector(in_turn(self.base, sentences_wordings("exactly", n)), f"{n} sentences")

    def sweep(self, vector: SteeringVector) -> list[float]:
        """Weights: those given, the paper's, or shares of the vector's norm."""
        weights = self.study.settings.weights or self.known.length_sweep
        return list(weights or (part * vector.at(self.layer).norm for part in SHARES))

    def weight(self, vector: SteeringVector) -> float:
        """For numbers of sentences: the paper's 20, or in other models half the norm."""
        if self.known.length_layer is not None:
            return self.known.length_weight
        return 0.5 * vector.at(self.layer).norm

    def edits(self, vector: SteeringVector, weight: float) -> list[Edit]:
        if not weight:
            return []
        return [vector.at(self.layer).add(weight=weight, where=self.study.settings.where)]


def run(study: Study) -> Findings:
    file = study.settings.prompts
    prompts = (read_requests(file) if file else requests("test"))[: study.settings.limit]
    lengths = Lengths(study)
    words, histograms = sweep(study, lengths, prompts)
    notes = [
        f"Vectors are added at layer {lengths.layer}. The prompt of a sweep says nothing of length."
    ]
    tables = [words, *constraints(study, lengths, prompts)]
    return Findings(tables, notes, {"words": histograms})


def sweep(study: Study, lengths: Lengths, prompts: Sequence[str]) -> tuple[Table, dict]:
    """Words of answers by weight."""
    arms = []
    for name, vector in lengths.vectors.items():
        control = vector.random_like(name)
        for weight in lengths.sweep(vector):
            arms.append((name, weight, vector))
            if weight:
                arms.append((f"{name}, random", weight, control))
    asks = [
        Ask(prompt, lengths.edits(vector, weight), {"arm": name, "weight": weight, "row": i})
        for name, weight, vector in arms
        for i, prompt in enumerate(prompts)
    ]
    texts = study.answer(asks, study.settings.max_new_tokens or TOKENS)
    table, counts = Table("Words of an answer, by the weight that is added"), {}
    for a, (name, weight, _) in enumerate(arms):
        found = [len(t.split()) for t in texts[a * len(prompts) : (a + 1) * len(prompts)]]
        counts[f"{name} {weight:.3g}"] = found
        table.rows.append(
            {"": name, "weight": float(weight), "mean": mean(found), "median": median(found)}
        )
    return table, counts


def constraints(study: Study, lengths: Lengths, prompts: Sequence[str]) -> list[Table]:
    """Numbers of sentences, asked for in the prompt, unsteered, steered, and at random."""
    exact = {n: lengths.of_sentences(n) for n in SENTENCES}
    vectors = {
        "at most": dict.fromkeys(SENTENCES, lengths.vectors["concise"]),
        "exactly": exact,
        "at least": dict.fromkeys(SENTENCES, lengths.vectors["verbose"]),
    }
    asks, places = [], []
    for relation in RELATIONS:
        for n in SENTENCES:
            vector = vectors[relation][n]
            arms = {
                "unsteered": [],
                "steered": lengths.edits(vector, lengths.weight(vector)),
                "random": lengths.edits(control(vector, relation, n), lengths.weight(vector)),
            }
            asked = in_turn(prompts, sentences_wordings(relation, n))
            for arm, edits in arms.items():
                for i, prompt in enumerate(asked):
                    labels = {"relation": relation, "n": n, "arm": arm, "row": i}
                    asks.append(Ask(prompt, edits, labels))
                    places.append((relation, n, arm))
    texts = study.answer(asks, study.settings.max_new_tokens or TOKENS)
    hits: dict[tuple[str, int, str], list[bool]] = {}
    for (relation, n, arm), text in zip(places, texts, strict=True):
        hits.setdefault((relation, n, arm), []).append(has_sentences(text, relation, n))
    arms = ("unsteered", "steered", "random")
    each = [
        {"": f"{relation} {n}"} | {arm: share(hits[relation, n, arm]) for arm in arms}
        for relation in RELATIONS
        for n in SENTENCES
    ]
    # Of all n together a prompt counts once, with its share: its five answers are not independent.
    whole = [
        {"": relation}
        | {
            arm: mean(
                [
                    100 * sum(answers) / len(answers)
                    for answers in zip(*(hits[relation, n, arm] for n in SENTENCES), strict=True)
                ]
            )
            for arm in arms
        }
        for relation in RELATIONS
    ]
    return [
        Table(f"Percent of the number of sentences asked for, n = 1 to {SENTENCES[-1]}", whole),
        Table("Percent by number", each),
    ]


def has_sentences(text: str, relation: str, n: int) -> bool:
    return bool(text.strip()) and RELATIONS[relation](len(sentences(text)), n)


def control(vector: SteeringVector, relation: str, n: int) -> SteeringVector:
    return vector.random_like(f"{relation} {n}")
