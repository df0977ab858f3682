"""The card of a vector on the Hugging Face Hub: its README.md, which says what it is."""

import json
from collections.abc import Iterable, Mapping, Sequence

CARD = """\
---
library_name: tinysteer
{base_model}tags:
- steering-vector
- activation-steering
---

# {title}

A steering vector for `tinysteer`: added to the residual stream of
{model}, it makes the model behave as if it had been given an instruction.

```python
import tinysteer as ts

model = ts.load({source})
vector = ts.SteeringVector.from_hub("{repo}")
model.complete("...", steer=[vector.at({layer}).add()])
```

Which layer is best is for you to find out; {layer} is only the middle one of {n_layers}. Layer L is
the residual stream after block L, counted from 0.

## Where it comes from

| | |
|---|---|
{provenance}

## What it holds

{n_layers} directions of unit length and width {dim}; for each the mean difference's length along it
(norm), and the mean projection of the states with the instruction (target) and without (baseline).

| layer | norm | target | baseline |
|---|---|---|---|
{layers}
"""


def card(repo: str, metadata: Mapping[str, str], dim: int, rows: Iterable[Sequence[float]]) -> str:
    """The repository's README.md. rows: norm, target and baseline of each layer."""
    model = metadata.get("model", "")
    on_hub = model.count("/") == 1  # as in owner/name
    layers = [
        f"| {layer} | " + " | ".join(f"{x:.3f}" for x in row) + " |"
        for layer, row in enumerate(rows)
    ]
    return CARD.format(
        base_model=f"base_model: {json.dumps(model)}\n" if on_hub else "",
        title=cell(metadata.get("name") or metadata.get("formula", "")) or repo.split("/")[-1],
        model=f"`{model}`" if model else "a language model",
        source=json.dumps(model or "..."),
        repo=repo,
        layer=len(layers) // 2,
        n_layers=len(layers),
        dim=dim,
        provenance="\n".join(
            f"| {key} | {cell(value)} |" for key, value in sorted(metadata.items())
        ),
        layers="\n".join(layers),
    )


def cell(text: str) -> str:
    """Text that may stand in a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
