"""Steering vectors from pairs of prompts: the mean difference of last-token residuals.

The method of Stolfo et al. (ICLR 2025), section 2: the residual stream after every block, at the
last token of the formatted prompt, averaged with the instruction and without it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from tinysteer.generation import check_lengths
from tinysteer.language_model import LanguageModel
from tinysteer.model import Cache, Recorder
from tinysteer.steering import SteeringVector
from tinysteer.tokenizer import Prompt, pad
from tinysteer.version import VERSION


@dataclass(frozen=True, eq=False)
class MeanResiduals:
    """The mean last-token residual of each layer over `n` prompts."""

    mean: Tensor  # (n_layers, D) float32, on the CPU
    n: int


@torch.no_grad()
def mean_residuals(
    model: LanguageModel, prompts: Sequence[Prompt], *, chat: bool = True, batch_size: int = 16
) -> MeanResiduals:
    """Run each distinct prompt once and average what its last token carries after every block.

    Memory does not grow with the number of prompts. Keep the result to pair one set of base
    prompts with several instructions. ValueError for states that are not finite.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError("prompts must be a list with at least one prompt")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
    ids = [tuple(model.tokenizer.ids(prompt, chat)) for prompt in prompts]
    check_lengths(ids, [0] * len(ids), model.config.context_length)
    counts = Counter(ids)
    distinct = sorted(counts, key=len)
    total = torch.zeros(
        model.config.n_layers, model.config.dim, device=model.device, dtype=torch.float32
    )
    progress = tqdm(total=len(distinct), desc="prompts", unit="", disable=None)
    for at in range(0, len(distinct), batch_size):
        batch = distinct[at : at + batch_size]
        states = last_residuals(model, batch).float()  # (n_layers, B, D)
        finite = states.isfinite().all(-1)
        if not finite.all():
            layer, row = (~finite).nonzero()[0].tolist()
            raise ValueError(
                f"prompt {ids.index(batch[row])} gives NaN or infinite states at layer {layer} in "
                f"{model.dtype}; load the model with dtype=torch.float32 or torch.bfloat16"
            )
        weights = torch.tensor([counts[row] for row in batch], device=model.device)
        total += (states * weights[:, None]).sum(1)
        progress.update(len(batch))
    progress.close()
    return MeanResiduals(total.cpu() / len(ids), len(ids))


def last_residuals(model: LanguageModel, ids: Sequence[Sequence[int]]) -> Tensor:
    """Prompts as token ids -> the last token's residual after every block, (n_layers, B, D)."""
    tokens, start = pad(ids)
    cache = Cache(model.decoder, start, tokens.shape[1], tokens.shape[1])
    recorder = Recorder(model.config.n_layers, keep=slice(-1, None))
    model.decoder.prefill(tokens.to(model.device), cache, recorder)
    return torch.stack([states[-1][:, 0] for states in recorder.states])


def extract(
    model: LanguageModel,
    with_instruction: Sequence[Prompt] | MeanResiduals,
    without: Sequence[Prompt] | MeanResiduals,
    *,
    chat: bool = True,
    batch_size: int = 16,
) -> SteeringVector:
    """Prompts with an instruction, and the same prompts without it -> one direction per layer.

    Either may be the `mean_residuals` of prompts run before. `target` is the mean projection of
    the states with the instruction (paper, section 2), `baseline` that of those without.
    """
    sides = {"with_instruction": with_instruction, "without": without}
    sizes = {k: s.n if isinstance(s, MeanResiduals) else len(s) for k, s in sides.items()}
    if len(set(sizes.values())) > 1:
        seen = " and ".join(f"{n} {name}" for name, n in sizes.items())
        raise ValueError(f"prompts come in pairs, but there are {seen}")
    means = {
        name: side
        if isinstance(side, MeanResiduals)
        else mean_residuals(model, side, chat=chat, batch_size=batch_size)
        for name, side in sides.items()
    }
    metadata = {
        "model": model.name,
        "method": "mean difference of last-token residuals",
        "pairs": str(means["without"].n),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tinysteer": VERSION,
    }
    means = means["with_instruction"].mean, means["without"].mean
    if torch.equal(*means):
        raise ValueError("the prompts with the instruction are the same as those without it")
    return SteeringVector.from_means(*means, metadata)
