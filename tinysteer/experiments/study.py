"""A run of one experiment on one model: prompts are asked, answered, and folded by their labels.

answers.jsonl has a line for every answer, written by whole batches. A run that was stopped finds
there what it has and goes on with the same batches, so it ends with the same answers.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from tinysteer.evaluation.quality import perplexity
from tinysteer.evaluation.selection import LOW_PERPLEXITY, choose_layer
from tinysteer.experiments.texts import SETTINGS, Item, corpus_for
from tinysteer.extraction import MeanResiduals, extract, mean_residuals
from tinysteer.language_model import LanguageModel
from tinysteer.steering.edits import Edit, Where
from tinysteer.steering.vectors import SteeringVector
from tinysteer.version import VERSION

LAYOUT = 2  # of a run's folder: raised where a version can't go on with an older one's answers
PROGRESS = "{desc}: {n_fmt} of {total_fmt} answers, {elapsed} so far, {remaining} left"
Edits = Callable[[str, int], list[Edit]]  # of a setting, and a row of the items
RandomEdits = Callable[[bool, str, int], list[Edit]]  # likewise, by random directions or not


@dataclass(frozen=True)
class Settings:
    """What a run may choose. None: as the corpus (the paper) or each experiment has it."""

    limit: int | None = None  # test prompts, at most
    layers: dict[str, dict[str, int | None]] = field(default_factory=dict)  # setting, instruction
    layer: int | None = None  # for all that is added with a weight
    weights: tuple[float, ...] | None = None  # to sweep; the paper's are absolute
    where: Where | None = None
    validation: int = 8  # prompts an instruction to choose its layer by
    step: int | None = None  # between the layers that are tried
    max_new_tokens: int | None = None
    validation_tokens: int | None = None
    batch_size: int = 32
    prompts: str | None = None  # JSONL files in place of the built-in texts
    pairs: str | None = None

    def __post_init__(self):
        counts = "limit validation step max_new_tokens validation_tokens batch_size"
        for name in counts.split():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be 1 or more")
        if self.layers and set(self.layers) != {*SETTINGS}:
            raise ValueError("layers: give those of each setting, w/o and w/, by instruction")
        for file in (self.prompts, self.pairs):
            if file and not Path(file).is_file():
                raise FileNotFoundError(f"there is no file {file}")


@dataclass(frozen=True)
class Ask:
    """One prompt, its edits, labels that name it among all others, and what its answer shows."""

    prompt: str
    edits: Sequence[Edit] = ()
    labels: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[str], Any] = str

    def digest(self, max_new_tokens: int) -> str:
        """Of all that decides the answer, but for the model. The labels are no part of it."""
        edits = [(edit.layer, *edit.move, edit.direction.tolist()) for edit in self.edits]
        text = json.dumps([self.prompt, edits, max_new_tokens])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def always(edits: list[Edit]) -> Edits:
    return lambda setting, row: edits


def arms_of(edits: RandomEdits) -> dict[str, Edits]:
    """The three of every test."""
    own, random = partial(edits, False), partial(edits, True)
    return {"unsteered": always([]), "steered": own, "random": random}


def crossed(
    items: Sequence[Item], arms: Mapping[Any, Edits], settings: Iterable[str] = SETTINGS, **labels
) -> list[Ask]:
    """Every item in every setting under every arm, and whether its answer follows it."""
    return [
        Ask(
            getattr(item, SETTINGS[setting]),
            edits(setting, row),
            {"setting": setting, "arm": arm, "instruction": item.instruction, "row": row} | labels,
            item.followed,
        )
        for setting in settings
        for arm, edits in arms.items()
        for row, item in enumerate(items)
    ]


def fold(labels: Iterable[Mapping[str, Any]], values: Iterable, *by: str) -> dict[tuple, list]:
    """Values by what their labels say."""
    groups: dict[tuple, list] = {}
    for own, value in zip(labels, values, strict=True):
        groups.setdefault(tuple(own[name] for name in by), []).append(value)
    return groups


class Answers(dict[str, str]):
    """A run's answers by their digests, in its folder behind a header that says what it is."""

    def __init__(self, out: Path, about: Mapping[str, Any]):
        out.mkdir(parents=True, exist_ok=True)
        self.file, finished = out / "answers.jsonl", (out / "summary.json").exists()
        about = json.loads(json.dumps({"layout": LAYOUT} | about))  # as it is read again
        text = self.file.read_bytes() if self.file.exists() else b""  # a line cut short is dropped
        if text and not text.startswith((b'{"layout": ', b'{"experiment": ')):
            raise ValueError(f"{self.file} is not a run's: choose another --out, or move it away")
        header, *rows = map(json.loads, text[: text.rfind(b"\n") + 1].splitlines() or [b"{}"])
        changed = sorted(k for k in about if header.get(k) != about[k])
        if changed and (rows or finished):
            what = f"another run ({', '.join(changed)} differ)"
            if header.get("layout") != LAYOUT:
                what = "a run of an older tinysteer, which this one can't go on with"
            raise ValueError(f"{out} holds {what}: choose another --out, or delete it")
        if changed and text:  # and nothing was answered: a run that failed locks no folder
            for vector in (out / "vectors").glob("*.safetensors"):
                vector.unlink()
        whole = as_lines([about, *rows]).encode()
        if whole != text:
            self.file.write_bytes(whole)
        super().__init__({row["digest"]: row["answer"] for row in rows})

    def add(self, texts: Mapping[str, str], asks: Mapping[str, Sequence[Ask]]) -> None:
        """New answers by their digests; asks: who asked for each."""
        rows = []
        for digest, text in texts.items():
            row = {"digest": digest, "for": [ask.labels for ask in asks[digest]]}
            rows.append(row | {"prompt": asks[digest][0].prompt, "answer": text})
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(as_lines(rows))
        self.update(texts)


