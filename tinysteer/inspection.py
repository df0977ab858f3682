"""What a vector file or a model holds, in words."""

import torch

from tinysteer.checkpoint import load_config
from tinysteer.hub import fetch
from tinysteer.model import Decoder
from tinysteer.tokenizer import Tokenizer
from tinysteer.vectors import SteeringVector


def inspect_file(path: str) -> str:
    vector = SteeringVector.load(path)
    lines = [f"{path}: steering vector, {vector.n_layers} layers of width {vector.dim}"]
    lines += [f"  {name}: {value}" for name, value in sorted(vector.metadata.items())]
    lines += ["", "  layer      norm    target  baseline"]
    for layer in range(vector.n_layers):
        row = (float(t[layer]) for t in (vector.norms, vector.targets, vector.baselines))
        lines.append(f"  {layer:>5}" + "".join(f"{value:>10.3f}" for value in row))
    return "\n".join(lines)


def inspect_model(source: str, revision: str | None) -> str:
    """From its configuration and tokenizer alone: no weights are read or downloaded."""
    folder = fetch(source, revision, weights=False)
    c, tokenizer = load_config(folder), Tokenizer.load(folder)
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in Decoder(c).parameters())
    cached = 2 * c.n_layers * c.n_kv_heads * c.head_dim  # numbers a token leaves in the cache
    windows = [layer.window for layer in c.layers]
    name = tokenizer.vocabulary.id_to_token
    rows = {
        "family": c.family,
        "layers": f"{c.n_layers} (0 to {c.n_layers - 1}), width {c.dim}, MLP {c.hidden_dim}",
        "heads": f"{c.n_heads} of {c.head_dim}, {c.n_kv_heads} for keys and values",
        "vocabulary": f"{c.vocab_size}, head {'tied to the embedding' if c.tied else 'of its own'}",
        "context": f"{c.context_length} tokens"
        + "".join(f", {windows.count(w)} layers see {w}" for w in sorted({*windows} - {None})),
        "parameters": f"{n_parameters / 1e6:,.1f} M, "
        f"{2 * n_parameters / 1e6:,.0f} MB in bfloat16, {4 * n_parameters / 1e6:,.0f} in float32",
        "cache": f"{2 * cached / 1024:,.0f} KiB a token in bfloat16, "
        f"{4 * cached / 1024:,.0f} in float32",
        "prompts": "chat template" if tokenizer.template else "no chat template: Q: ... A:",
        "BOS": name(tokenizer.bos_id) if tokenizer.adds_bos else "none added",
        "stops at": ", ".join(name(i) or str(i) for i in sorted(tokenizer.stop_ids)) or "nothing",
    }
    return "\n".join([f"{source}: model"] + [f"  {key}: {value}" for key, value in rows.items()])
