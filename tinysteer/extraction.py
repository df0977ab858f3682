"""Steering vectors from pairs of prompts with and without an instruction.

The method of Stolfo et al. (ICLR 2025), section 2: the residual stream after every block, at the
last token of the formatted prompt; the mean over the prompts with the instruction minus that
without. The other method, "pca", is the differences' first principal direction.
"""

import datetime
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from typing_extensions import Unpack  # comes with torch

from tinysteer.decoding.generation import check_lengths
from tinysteer.language_model import LanguageModel
from tinysteer.model.cache import Cache
from tinysteer.model.recorder import Recorder
from tinysteer.steering.vectors import SteeringVector
from tinysteer.text.messages import Form, Prompt
from tinysteer.text.tokenizer import pad
from tinysteer.version import VERSION

SAME = "the prompts with the instruction are the same as those without it"
ROUNDING = 1e-6  # of the states' norms: means of the same states in another order differ so
METHODS = {
    "mean": "mean difference of last-token residuals",
    "pca": "first principal direction of the differences of last-token residuals, uncentred",
}


@dataclass(frozen=True, eq=False)
class MeanResiduals:
    """The mean last-token residual of each layer over `n` prompts."""

    mean: Tensor  # (n_layers, D) float32, on the CPU
    n: int
    digest: str  # of the prompts
    source: tuple[str, str, bool]  # model, revision, whether the prompts were formatted

    def __len__(self) -> int:
        return self.n


Side = Sequence[Prompt] | MeanResiduals  # the prompts of one side of the pairs, or their mean


def mean_residuals(
    model: LanguageModel, prompts: Sequence[Prompt], *, batch_size: int = 16, **form: Unpack[Form]
) -> MeanResiduals:
    """Run each distinct prompt once and average what its last token carries after every block.

    Memory does not grow with the number of prompts. Keep the result to pair one set of base
    prompts with several instructions. ValueError for states that are not finite.
    """
    return mean_of(model, ids_of(model, prompts, form), form.get("chat", True), batch_size)


def mean_of(
    model: LanguageModel, ids: Sequence[Sequence[int]], chat: bool, batch_size: int
) -> MeanResiduals:
    """The same for prompts that are tokens already."""
    total = torch.zeros(model.config.n_layers, model.config.dim, device="cpu")
    for places, states in run_prompts(model, ids, batch_size):
        counts = torch.tensor([len(place) for place in places], device=states.device)
        total += (states * counts[:, None]).sum(1).cpu()
    source = (model.name, model.revision, chat)
    return MeanResiduals(total / len(ids), len(ids), digest(ids), source)


def all_residuals(model: LanguageModel, ids: Sequence[Sequence[int]], batch_size: int) -> Tensor:
    """What each prompt's last token carries after every block, (n_layers, N, D) on the CPU."""
    states_of = torch.empty(model.config.n_layers, len(ids), model.config.dim, device="cpu")
    for places, states in run_prompts(model, ids, batch_size):
        for row, place in enumerate(places):
            states_of[:, place] = states[:, row, None].cpu()
    return states_of


def ids_of(model: LanguageModel, prompts: Sequence[Prompt], form: Form) -> list[list[int]]:
    """The prompts' tokens. ValueError for none, and for what is too long."""
    ids = [] if isinstance(prompts, str) else model.prompt_ids(prompts, form)
    if not ids:
        raise ValueError("prompts must be a list with at least one prompt")
    check_lengths(ids, [0] * len(ids), model.config.context_length)
    return ids


@torch.no_grad()
def run_prompts(
    model: LanguageModel, ids: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[list[list[int]], Tensor]]:
    """Yield where each prompt of a batch stands in `ids`, and its states (n_layers, B, D)."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
    places: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(ids):
        places.setdefault(tuple(row), []).append(i)
    distinct = sorted(places, key=len)
    with tqdm(total=len(distinct), desc="prompts", leave=False, disable=None) as progress:
        for at in range(0, len(distinct), batch_size):
            batch = distinct[at : at + batch_size]
            states = last_residuals(model, batch).float()
            finite = states.isfinite().all(-1)
            if not finite.all():
                layer, row = (~finite).nonzero()[0].tolist()
                raise ValueError(
                    f"prompt {places[batch[row]][0]} gives NaN or infinite states at layer {layer} "
                    f"in {model.dtype}; load the model with dtype=torch.float32 or torch.bfloat16"
                )
            yield [places[row] for row in batch], states
            progress.update(len(batch))


def last_residuals(model: LanguageModel, ids: Sequence[Sequence[int]]) -> Tensor:
    """Prompts as token ids -> the last token's residual after every block, (n_layers, B, D)."""
    tokens, start = pad(ids, model.decoder.multiple)
    cache = Cache(model.decoder, start, tokens.shape[1], tokens.shape[1])
    recorder = Recorder(model.config.n_layers, keep=slice(-1, None))
    model.decoder.prefill(tokens.to(model.device), cache, recorder)
    return torch.stack([states[-1][:, 0] for states in recorder.states])


