"""Length: words by the weight of conciseness or verbosity, and numbers of sentences (paper, 4)."""

from collections.abc import Sequence
from functools import partial
from itertools import product
from statistics import fmean, median

from tinysteer.evaluation.checks import sentences
from tinysteer.evaluation.selection import sweep_layers
from tinysteer.experiments.intervals import Estimate, mean, share
from tinysteer.experiments.presets import preset
from tinysteer.experiments.report import Findings, Table
from tinysteer.experiments.study import Ask, Study, Trial
from tinysteer.experiments.texts import in_turn, read_requests
from tinysteer.steering.edits import Edit
from tinysteer.steering.vectors import SteeringVector

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the vector's norm: the sweep where the paper has none
MORE_SHARES = (0.0, 0.5, 0.75, 1.0, 1.25, 1.5)  # where all is tried
SENTENCES = range(1, 6)
ARMS = ("unsteered", "steered", "random")
OF_RELATION = {"at most": "concise", "at least": "verbose"}  # "exactly" has one for each number
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
        told = [L for L in (study.settings.layer, self.known.length_layer) if L is not None]
        self.layer = told[0] if told else self._choose()

    def vector(self, name: str, wordings: Sequence[str]) -> SteeringVector:
        study, requests = self.study, self.study.corpus.texts("pairs")
        model, asked = study.source or study.model, in_turn(requests, wordings)
        return study.extract(model, name, asked, requests)

    def _choose(self) -> int:
        """As deep as the paper's; where all is tried, that of the shortest validation answers."""
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
        norm = vector.at(self.layer).norm
        return list(dict.fromkeys(weights or [part * norm for part in shares]))

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
    trials = []
    for name, vector in lengths.vectors.items():
        control = vector.random_like(name)
        for weight in lengths.sweep(vector):
            arms = {name: vector} | ({f"{name}, random": control} if weight else {})
            for arm, used in arms.items():
                steer = lengths.edits(used, weight)
                for i, prompt in enumerate(prompts):
                    labels = {"arm": arm, "weight": weight, "row": i}
                    trials.append(Trial(arm, weight, Ask(prompt, steer, labels), n_words))
    table, counts = Table("Words of an answer, by the weight that is added"), {}
    words = study.tally(trials, TOKENS)
    for arm, weight in dict.fromkeys((trial.group, trial.choice) for trial in trials):
        numbers = counts[f"{arm} {weight:.3g}"] = words[arm][weight]
        cells = {"mean": mean(numbers), "median": median(numbers)}
        table.rows.append({"": arm, "weight": float(weight)} | cells)
    return table, counts


def constraints(study: Study, lengths: Lengths, prompts: Sequence[str]) -> list[Table]:
    """Numbers of sentences, asked for in the prompt, unsteered, steered, and at random."""
    trials = []
    for relation, n in product(RELATIONS, SENTENCES):
        wordings = study.corpus.sentences_wordings(relation, n)
        vector = lengths.vectors.get(OF_RELATION.get(relation))
        vector = vector or lengths.vector(f"{n} sentences", wordings)
        weight, control = lengths.weight(vector), vector.random_like(f"{relation} {n}")
        edits = [], lengths.edits(vector, weight), lengths.edits(control, weight)
        check = partial(has_sentences, relation=relation, n=n)
        for arm, steer in zip(ARMS, edits, strict=True):
            for i, prompt in enumerate(in_turn(prompts, wordings)):
                labels = {"relation": relation, "n": n, "arm": arm, "row": i}
                trials.append(Trial((relation, n), arm, Ask(prompt, steer, labels), check))
    hits = study.tally(trials, TOKENS)

    def of_all_numbers(relation: str, arm: str) -> Estimate:
        """A prompt counts once, with its share: its five answers are not independent."""
        answers = zip(*(hits[relation, n][arm] for n in SENTENCES), strict=True)
        return mean([100 * sum(row) / len(row) for row in answers])

    whole = [{"": r} | {arm: of_all_numbers(r, arm) for arm in ARMS} for r in RELATIONS]
    each = [
        {"": f"{relation} {n}"} | {arm: share(hits[relation, n][arm]) for arm in ARMS}
        for relation, n in product(RELATIONS, SENTENCES)
    ]
    return [
        Table(f"Percent of the number of sentences asked for, n = 1 to {SENTENCES[-1]}", whole),
        Table("Percent by number", each),
    ]


def n_words(text: str) -> int:
    return len(text.split())


def has_sentences(text: str, relation: str, n: int) -> bool:
    return bool(text.strip()) and RELATIONS[relation](len(sentences(text)), n)