def as_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@dataclass(eq=False)
class Study:
    """A model, settings and a folder; `tally` is how an experiment asks."""

    experiment: str
    model: LanguageModel
    out: Path
    settings: Settings
    reader: LanguageModel | None = None
    source: LanguageModel | None = None

    def __post_init__(self):
        self.vectors: dict[str, SteeringVector] = {}
        self.means: dict[tuple, MeanResiduals] = {}
        self.said: list[tuple[Ask, str]] = []  # test answers
        model, source = self.model, self.source or self.model
        self.corpus = corpus_for(model, source)
        defaults, n_layers = self.corpus.defaults.items(), model.config.n_layers
        taken = {name: value for name, value in defaults if getattr(self.settings, name) is None}
        self.settings = replace(self.settings, **taken)
        told = [layer for layers in self.settings.layers.values() for layer in layers.values()]
        for layer in [*told, self.settings.layer]:
            if layer is not None and not 0 <= layer < n_layers:
                raise ValueError(f"layer {layer}: this model has layers 0 to {n_layers - 1}")
        if (n_layers, model.config.dim) != (source.config.n_layers, source.config.dim):
            raise ValueError(f"{source.name} is of another shape than {model.name}: no vectors fit")
        self.about = {
            "experiment": self.experiment,
            "model": model.name,
            "revision": model.revision or fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "source": self.source and [source.name, source.revision or fingerprint(source)],
            "reader": self.reader and self.reader.name,
            "settings": asdict(self.settings),
            "tinysteer": VERSION,
        }
        self.answers = Answers(self.out, self.about)
        self.notes = list(self.corpus.notes)
        if self.notes and taken:
            told = ", ".join(f"{name} {value}" for name, value in taken.items())
            self.notes.append(f"As these models need it, unless the command says: {told}.")

    def vector(self, name: str, make: Callable[[], SteeringVector]) -> SteeringVector:
        """A vector, made once: a run that goes on takes the very same."""
        if name not in self.vectors:
            file = self.out / "vectors" / (re.sub(r"\W+", "-", name) + ".safetensors")
            if not file.exists():
                file.parent.mkdir(exist_ok=True)
                unfinished = file.with_suffix(".new")
                make().save(unfinished)
                unfinished.replace(file)
            self.vectors[name] = SteeringVector.load(file)
        return self.vectors[name]

    def extract(
        self, model: LanguageModel, name: str, asked: Sequence[str], requests: Sequence[str]
    ) -> SteeringVector:
        """A vector of a model: requests with an instruction against the same without."""
        size = self.settings.batch_size
        return self.vector(
            f"{name} of {model.name}",
            lambda: extract(model, asked, self.plain(model, requests), name=name, batch_size=size),
        )

    def plain(self, model: LanguageModel, requests: Sequence[str]) -> MeanResiduals:
        """What requests leave in a model, run once: instructions may share them."""
        key, size = (id(model), *requests), self.settings.batch_size
        if key not in self.means:
            self.means[key] = mean_residuals(model, requests, batch_size=size)
        return self.means[key]

    def added(self, vector: SteeringVector, layer: int, weight: float) -> list[Edit]:
        """Nothing for a weight of 0."""
        return [vector.at(layer).add(weight=weight, where=self.settings.where)] if weight else []

    def tally(self, asks: Sequence[Ask], max_new_tokens: int, *by: str) -> dict[tuple, list]:
        """What is seen in test answers, by labels. The settings' limit of tokens comes first."""
        texts = self.answer(asks, self.settings.max_new_tokens or max_new_tokens)
        self.said += zip(asks, texts, strict=True)
        seen = [ask.check(text) for ask, text in zip(asks, texts, strict=True)]
        return fold([ask.labels for ask in asks], seen, *by)

    def choose(self, asks: Sequence[Ask], *by: str) -> tuple[dict, list[dict]]:
        """Arms by the paper's rule (section 2) -> each group's, and what every arm did.

        by: labels that part the groups; an arm is a choice, None the unsteered one. Spoilt is a
        text of a perplexity below LOW_PERPLEXITY to the reader: it repeats itself. The paper's
        reader is GPT-2, no family of ours, and allows none. Without a reader the model reads its
        own texts, finds most of them likely, and as many may be spoilt as unsteered.
        """
        texts = self.answer(asks, self.settings.validation_tokens)
        values = perplexity(self.reader or self.model, texts, batch_size=self.settings.batch_size)
        labels, names, chosen = [ask.labels for ask in asks], (*by, "arm"), {}
        hits = [ask.check(text) for ask, text in zip(asks, texts, strict=True)]
        spoilt = fold(labels, [value < LOW_PERPLEXITY for value in values], *names)
        rows = [
            dict(zip(names, key, strict=True), accuracy=fmean(own), spoilt=fmean(spoilt[key]))
            for key, own in fold(labels, hits, *names).items()
        ]
        for group, some in fold(rows, rows, *by).items():
            accuracy, low = ({row["arm"]: row[k] for row in some} for k in ("accuracy", "spoilt"))
            chosen[group] = choose_layer(accuracy, low, 0.0 if self.reader else low[None])
        return chosen, rows

    def answer(self, asks: Sequence[Ask], max_new_tokens: int) -> list[str]:
        """One answer each, greedy, in batches of prompts of like length. The same is asked once."""
        if not asks:
            return []
        ids, size = self.model.tokenizer.ids, self.settings.batch_size
        longest = max(len(ids(prompt)) for prompt in {ask.prompt for ask in asks})
        room = self.model.config.context_length - longest
        if room < max_new_tokens:
            self.notes.append(f"The context leaves room for {room} new tokens at most.")
        tokens = max(min(room, max_new_tokens), 1)
        digests, same = [ask.digest(tokens) for ask in asks], {}
        for digest, ask in zip(digests, asks, strict=True):
            same.setdefault(digest, []).append(ask)
        order, known = sorted(same, key=lambda digest: len(same[digest][0].prompt)), self.answers
        bar = {"total": len(order), "initial": len(same.keys() & known), "bar_format": PROGRESS}
        with tqdm(desc=self.experiment, leave=False, disable=None, **bar) as progress:
            for batch in (order[i : i + size] for i in range(0, len(order), size)):
                # Of a batch that was cut short the first answers stay: others may rest on them.
                if new := [digest for digest in batch if digest not in known]:
                    prompts = [same[digest][0].prompt for digest in batch]
                    edits = [list(same[digest][0].edits) for digest in batch]
                    limits = {"max_new_tokens": tokens, "batch_size": size}
                    texts = self.model.complete(prompts, edits, **limits)
                    texts = dict(zip(batch, texts, strict=True))
                    known.add({digest: texts[digest] for digest in new}, same)
                    progress.update(len(new))
        return [known[digest] for digest in digests]


def fingerprint(model: LanguageModel) -> str:
    """Of some of the weights: a folder's name does not tell two models from each other."""
    weights = [p.flatten()[:: max(p.numel() // 8, 1)].tolist() for p in model.decoder.parameters()]
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest()[:16]
