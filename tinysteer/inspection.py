"""What a vector file or a model holds, in words, and the memory that decoding takes at its peak.

B  rows     S  columns of the cache     T  positions of a prompt run at once     D  model width
"""

from typing import NamedTuple

import torch

from tinysteer.experiments.presets import described
from tinysteer.loading.checkpoint import load_config
from tinysteer.loading.hub import fetch
from tinysteer.model.config import Config
from tinysteer.model.decoder import CHUNK, Decoder
from tinysteer.steering.batch import DIRECTIONS, EDITS
from tinysteer.steering.vectors import SteeringVector
from tinysteer.text.files import printable
from tinysteer.text.tokenizer import Tokenizer

SAMPLING = {"greedy": 0, "whole": 16, "cut": 32}  # bytes for each token of the vocabulary


def inspect_file(path: str) -> str:
    vector = SteeringVector.load(path)
    lines = [f"{path}: steering vector, {vector.n_layers} layers of width {vector.dim}"]
    about = sorted(vector.metadata.items())
    lines += [f"  {printable(name)}: {printable(value, 2000)}" for name, value in about]
    lines += ["", "  layer      norm    target  baseline"]
    for layer in range(vector.n_layers):
        row = (float(t[layer]) for t in (vector.norms, vector.targets, vector.baselines))
        lines.append(f"  {layer:>5}" + "".join(f"{value:>10.3f}" for value in row))
    return "\n".join(lines)


def inspect_model(source: str, revision: str | None) -> str:
    """From its configuration and tokenizer alone: no weights are read or downloaded."""
    folder = fetch(source, revision, weights=False)
    c, tokenizer = load_config(folder), Tokenizer.load(folder)
    n = n_parameters(c)
    cached = 2 * c.n_layers * c.n_kv_heads * c.head_dim  # numbers a token leaves in the cache
    windows = [layer.window for layer in c.layers]
    name = lambda i: printable(tokenizer.vocabulary.id_to_token(i) or i)  # noqa: E731
    rows = {
        "family": c.family,
        "layers": f"{c.n_layers} (0 to {c.n_layers - 1}), width {c.dim}, MLP {c.hidden_dim}",
        "heads": f"{c.n_heads} of {c.head_dim}, {c.n_kv_heads} for keys and values",
        "vocabulary": f"{c.vocab_size}, head {'tied to the embedding' if c.tied else 'of its own'}",
        "context": f"{c.context_length} tokens"
        + "".join(f", {windows.count(w)} layers see {w}" for w in sorted({*windows} - {None})),
        "parameters": f"{n / 1e6:,.1f} M, "
        f"{2 * n / 1e6:,.0f} MB in bfloat16, {4 * n / 1e6:,.0f} in float32",
        "cache": f"{2 * cached / 1024:,.0f} KiB a token in bfloat16, "
        f"{4 * cached / 1024:,.0f} in float32",
        "prompts": "chat template" if tokenizer.template else "no chat template: Q: ... A:",
        "BOS": name(tokenizer.bos_id) if tokenizer.adds_bos else "none added",
        "stops at": ", ".join(map(name, sorted(tokenizer.stop_ids))) or "nothing",
    }
    lines = [f"{source}: model"] + [f"  {key}: {value}" for key, value in rows.items()]
    return "\n".join([*lines, *described(source), "", *memory_table(c)])


def memory_table(config: Config) -> list[str]:
    """Peak memory by rows and columns, as far as the model's context goes."""
    columns = sorted({min(n, config.context_length) for n in (512, 4096, config.context_length)})
    head = "".join(f"{f'{n:,} tokens':>16}" for n in columns)
    lines = ["  MB at the peak, bfloat16, steered; a text is prompt and answer", f"   texts{head}"]
    for rows in (1, 8, 32):
        peaks = (footprint(config, rows, n).peak / 1e6 for n in columns)
        lines.append(f"  {rows:>6}" + "".join(f"{peak:>16,.0f}" for peak in peaks))
    return lines


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
    again (`model.pool.clear()`); and what a GPU's driver and libraries take comes on top.
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
