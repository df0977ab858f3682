"""The card of a vector on the Hugging Face Hub: its README.md, which says what it is."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence

from tinysteer.loading.hub import ASSETS
from tinysteer.text.files import printable


def card(repo: str, metadata: Mapping[str, str], dim: int, rows: Iterable[Sequence[float]]) -> str:
    """The repository's README.md. rows: norm, target and baseline of each layer."""
    model = metadata.get("model", "")
    on_hub = model.count("/") == 1  # as in owner/name
    layers = [f"| {i} | {' | '.join(f'{x:.3f}' for x in row)} |" for i, row in enumerate(rows)]
    facts = sorted(metadata.items())
    return (
        (ASSETS / "vector_card.md")
        .read_text(encoding="utf-8")
        .format(
            base_model=f"base_model: {json.dumps(model)}\n" if on_hub else "",
            title=cell(metadata.get("name") or metadata.get("formula", "")) or repo.split("/")[-1],
            model=f"`{cell(model)}`" if model else "a language model",
            source=json.dumps(model or "..."),
            repo=repo,
            layer=len(layers) // 2,
            n_layers=len(layers),
            dim=dim,
            provenance="\n".join(f"| {cell(key)} | {cell(value)} |" for key, value in facts),
            layers="\n".join(layers),
        )
    )


def cell(text: str) -> str:
    """Text that may stand in a Markdown table, where HTML is shown as it is written."""
    return html.escape(printable(" ".join(text.split()), 2000), quote=False).replace("|", "\\|")
