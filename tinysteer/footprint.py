"""How much memory decoding takes at its peak, told from a configuration.

B  rows     S  columns of the cache     T  positions of a prompt run at once     D  model width
"""

from typing import NamedTuple

import torch

from tinysteer.config import Config
from tinysteer.model import CHUNK, Decoder
from tinysteer.stepping import DIRECTIONS, EDITS

SAMPLING = {"greedy": 0, "whole": 16, "cut": 32}  # bytes for each token of the vocabulary


class Footprint(NamedTuple):
    """Bytes. A model holds its weights, a step the next two; `working` is what a prompt needs."""

    weights: int
    cache: int
    edits: int  # tables of every layer, and the directions
    working: int

    @property
    def peak(self) -> int:
        return sum(self)


def n_parameters(config: Config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(config).parameters())


def footprint(
    config: Config, rows: int, columns: int, itemsize: int = 2, sampling: str = "greedy"
) -> Footprint:
    """Of `rows` decoded together in a cache of `columns`, its prompts nearly as long, steered.

    itemsize: bytes of a weight. sampling: "greedy", or a `Sampler`'s kind. A captured step has its
    rows and columns rounded up; another batch's may be kept, cache and all, until it is of use
    again (`model.steps.clear()`); and what a GPU's driver and libraries take comes on top.
    """
    c, B, S, T = config, rows, columns, min(columns, CHUNK)
    heads, key_heads = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    weights = n_parameters(c) * itemsize
    cache = 2 * c.n_layers * B * S * key_heads * itemsize
    ropes = {layer.rope for layer in c.layers}
    cache += sum(2 * S * rope.dim * itemsize for rope in ropes)
    tables = 7 * EDITS + EDITS**2  # seven columns and the Gram matrix, four bytes each
    edits = 4 * c.n_layers * B * tables + DIRECTIONS * c.dim * itemsize
    mlp = B * T * (4 * c.hidden_dim + 6 * c.dim) * itemsize
    attention = B * T * (3 * heads + 3 * key_heads + 3 * c.dim) * itemsize
    attention += B * (2 * S * heads * itemsize + T * S * (1 + itemsize))  # repeated keys, a mask
    if c.attn_cap:  # scores in full, and their softmax in float32
        attention += B * c.n_heads * T * S * (4 + 2 * itemsize)
    logits = B * c.vocab_size * ((12 if c.logit_cap else 4 + itemsize) + SAMPLING[sampling])
    return Footprint(weights, cache, edits, max(mlp, attention) + logits)
