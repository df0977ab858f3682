"""Which layer to steer: sweeps, and the paper's rule over their answers.

Stolfo et al. (ICLR 2025), section 4: steer at every second layer, and take the one where most
answers follow the instruction, unless some answer there is so predictable that it must repeat
itself.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from tinysteer.language_model import LanguageModel
from tinysteer.steering.batch import Steer, per_row
from tinysteer.text.messages import Prompt

LOW_PERPLEXITY = 2.5  # the paper's, under GPT-2: text that repeats itself is easy to predict


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
    sound = {
        layer: 0.0 if layer is not None and broken[layer] > allowed else accuracy[layer]
        for layer in accuracy
    }
    layers = [layer for layer in sound if layer is not None]
    return max([None] * (None in sound) + layers, key=sound.__getitem__)
