"""Our names of tensors -> the Hub's: the one inverse of what the loader does with them."""

from torch import Tensor

from tinysteer.loading.families import FAMILIES
from tinysteer.model.decoder import Decoder


def to_hub(decoder: Decoder) -> dict[str, Tensor]:
    """A decoder's weights as its family's checkpoints hold them, stacked projections taken apart.

    They are views of the decoder's own. A tied head has no tensor.
    """
    names, tensors = FAMILIES[decoder.config.family].names, {}
    for ours, tensor in decoder.state_dict().items():
        module, _, kind = ours.rpartition(".")
        layer = next((word for word in module.split(".") if word.isdigit()), "#")
        hub = names[module.replace(f".{layer}.", ".#.")]
        whole = isinstance(hub, str)
        rows = [len(tensor)] if whole else decoder.get_submodule(module).parts
        for name, part in zip([hub] if whole else hub, tensor.split(list(rows)), strict=True):
            tensors[f"{name.replace('#', layer)}.{kind}"] = part
    return tensors
