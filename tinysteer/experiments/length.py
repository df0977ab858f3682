"""Length: words by the weight of conciseness or verbosity, and numbers of sentences (paper, 4)."""

from collections.abc import Sequence
from functools import partial
from itertools import product
from statistics import fmean, median

from tinysteer.evaluation.checks import sentences
from tinysteer.evaluation.selection import sweep_layers
from tinysteer.experiments.presets import preset
from tinysteer.experiments.report import Findings, Table, mean, share, table_of
from tinysteer.experiments.study import Ask, Study, always, arms_of, crossed, fold
from tinysteer.experiments.texts import Item, in_turn, read_requests
from tinysteer.steering.edits import Edit
from tinysteer.steering.vectors import SteeringVector

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the vector's norm: the sweep where the paper has none
MORE_SHARES = (0.0, 0.5, 0.75, 1.0, 1.25, 1.5)  # where all is tried
SENTENCES = range(1, 6)
OF_RELATION = {"at most": "concise", "at least": "verbose"}  # "exactly" has one for each number
DEPTH = 3 / 8  # of the model: layer 12 of 32
TOKENS = 1024
RELATIONS = {
    "at most": lambda n, limit: n <= limit,
    "exactly": lambda n, limit: n == limit,
    "at least": lambda n, limit: n >= limit,
}


def n_words(text: str) -> int:
    return len(text.split())


def has_sentences(relation: str, n: int, text: str) -> bool:
    return bool(text.strip()) and RELATIONS[relation](len(sentences(text)), n)


class Lengths:
    """The vectors of length, and how much of them to add at which layer."""

    def __init__(self, study: Study):
        source = study.source and study.source.name
        self.study, self.preset = study, preset(study.model.name, source)
        self.vectors = {name: self.vector(name, w) for name, w in study.corpus.lengths.items()}
        told = [L for L in (study.settings.layer, self.preset.length_layer) if L is not None]
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
        concise, layers = self.vectors["concise"], sweep_layers(n_layers, study.settings.step)[1:]
        texts = study.corpus.texts("validation")[: study.settings.validation]
        asks = [
            Ask(text, [concise.at(layer).add(where=study.settings.where)], {"layer": layer})
            for layer in layers
            for text in texts
        ]
        answers = study.answer(asks, study.settings.max_new_tokens or TOKENS)
        groups = fold([ask.labels for ask in asks], map(n_words, answers), "layer")
        return min(groups, key=lambda layer: fmean(groups[layer]))[0]

    def sweep(self, vector: SteeringVector) -> list[float]:
        """Weights: those given, the paper's, or shares of the vector's norm."""
        shares = MORE_SHARES if self.study.corpus.thorough else SHARES
        weights = self.study.settings.weights or self.preset.length_sweep
        norm = vector.at(self.layer).norm
        return [float(w) for w in dict.fromkeys(weights or [part * norm for part in shares])]

    def weight(self, vector: SteeringVector) -> float:
        """For numbers of sentences: the paper's, or in other models half the norm."""
        return self.preset.length_weight or 0.5 * vector.at(self.layer).norm

    def edits(self, vector: SteeringVector, weight: float) -> list[Edit]:
        return self.study.added(vector, self.layer, weight)


def sweep(study: Study, lengths: Lengths, requests: Sequence[str]) -> Table:
    """Words of answers by weight."""
    asks, rows = [], []
    for name, vector in lengths.vectors.items():
        items = [Item(text, text, name, check=n_words) for text in requests]
        control = vector.random_like(name)
        for weight in lengths.sweep(vector):
            arms = {"steered": vector, "random": control} if weight else {"unsteered": vector}
            edits = {arm: always(lengths.edits(v, weight)) for arm, v in arms.items()}
            asks += crossed(items, edits, ["w/o"], kind=name, weight=weight)
    for (kind, arm, weight), words in study.tally(asks, TOKENS, "kind", "arm", "weight").items():
        name = f"{kind}, random" if arm == "random" else kind
        rows.append({"": name, "weight": weight, "mean": mean(words), "median": median(words)})
    return {"title": "Words of an answer, by the weight that is added", "rows": rows}


def constraints(study: Study, lengths: Lengths, requests: Sequence[str]) -> list[Table]:
    """Numbers of sentences, asked for in the prompt, unsteered, steered, and at random."""
    asks: list[Ask] = []
    for relation, n in product(RELATIONS, SENTENCES):
        wordings = study.corpus.sentences_wordings(relation, n)
        vector = lengths.vectors.get(OF_RELATION.get(relation))
        vector = vector or lengths.vector(f"{n} sentences", wordings)
        weight, control = lengths.weight(vector), vector.random_like(f"{relation} {n}")
        edits = lengths.edits(vector, weight), lengths.edits(control, weight)
        arms = arms_of(lambda at_random, setting, row, edits=edits: edits[at_random])
        pairs = zip(requests, in_turn(requests, wordings), strict=True)
        check = partial(has_sentences, relation, n)
        items = [Item(*pair, relation, check=check) for pair in pairs]
        asks += crossed(items, arms, ["w/"], kind=relation, n=n)
    hits, each, whole = study.tally(asks, TOKENS, "kind", "n", "arm"), {}, {}
    for (relation, n, arm), some in hits.items():
        each[f"{relation} {n}", arm] = share(some)
        # A prompt counts once, with its share: its five answers are not independent.
        answers = zip(*(hits[relation, m, arm] for m in SENTENCES), strict=True)
        whole[relation, arm] = mean([100 * sum(row) / len(row) for row in answers])
    title = f"Percent of the number of sentences asked for, n = 1 to {SENTENCES[-1]}"
    return [table_of(title, whole), table_of("Percent by number", each)]


def run(study: Study) -> Findings:
    file = study.settings.prompts
    requests = (read_requests(file) if file else study.corpus.texts("test"))[: study.settings.limit]
    if not requests:
        raise ValueError(f"{file} holds no requests")
    lengths = Lengths(study)
    tables = [sweep(study, lengths, requests)]
    if study.corpus.sentences:
        tables += constraints(study, lengths, requests)
    note = f"Vectors are added at layer {lengths.layer}."
    return Findings(tables, [f"{note} The prompt of a sweep says nothing of length."])