def extract(
    model: LanguageModel,
    with_instruction: Side,
    without: Side,
    *,
    method: str = "mean",
    name: str = "",
    batch_size: int = 16,
    **form: Unpack[Form],
) -> SteeringVector:
    """Prompts with an instruction, and the same prompts without it -> one direction per layer.

    Either may be the `mean_residuals` of prompts run before. `target` is the mean projection of
    the states with the instruction (paper, section 2), `baseline` that of those without.

    method: "mean", the mean difference; or "pca", the direction along which the pairs'
    differences are largest in the mean square (uncentred), pointing the mean difference's way,
    which keeps every prompt's states: 8 n_layers D bytes a pair. name: what to call the vector.
    form: how prompts become tokens, as in `Options`. ValueError, also for sides whose states differ
    by no more than rounding.
    """
    sides: dict[str, Any] = {"with_instruction": with_instruction, "without": without}
    sides = {k: s if isinstance(s, MeanResiduals | str) else list(s) for k, s in sides.items()}
    chat = form.get("chat", True)
    check_sides(model, sides, method, chat)
    given = [s if isinstance(s, MeanResiduals) else ids_of(model, s, form) for s in sides.values()]
    digests = [s.digest if isinstance(s, MeanResiduals) else digest(s) for s in given]
    if digests[0] == digests[1]:
        raise ValueError(SAME)
    metadata = {
        "name": name,
        "model": model.name,
        "revision": model.revision,
        "method": METHODS[method],
        "pairs": str(len(given[0])),
        "pairs_sha256": hashlib.sha256("".join(digests).encode()).hexdigest(),
        "prompts": "as they are" if not chat else "formatted",
        "dtype": str(model.dtype).removeprefix("torch."),
        "date": datetime.date.today().isoformat(),
        "tinysteer": VERSION,
    }
    metadata = {key: value for key, value in metadata.items() if value}
    if method == "mean":
        run = partial(mean_of, model, chat=chat, batch_size=batch_size)
        a, b = (s.mean if isinstance(s, MeanResiduals) else run(s).mean for s in given)
        directions = None
    else:
        x, y = (all_residuals(model, ids_of(model, s, form), batch_size) for s in sides.values())
        a, b, directions = x.mean(1), y.mean(1), principal(x - y)
    alike = (a - b).norm(dim=-1) <= ROUNDING * (a.norm(dim=-1) + b.norm(dim=-1))
    if alike.all():
        raise ValueError(SAME)
    return SteeringVector._from_means(a, torch.where(alike[:, None], a, b), metadata, directions)


def check_sides(model: LanguageModel, sides: Mapping[str, Side], method: str, chat: bool) -> None:
    """ValueError for sides that are not pairs, or that the method or the model cannot use."""
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {', '.join(map(repr, METHODS))}")
    if strings := [key for key, side in sides.items() if isinstance(side, str)]:
        raise ValueError(f"{strings[0]} is a string: extract takes two lists of prompts")
    if len(set(map(len, sides.values()))) > 1:
        counts = " and ".join(f"{len(side)} {name}" for name, side in sides.items())
        raise ValueError(f"prompts come in pairs, but there are {counts}")
    for key, side in sides.items():
        if not isinstance(side, MeanResiduals):
            continue
        if method != "mean":
            raise ValueError(f"method {method!r} needs the prompts of {key}, not their mean")
        if side.source != (model.name, model.revision, chat):
            raise ValueError(f"{key} was measured on another model, or with another `chat`")


def principal(differences: Tensor) -> Tensor:
    """Differences of pairs (n_layers, N, D) -> their first principal directions (n_layers, D)."""
    directions = []
    for x in differences.double():
        N, D = x.shape
        _, vectors = torch.linalg.eigh(x @ x.T if N < D else x.T @ x)  # the smaller of the two
        u = x.T @ vectors[:, -1] if N < D else vectors[:, -1]
        directions.append(u if u @ x.mean(0) >= 0 else -u)
    return torch.stack(directions)


def digest(ids: Sequence[Sequence[int]]) -> str:
    """SHA-256 of prompts' tokens, in order."""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()
