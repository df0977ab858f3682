"""Which layer to steer: sweeps, the paper's rule, and the perplexity that the rule needs.

Stolfo et al. (ICLR 2025), section 4: steer at every second layer, and take the one where most
answers follow the instruction, unless some answer there is so predictable that it must repeat
itself.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F

from tinysteer.language_model import LanguageModel
from tinysteer.steering import Steer, per_row
from tinysteer.tokenizer import Prompt, pad

LOW_PERPLEXITY = 2.5  # the paper's, under GPT-2: text that repeats itself is easy to predict
WINDOW = 1024  # tokens of a text that count, its last ones (paper)
SLICE = 16  # positions whose logits are held at once


def sweep_layers(n_layers: int, step: int = 2) -> list[int | None]:
    """What the paper tries: no steering (None), then every second layer from a fifth upwards."""
    return [None, *range(n_layers // 5, n_layers, step)]


Key = TypeVar("Key", bound=Hashable)


def sweep(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    settings: Mapping[Key, Steer],
    **options,
) -> dict[Key, list[str]]:
    """Answer all prompts under every setting, in one pass over shared batches.

    settings: name -> what `complete` takes as `steer` for these prompts; options: its others.
    Returns name -> one answer a prompt.
    """
    n = len(prompts)
    rows = [row for steer in settings.values() for row in per_row(steer, n)]
    texts = model.complete(list(prompts) * len(settings), rows, **options)
    return {key: texts[i * n : (i + 1) * n] for i, key in enumerate(settings)}


Choice = TypeVar("Choice", int, tuple[int, float])  # a layer, or a layer and a weight


def choose_layer(
    accuracy: Mapping[Choice | None, float],
    broken: Mapping[Choice | None, float],
    allowed: float = 0.0,
) -> Choice | None:
    """The layer of the highest accuracy, or None for no steering, which wins ties.

    broken: the share of a layer's texts of too low perplexity, or otherwise spoilt; above
    `allowed` the layer's accuracy is 0, which no steering keeps. (In the authors' script it loses
    it too, by a line that stands there twice: not imitated.) Of equals the first wins: give layers
    from the lowest up, weights from the weakest.
    """
    found = {
        layer: 0.0 if layer is not None and broken[layer] > allowed else accuracy[layer]
        for layer in accuracy
    }
    layers = [layer for layer in found if layer is not None]
    return max([None] * (None in found) + layers, key=found.__getitem__)


@torch.no_grad()
def perplexity(judge: LanguageModel, texts: Sequence[str], *, batch_size: int = 32) -> list[float]:
    """exp of the mean negative log-likelihood of each text's last WINDOW tokens under a model.

    Of the texts alone, without a prompt. A text of fewer than two tokens has none to predict,
    and counts as 1 (paper).
    """
    window = min(WINDOW, judge.config.context_length)
    ids = [judge.tokenizer.encode(text)[-window:] for text in texts]
    found = [1.0] * len(ids)
    order = sorted((i for i in range(len(ids)) if len(ids[i]) > 1), key=lambda i: len(ids[i]))
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        tokens, start = pad([ids[i] for i in batch])
        states, following = judge.states(tokens, start=start), tokens[:, 1:].to(judge.device)
        losses = [
            F.cross_entropy(judge.decoder.logits(part).mT, right, reduction="none")
            for part, right in zip(
                states[:, :-1].split(SLICE, 1), following.split(SLICE, 1), strict=True
            )
        ]
        losses = torch.cat(losses, dim=1)  # (B, T - 1)
        for row, i in enumerate(batch):
            found[i] = losses[row, int(start[row]) :].mean().exp().item()
    return found


def repetition(text: str, n: int = 3) -> float:
    """The share of a text's runs of n words that stood there before: 0 where none recurs."""
    words = text.lower().split()
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
