"""What an edit does, token by token: which positions are moved, at which layers, how far."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysteer.model.cache import Cache
from tinysteer.model.decoder import Decoder
from tinysteer.steering.batch import Explaining
from tinysteer.steering.edits import Edit
from tinysteer.text.tokenizer import Tokenizer, pad


@dataclass(frozen=True, eq=False)
class Explanation:
    """One prompt of a batch, as it was run: str() makes it a table.

    Columns that hold padding have no token and no position, and are never edited.
    """

    tokens: list[str | None]  # (T,) as the vocabulary spells them, escaped; None for padding
    positions: list[int | None]  # (T,), counted from the last prompt token, 0
    edits: list[Edit]  # (K,), in order
    d: Tensor  # (K, T) float32: how far each edit moved each position along its direction

    def __str__(self) -> str:
        padding = self.positions.count(None)
        n = len(self.tokens) - padding
        lines = [f"{n} tokens{f' after {padding} columns of padding' * bool(padding)}"]
        lines += [f"  [{k}] {edit!r}" for k, edit in enumerate(self.edits)]
        heads = "".join(f"{f'[{k}] L{edit.layer}':>12}" for k, edit in enumerate(self.edits))
        width = max(len(str(token)) for token in self.tokens)
        lines.append(f"  position  {'token':<{width}}{heads}")
        for t, (token, position) in enumerate(zip(self.tokens, self.positions, strict=True)):
            if position is None:
                lines.append(f"  {'padding':>8}")
                continue
            moved = "".join(f"{d:>+12.3f}" if d else f"{'.':>12}" for d in self.d[:, t].tolist())
            mark = "  <- last prompt token" * (position == 0)
            lines.append(f"  {position:>8}  {token:<{width}}{moved}{mark}")
        return "\n".join(lines)

    def as_dict(self) -> dict:
        """The same as plain data, for JSON."""
        return {
            "tokens": self.tokens,
            "positions": self.positions,
            "edits": [repr(edit) for edit in self.edits],
            "d": self.d.tolist(),
        }


@torch.no_grad()
def explain(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Sequence[Edit]],
    max_new_tokens: int,
) -> list[Explanation]:
    """Run token ids with their edits, and greedily so many new tokens, and keep every move.

    The last new token is never run, so nothing moves it.
    """
    tokens, start = pad(prompts)
    B, T = tokens.shape
    tokens = tokens.to(decoder.embed.weight.device)
    steer = Explaining(rows, tokens.device, decoder.embed.weight.dtype)
    cache = Cache(decoder, start, T, T + max_new_tokens)
    x = decoder.prefill(tokens, cache, steer)
    for left in reversed(range(max_new_tokens)):
        chosen = decoder.logits(x)[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, chosen], dim=1)
        if left:
            x = decoder(chosen, cache, steer)
    d = {layer: torch.cat(parts, dim=1).cpu() for layer, parts in steer.d.items()}
    return [
        explain_row(tokenizer, tokens[b].tolist(), int(start[b]), T, rows[b], d, b)
        for b in range(B)
    ]


def explain_row(
    tokenizer: Tokenizer,
    ids: list[int],
    start: int,
    prompt: int,
    edits: Sequence[Edit],
    d: dict[int, Tensor],
    b: int,
) -> Explanation:
    """One row of a batch, cut after what ended its answer. d: of each layer, (B, T or T - 1, K)."""
    end = next((t + 1 for t in range(prompt, len(ids)) if ids[t] in tokenizer.stop_ids), len(ids))
    place: dict[int, int] = {}  # of the next edit among its layer's
    moved = []
    for edit in edits:
        k = place.setdefault(edit.layer, 0)
        place[edit.layer] += 1
        moved.append(F.pad(d[edit.layer][b, :, k], (0, 1))[:end])
    inside = range(start, end)
    names = [tokenizer.vocabulary.id_to_token(i) or f"<{i}>" for i in ids[:end]]
    names = [repr(name)[1:-1] for name in names]  # one may be a line's end
    return Explanation(
        tokens=[names[t] if t in inside else None for t in range(end)],
        positions=[t - (prompt - 1) if t in inside else None for t in range(end)],
        edits=list(edits),
        d=torch.stack(moved) if moved else torch.zeros(0, end, device="cpu"),
    )
