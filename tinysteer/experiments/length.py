"""Length: words by the weight of conciseness or verbosity, and numbers of sentences (paper, 4)."""

from collections.abc import Sequence
from functools import partial
from statistics import fmean, median

from tinysteer.evaluation.checks import sentences
from tinysteer.evaluation.selection import sweep_layers
from tinysteer.experiments.intervals import mean, share
from tinysteer.experiments.presets import preset
from tinysteer.experiments.report import Findings, Table
from tinysteer.experiments.study import Ask, Study, Trial
from tinysteer.experiments.texts import in_turn, read_requests
from tinysteer.steering.edits import Edit
from tinysteer.steering.vectors import SteeringVector

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the vector's norm: the sweep where the paper has none
MORE_SHARES = (0.0, 0.5, 0.75, 1.0, 1.25, 1.5)  # where all is tried
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
        self.vectors = {
            name: self.vector(name, wordings) for name, wordings in study.corpus.lengths.items()
        }
        layers = (study.settings.layer, self.known.length_layer)
        layer = next((layer for layer in layers if layer is not None), None)
        self.layer = self._choose() if layer is None else layer

    def vector(self, name: str, wordings: Sequence[str]) -> SteeringVector:
        study, requests = self.study, self.study.corpus.texts("pairs")
        model, asked = study.source or study.model, in_turn(requests, wordings)
        return study.extract(model, name, asked, requests)

    def _choose(self) -> int:
        """A layer as deep as the paper's; where all is tried, that of the shortest answers.

        Those are validation answers, with the whole vector of conciseness.
        """
        study, n_layers = self.study, self.study.model.config.n_layers
        if not study.corpus.thorough:
            return int(DEPTH * n_layers)
        concise, where = self.vectors["concise"], study.settings.where
        trials = [
            Trial("", layer, Ask(text, [concise.at(layer).add(where=where)]), n_words)
            for layer in sweep_layers(n_layers, study.settings.step)[1:]
            for text in study.corpus.texts("validation")[: study.settings.validation]
        ]
        words = study.tally(trials, TOKENS)[""]
        return min(words, key=lambda layer: fmean(words[layer]))

    def sweep(self, vector: SteeringVector) -> list[float]:
        """Weights: those given, the paper's, or shares of the vector's norm."""
        shares = MORE_SHARES if self.study.corpus.thorough else SHARES
        weights = self.study.settings.weights or self.known.length_sweep
        return list(weights or (part * vector.at(self.layer).norm for part in shares))

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
    prompts = (read_requests(file) if file else study.corpus.texts("test"))[: study.settings.limit]
    lengths = Lengths(study)
    words, histograms = sweep(study, lengths, prompts)
    notes = [
        f"Vectors are added at layer {lengths.layer}. The prompt of a sweep says nothing of length."
    ]
    counted = constraints(study, lengths, prompts) if study.corpus.sentences else []
    return Findings([words, *counted], notes, {"words": histograms})


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
        found = [n_words(text) for text in texts[a * len(prompts) : (a + 1) * len(prompts)]]
        counts[f"{name} {weight:.3g}"] = found
        table.rows.append(
            {"": name, "weight": float(weight), "mean": mean(found), "median": median(found)}
        )
    return table, counts


def constraints(study: Study, lengths: Lengths, prompts: Sequence[str]) -> list[Table]:
    """Numbers of sentences, asked for in the prompt, unsteered, steered, and at random."""
    exact = {
        n: lengths.vector(f"{n} sentences", study.corpus.sentences_wordings("exactly", n))
        for n in SENTENCES
    }
    vectors = {
        "at most": dict.fromkeys(SENTENCES, lengths.vectors["concise"]),
        "exactly": exact,
        "at least": dict.fromkeys(SENTENCES, lengths.vectors["verbose"]),
    }
    trials = []
    for relation in RELATIONS:
        for n in SENTENCES:
            vector = vectors[relation][n]
            arms = {
                "unsteered": [],
                "steered": lengths.edits(vector, lengths.weight(vector)),
                "random": lengths.edits(control(vector, relation, n), lengths.weight(vector)),
            }
            asked = in_turn(prompts, study.corpus.sentences_wordings(relation, n))
            check = partial(has_sentences, relation=relation, n=n)
            for arm, edits in arms.items():
                for i, prompt in enumerate(asked):
                    labels = {"relation": relation, "n": n, "arm": arm, "row": i}
                    trials.append(Trial((relation, n), arm, Ask(prompt, edits, labels), check))
    hits = study.tally(trials, TOKENS)
    arms = ("unsteered", "steered", "random")
    each = [
        {"": f"{relation} {n}"} | {arm: share(hits[relation, n][arm]) for arm in arms}
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
                    for answers in zip(*(hits[relation, n][arm] for n in SENTENCES), strict=True)
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


def n_words(text: str) -> int:
    return len(text.split())


def has_sentences(text: str, relation: str, n: int) -> bool:
    return bool(text.strip()) and RELATIONS[relation](len(sentences(text)), n)


def control(vector: SteeringVector, relation: str, n: int) -> SteeringVector:
    return vector.random_like(f"{relation} {n}")
