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
        return vars(self) | {"edits": list(map(repr, self.edits)), "d": self.d.tolist()}


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
    T = tokens.shape[1]
    tokens = tokens.to(decoder.embed.weight.device)
    steer = Explaining(rows, decoder.embed.weight)
    cache = Cache(decoder, start, T, T + max_new_tokens)
    x = decoder.prefill(tokens, cache, steer)
    for left in reversed(range(max_new_tokens)):
        chosen = decoder.logits(x)[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, chosen], dim=1)
        if left:
            x = decoder(chosen, cache, steer)
    # What of each layer moved: (B, K, T), one column more for a last new token
    d = {layer: F.pad(torch.cat(parts, 1).mT, (0, 1)).cpu() for layer, parts in steer.d.items()}
    explanations = []
    for b, (ids, edits) in enumerate(zip(tokens.tolist(), rows, strict=True)):
        end = next((t + 1 for t in range(T, len(ids)) if ids[t] in tokenizer.stop_ids), len(ids))
        of_layer = {layer: iter(moved[b, :, :end]) for layer, moved in d.items()}
        moved = [next(of_layer[edit.layer]) for edit in edits]
        names = [tokenizer.vocabulary.id_to_token(i) or f"<{i}>" for i in ids[:end]]
        names = [repr(name)[1:-1] for name in names]  # one may be a line's end
        inside = range(int(start[b]), end)
        explanations.append(
            Explanation(
                tokens=[names[t] if t in inside else None for t in range(end)],
                positions=[t - (T - 1) if t in inside else None for t in range(end)],
                edits=list(edits),
                d=torch.stack(moved) if moved else torch.zeros(0, end, device="cpu"),
            )
        )
    return explanations
