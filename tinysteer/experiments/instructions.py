"""Instructions that have a vector: pairs of requests, their vectors, and a layer for each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from tinysteer.evaluation import ifeval
from tinysteer.evaluation.selection import sweep_layers
from tinysteer.experiments.choosing import choose
from tinysteer.experiments.presets import preset
from tinysteer.experiments.study import Ask, Study, Trial
from tinysteer.experiments.texts import LANGUAGE, Item, checkable, of_instruction, read_items
from tinysteer.language_model import LanguageModel
from tinysteer.steering.edits import Edit, Where
from tinysteer.steering.vectors import SteeringVector

SETTINGS = {"w/o": "request", "w/": "prompt"}  # which text of an item is the prompt


@dataclass(frozen=True)
class Instructed:
    """An instruction's vector, and a random one of the same norms and baselines."""

    vector: SteeringVector
    control: SteeringVector

    def edits(self, layer: int | None, where: Where, control: bool = False) -> list[Edit]:
        """The projection set to the mean of those with the instruction; nothing without a layer."""
        if layer is None:
            return []
        return [(self.control if control else self.vector).at(layer).to_target(where=where)]


Vectors = Mapping[str, Instructed]  # by instruction
Layers = Mapping[str, Mapping[str, int | None]]  # by setting and instruction


def all_instructed(study: Study, model: LanguageModel) -> dict[str, Instructed]:
    """The vector of every instruction that there are pairs of."""
    pairs, _ = pairs_of(study)
    return {
        name: instructed(study, model, name, items)
        for name, items in tqdm(pairs.items(), "vectors", leave=False, disable=None)
    }


def instructed(study: Study, model: LanguageModel, name: str, items: Sequence[Item]) -> Instructed:
    requests = [item.request for item in items]
    vector = study.extract(model, name, [item.prompt for item in items], requests)
    control = study.vector(
        f"{name} of {model.name}, random",
        lambda: vector.random_like(name, study.plain(model, requests).mean),
    )
    return Instructed(vector, control)


def pairs_of(study: Study) -> tuple[dict[str, list[Item]], dict[str, list[Item]]]:
    """What vectors are made of, and what layers are validated on, by instruction.

    Of a user's pairs the last `validation` are held out where at least as many remain.
    """
    file, n = study.settings.pairs, study.settings.validation
    if not file:
        validation = of_instruction(study.corpus.format_items("validation"))
        return of_instruction(study.corpus.format_items("pairs")), head(validation, n)
    pairs = of_instruction(read_items(file))
    held = {name: items[-n:] if len(items) >= 2 * n else items for name, items in pairs.items()}
    made = {name: items[:-n] if len(items) >= 2 * n else items for name, items in pairs.items()}
    return made, head({name: checkable(items) for name, items in held.items()}, n)


def head(items: Mapping[str, Sequence[Item]], n: int) -> dict[str, list[Item]]:
    """So many of each instruction; of a language one, as in the paper."""
    return {name: list(i[: 1 if name.startswith(LANGUAGE) else n]) for name, i in items.items()}


def follows(item: Item, text: str) -> bool:
    """Loosely, as the paper counts."""
    return ifeval.follow([item.instruction_id], [item.kwargs], text, mode="loose")


def choose_layers(
    study: Study, vectors: Vectors, wanted: Sequence[str], source: str | None = None
) -> tuple[Layers, list[dict]]:
    """Layers as told, as in the paper, or by validation; and what validation saw of each.

    source: the name of the model that the vectors come from, where it is another one.
    """
    told = study.settings.layers or preset(study.model.name, source).layers
    if told:
        return {s: {name: told[s].get(name) for name in wanted} for s in SETTINGS}, []
    trials = []
    for setting, text in SETTINGS.items():
        for name, items in pairs_of(study)[1].items():
            if name not in wanted or name not in vectors:
                continue
            for layer in sweep_layers(study.model.config.n_layers, study.settings.step):
                steer = vectors[name].edits(layer, study.settings.where)
                labels = {"validation": setting, "vectors": source, "instruction": name}
                labels["layer"] = layer
                for item in items:
                    ask = Ask(getattr(item, text), steer, labels)
                    trials.append(Trial((setting, name), layer, ask, partial(follows, item)))
    chosen, rows = choose(study, trials)
    layers = {s: {name: chosen.get((s, name)) for name in wanted} for s in SETTINGS}

    def flat(group: tuple[str, str], choice: int | None, **shares: float) -> dict:
        return {"setting": group[0], "instruction": group[1], "layer": choice} | shares

    return layers, [flat(**row) for row in rows]
