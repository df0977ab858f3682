"""A run of one experiment on one model: answers kept as they come, in a folder that can be resumed.

answers.jsonl has a line for every answer, written by whole batches. A run that was stopped finds
there what it has and goes on with the same batches, so it ends with the same answers.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tinysteer.edits import Edit, Where
from tinysteer.language_model import LanguageModel
from tinysteer.version import VERSION


@dataclass(frozen=True)
class Settings:
    """What a run may choose. The defaults are the paper's; None: as each experiment has it."""

    limit: int | None = None  # test prompts, at most
    layers: dict[str, dict[str, int | None]] = field(default_factory=dict)  # setting, instruction
    layer: int | None = None  # for all that is added with a weight
    weights: tuple[float, ...] | None = None  # to sweep; the paper's are absolute
    where: Where = "all"
    validation: int = 8  # prompts an instruction to choose its layer by
    step: int = 2  # between the layers that are tried
    max_new_tokens: int | None = None
    validation_tokens: int = 256
    batch_size: int = 32
    prompts: str | None = None  # JSONL files in place of the built-in texts
    pairs: str | None = None


@dataclass(frozen=True)
class Ask:
    """One prompt, its edits, and what the answer is for: labels that name it among all others."""

    prompt: str
    edits: Sequence[Edit] = ()
    labels: dict[str, Any] = field(default_factory=dict)

    def digest(self, max_new_tokens: int) -> str:
        """Of all that decides the answer, but for the model. Who asks is no part of it."""
        edits = [
            (edit.layer, *edit.move, hashlib.sha256(edit.direction.numpy().tobytes()).hexdigest())
            for edit in self.edits
        ]
        text = json.dumps([self.prompt, edits, max_new_tokens])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Study:
    """A model, settings and a folder; `answer` is how an experiment asks."""

    def __init__(
        self,
        experiment: str,
        model: LanguageModel,
        out: Path,
        settings: Settings,
        judge: LanguageModel | None = None,
        source: LanguageModel | None = None,
    ):
        self.experiment, self.model, self.settings = experiment, model, settings
        self.judge, self.source, self.out = judge, source, out
        out.mkdir(parents=True, exist_ok=True)
        self.file = out / "answers.jsonl"
        self.about = {
            "experiment": experiment,
            "model": model.name,
            "revision": model.revision,
            "dtype": str(model.dtype).removeprefix("torch."),
            "source": source.name if source else None,
            "judge": judge.name if judge else None,
            "settings": asdict(settings),
            "tinysteer": VERSION,
        }
        self.known = self._read()
        self.said: list[tuple[dict[str, Any], str, str]] = []  # labels, prompt, answer

    def _read(self) -> dict[str, str]:
        """digest -> answer, of a run with the same settings. A line cut short is dropped."""
        if not self.file.exists():
            self._write([self.about])
            return {}
        whole = self.file.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        first, *rows = (json.loads(line) for line in whole.splitlines()) if whole else ({},)
        if first != json.loads(json.dumps(self.about)):
            changed = sorted(k for k in self.about if first.get(k) != self.about[k])
            raise ValueError(
                f"{self.out} holds another run ({', '.join(changed)} differ): "
                "choose another --out, or delete it"
            )
        self.file.write_bytes(whole)
        return {row["digest"]: row["answer"] for row in rows}

    def _write(self, rows: Sequence[dict]) -> None:
        with open(self.file, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def answer(self, asks: Sequence[Ask], max_new_tokens: int) -> list[str]:
        """One answer each, greedy, in batches of prompts of like length. The same is asked once."""
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
            answers = dict(zip(batch, texts, strict=True))
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
