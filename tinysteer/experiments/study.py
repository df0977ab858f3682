"""A run of one experiment on one model: answers kept as they come, in a folder that can be resumed.

answers.jsonl has a line for every answer, written by whole batches. A run that was stopped finds
there what it has and goes on with the same batches, so it ends with the same answers.
"""

import hashlib
import json
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from tinysteer.experiments.corpus import corpus_for
from tinysteer.extraction import MeanResiduals, extract, mean_residuals
from tinysteer.language_model import LanguageModel
from tinysteer.steering.edits import Edit, Where
from tinysteer.steering.vectors import SteeringVector
from tinysteer.version import VERSION


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
        for name in ("limit", "validation", "step", "validation_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be 1 or more")
        if self.layers and set(self.layers) != {"w/o", "w/"}:
            raise ValueError("layers: give those of each setting, w/o and w/, by instruction")


@dataclass(frozen=True)
class Ask:
    """One prompt, its edits, and what the answer is for: labels that name it among all others."""

    prompt: str
    edits: Sequence[Edit] = ()
    labels: dict[str, Any] = field(default_factory=dict)

    def digest(self, max_new_tokens: int) -> str:
        """Of all that decides the answer, but for the model. The labels are no part of it."""
        edits = [(edit.layer, *edit.move, edit.direction.tolist()) for edit in self.edits]
        text = json.dumps([self.prompt, edits, max_new_tokens])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Trial(NamedTuple):
    """One prompt under one choice, and what is to be seen in its answer."""

    group: Hashable
    choice: Any  # a layer, a layer and a weight, the name of an arm; None: unsteered
    ask: Ask
    check: Callable[[str], Any]


def check_layers(settings: Settings, n_layers: int) -> None:
    """ValueError for a layer that the model has not."""
    given = [layer for layers in settings.layers.values() for layer in layers.values()]
    for layer in [*given, settings.layer]:
        if layer is not None and not 0 <= layer < n_layers:
            raise ValueError(f"layer {layer}: this model has layers 0 to {n_layers - 1}")


def fingerprint(model: LanguageModel) -> str:
    """Of some of the weights: a folder's name does not tell two models from each other."""
    weights = [p.flatten()[:: max(p.numel() // 8, 1)].tolist() for p in model.decoder.parameters()]
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest()[:16]


class Study:
    """A model, settings and a folder; `answer` is how an experiment asks."""

    def __init__(
        self,
        experiment: str,
        model: LanguageModel,
        out: Path,
        settings: Settings,
        reader: LanguageModel | None = None,
        source: LanguageModel | None = None,
    ):
        self.corpus = corpus_for(model, source or model)
        defaults = self.corpus.defaults.items()
        taken = {name: value for name, value in defaults if getattr(settings, name) is None}
        self.experiment, self.model, self.settings = experiment, model, replace(settings, **taken)
        self.reader, self.source, self.out = reader, source, out
        check_layers(settings, model.config.n_layers)
        sizes = [(m.config.n_layers, m.config.dim) for m in (model, source or model)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{source.name} is of another shape than {model.name}: no vectors fit")
        out.mkdir(parents=True, exist_ok=True)
        self.file = out / "answers.jsonl"
        about = {
            "experiment": experiment,
            "model": model.name,
            "revision": model.revision or fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "source": source and [source.name, source.revision or fingerprint(source)],
            "reader": reader and reader.name,
            "settings": asdict(self.settings),
            "tinysteer": VERSION,
        }
        self.about = json.loads(json.dumps(about))  # as it is read again
        self.known = self._read()
        self.notes = list(self.corpus.notes)
        if self.notes and taken:
            told = ", ".join(f"{name} {value}" for name, value in taken.items())
            self.notes.append(f"As these models need it, unless the command says: {told}.")
        self.vectors: dict[str, SteeringVector] = {}
        self.means: dict[tuple, MeanResiduals] = {}
        self.said: list[tuple[dict[str, Any], str, str]] = []  # labels, prompt, answer

    def _read(self) -> dict[str, str]:
        """digest -> answer, of a run with the same settings. A line cut short is dropped."""
        if not self.file.exists():
            self._write([self.about])
            return {}
        whole = self.file.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        first, *rows = (json.loads(line) for line in whole.splitlines()) if whole else ({},)
        if first != self.about:
            changed = sorted(k for k in self.about if first.get(k) != self.about[k])
            raise ValueError(
                f"{self.out} holds another run ({', '.join(changed)} differ): "
                "choose another --out, or delete it"
            )
        self.file.write_bytes(whole)
        known: dict[str, str] = {}
        for row in rows:
            known.setdefault(row["digest"], row["answer"])
        return known

    def _write(self, rows: Sequence[dict]) -> None:
        with open(self.file, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

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
        key = id(model), *requests
        if key not in self.means:
            size = self.settings.batch_size
            self.means[key] = mean_residuals(model, requests, batch_size=size)
        return self.means[key]

    def tally(self, trials: Sequence[Trial], max_new_tokens: int) -> dict[Hashable, dict]:
        """group -> choice -> what was seen in its answers. The settings' limit comes first."""
        tokens = self.settings.max_new_tokens or max_new_tokens
        texts = self.answer([trial.ask for trial in trials], tokens)
        seen: dict[Hashable, dict[Any, list]] = {}
        for trial, text in zip(trials, texts, strict=True):
            choices = seen.setdefault(trial.group, {})
            choices.setdefault(trial.choice, []).append(trial.check(text))
        return seen

    def room(self, asks: Sequence[Ask], max_new_tokens: int) -> int:
        """As many new tokens as the context has room for behind the longest prompt."""
        ids = self.model.tokenizer.ids
        longest = max(len(ids(prompt, True)) for prompt in {ask.prompt for ask in asks})
        room = self.model.config.context_length - longest
        if room < max_new_tokens:
            self.notes.append(f"The context leaves room for {room} new tokens at most.")
        return max(min(room, max_new_tokens), 1)

    def answer(self, asks: Sequence[Ask], max_new_tokens: int) -> list[str]:
        """One answer each, greedy, in batches of prompts of like length. The same is asked once."""
        if not asks:
            return []
        max_new_tokens = self.room(asks, max_new_tokens)
        digests = [ask.digest(max_new_tokens) for ask in asks]
        askers: dict[str, list[Ask]] = {}
        for digest, ask in zip(digests, asks, strict=True):
            askers.setdefault(digest, []).append(ask)
        order = sorted(askers, key=lambda digest: len(askers[digest][0].prompt))
        size = self.settings.batch_size
        batches = [order[at : at + size] for at in range(0, len(order), size)]
        for batch in tqdm(batches, self.experiment, leave=False, disable=None):
            if all(digest in self.known for digest in batch):
                continue
            firsts = [askers[digest][0] for digest in batch]
            texts = self.model.complete(
                [ask.prompt for ask in firsts],
                [list(ask.edits) for ask in firsts],
                max_new_tokens=max_new_tokens,
                batch_size=size,
            )
            # Of a batch that was cut short the first answers stay: others may rest on them.
            pairs = zip(batch, texts, strict=True)
            answers = {digest: text for digest, text in pairs if digest not in self.known}
            self._write(
                [
                    {
                        "digest": digest,
                        "for": [ask.labels for ask in askers[digest]],
                        "prompt": askers[digest][0].prompt,
                        "answer": text,
                    }
                    for digest, text in answers.items()
                ]
            )
            self.known |= answers
        answers = [self.known[digest] for digest in digests]
        self.said += [(a.labels, a.prompt, text) for a, text in zip(asks, answers, strict=True)]
        return answers
