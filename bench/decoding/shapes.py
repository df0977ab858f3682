"""Models of known shapes with random weights, so that nothing is downloaded, and random edits.

shapes.json has what a config.json says, and what is small in a tiny one. Each matrix is drawn by
its width ** -0.5: what comes out of it is as large as what goes in, through all layers. An edit
moves a row by 0.05 sqrt(D), or sets its projection to that: some percent of such a stream.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.machine import DEVICE, ON_GPU
from tinysteer.loading.families import read_config
from tinysteer.model.decoder import Decoder
from tinysteer.steering.edits import Direction, Edit

LLAMA, SMOLLM2, R1_DISTILL = "Llama-3.1-8B", "SmolLM2-135M", "R1-Distill-1.5B"
SHAPES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
DTYPE, TYPE = (torch.bfloat16, "bfloat16") if ON_GPU else (torch.float32, "float32")
OWN = 256  # lists of edits: as many as any batch here has rows
VERBS = {
    "adds": lambda direction, weight: direction.add(weight=weight),
    "targets": lambda direction, weight: direction.to_target(target=weight),
    "idle": lambda direction, weight: direction.add(weight=weight, where=(1 << 30, None)),  # never
}


def shape_of(model: str, tiny: bool = False) -> dict:
    """A config.json. tiny: with the same traits, but run in no time."""
    shape = SHAPES[model] | (SHAPES["tiny"] if tiny else {})
    return shape | ({"sliding_window": 24} if tiny and shape.get("sliding_window") else {})


def random_decoder(model: str, tiny: bool = False) -> Decoder:
    """A decoder with random weights, made where it will run; a tiny one in float32."""
    config = read_config(shape_of(model, tiny))
    with torch.device("meta"):
        decoder = Decoder(config).requires_grad_(False)
    decoder = decoder.to(torch.float32 if tiny else DTYPE).to_empty(device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for parameter in decoder.parameters():
        mean, std = 0.0, parameter.shape[-1] ** -0.5
        if parameter.ndim == 1:  # a norm's
            mean, std = 1 - config.norm_offset, 0.1
        parameter.normal_(mean, std, generator=generator)
    return decoder


def random_prompts(decoder: Decoder, B: int, T: int) -> Tensor:
    """(B, T) int64."""
    generator = torch.Generator().manual_seed(B + T)
    return torch.randint(decoder.config.vocab_size, (B, T), generator=generator)


def bytes_read(decoder: Decoder, B: int, seen: int) -> tuple[int, int]:
    """Of the weights, an embedding only if it is the head; of B rows' cache, `seen` columns."""
    config, embedding = decoder.config, decoder.embed.weight
    weights = sum(parameter.nbytes for parameter in decoder.parameters())
    columns = sum(min(seen, layer.window or seen) for layer in config.layers)
    cache = 2 * B * columns * config.n_kv_heads * config.head_dim * embedding.itemsize
    return weights if config.tied else weights - embedding.nbytes, cache


class Way(NamedTuple):
    """How the rows of a batch are steered."""

    name: str
    K: int = 0  # edits of a row at each layer that has any
    verb: str = "targets"
    lists: int = 1  # of edits, which the rows take in turn; OWN: one for each row
    one_layer: bool = False  # the middle one; else all have K

    def layers(self, decoder: Decoder) -> list[int]:
        n = decoder.config.n_layers
        return [] if not self.K else [n // 2] if self.one_layer else [*range(n)]

    @torch.inference_mode(False)  # else the directions would be sent again at every step
    def edits(self, decoder: Decoder, B: int) -> list[list[Edit]]:
        """A list for each row, each edit of it along a direction of its own."""
        D, layers, n_lists = decoder.config.dim, self.layers(decoder), min(self.lists, B)
        generator = torch.Generator(DEVICE).manual_seed(n_lists + self.K)
        u = torch.randn(n_lists, len(layers) * self.K, D, generator=generator, device=DEVICE)
        u, weight = (u / u.norm(dim=-1, keepdim=True)).cpu(), 0.05 * D**0.5

        def edit(i: int, direction: Tensor) -> Edit:
            along = Direction(layers[i // self.K], direction, weight, weight, 0.0)
            return VERBS[self.verb](along, weight)

        lists = [[edit(i, direction) for i, direction in enumerate(of_list)] for of_list in u]
        return [lists[row % n_lists] for row in range(B)]


OFF, IDLE, ONE = Way("off"), Way("idle", 4, "idle"), Way("one layer", 1, "adds", one_layer=True)
