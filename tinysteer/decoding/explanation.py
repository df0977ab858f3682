"""What an edit does, token by token: which positions are moved, how far, and to what effect.

T  positions of a row     K  its edits     R  directions that are read
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysteer.decoding.pool import DecodingPool
from tinysteer.decoding.scoring import logprobs_of
from tinysteer.decoding.step import Batch, decode_tokens
from tinysteer.model.cache import Cache
from tinysteer.model.decoder import CHUNK, Norms, Seam, unsteered
from tinysteer.steering.batch import seam
from tinysteer.steering.edits import Direction, Edit
from tinysteer.text.tokenizer import Tokenizer

Read = Direction | Sequence[Direction]


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """One prompt as it was run, shown as a table, and by a notebook as a coloured one.

    Numbers are nan where nothing was run: of the last new token.
    """

    tokens: list[str]  # (T,) as people read them; line ends and the like escaped
    positions: list[int]  # (T,) counted from the last prompt token, 0
    edits: list[Edit]  # (K,) in order
    before: Tensor  # (K, T) the projection that each edit met at each position
    d: Tensor  # (K, T) how far it moved the state along its direction; before + d is after
    length: Tensor  # (K, T) of the state that it met
    odds: Tensor  # (2, T) the probability of the token behind, without the edits and with them
    behind: str  # the likeliest with the edits, where no token stands behind the last
    read: list[Direction]  # (R,)
    readings: Tensor  # (R, T) projections without the edits

    @property
    def share(self) -> Tensor:
        """|d| in parts of the state's length, (K, T)."""
        return self.d.abs() / self.length

    @property
    def ways(self) -> Tensor:
        """The readings (R, T), 0 at a direction's baseline and 1 at its target."""
        ends = [(v.baseline, v.target - v.baseline) for v in self.read]
        baselines, distances = torch.tensor(ends, device="cpu").reshape(-1, 2, 1).unbind(1)
        return (self.readings - baselines) / distances

    def table(self) -> list[list[str]]:
        """Cells: a row of heads, then one a position."""
        heads = [f"[{k}] L{edit.layer}" for k, edit in enumerate(self.edits)]
        heads += [f"read L{v.layer} (way)" for v in self.read] + ["next token"] * bool(self.edits)
        rows = [["position", "token", *heads]]
        moves, readings = (self.before, self.d, self.share), (self.readings, self.ways)
        for t, (token, position) in enumerate(zip(self.tokens, self.positions, strict=True)):
            row = [f"{position}", token]
            for before, d, share in zip(*(x[:, t].tolist() for x in moves), strict=True):
                row.append(f"{before:.2f} -> {before + d:.2f} ({share:.0%})" if abs(d) > 0 else ".")
            for reading, way in zip(*(x[:, t].tolist() for x in readings), strict=True):
                row.append(f"{reading:.2f} ({way:.0%})" if reading == reading else ".")
            plain, steered = self.odds[:, t].tolist()
            run = f"{plain:.1%} -> {steered:.1%}" if plain == plain else "."
            rows.append(row + [run] * bool(self.edits))
        if self.edits and self.behind:
            rows[-1][-1] += f" {self.behind}"
        return rows

    def __repr__(self) -> str:
        table = self.table()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [f"{len(self.tokens)} tokens"]
        lines += [f"  [{k}] {edit!r}" for k, edit in enumerate(self.edits)]
        for row, position in zip(table, [None, *self.positions], strict=True):
            padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            padded[1] = row[1].ljust(widths[1])
            mark = "  <- last prompt token" * (position == 0)
            lines.append(f"  {'  '.join(padded)}{mark}".rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The table, tinted by the moves' shares and the readings' ways."""
        tints = torch.cat([self.share, self.ways]).nan_to_num().clamp(0, 1).T.tolist()
        lines = []
        for row, tint in zip(self.table(), [[], *tints], strict=True):
            shades = [0.0, 0.0, *tint, *[0.0] * len(row)]
            cells = (
                f'<td style="background:rgba(255,140,0,{shade:.2f})">{html.escape(cell)}</td>'
                for cell, shade in zip(row, shades, strict=False)
            )
            lines.append(f"<tr>{''.join(cells)}</tr>")
        return f"<table>{''.join(lines)}</table>"

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON: None for nan."""
        plain: dict[str, Any] = {**vars(self), "share": self.share, "ways": self.ways}
        plain |= {name: list(map(repr, plain[name])) for name in ("edits", "read")}
        for name, value in plain.items():
            if isinstance(value, Tensor):
                plain[name] = [[x if x == x else None for x in row] for row in value.tolist()]
        return plain


def directions_of(read: Read) -> list[Direction]:
    """What `read=` accepts, as a list. ValueError."""
    directions = list(read) if isinstance(read, Sequence) else [read]
    if not all(isinstance(direction, Direction) for direction in directions):
        raise ValueError("read takes directions: pick a layer, as in read=vector.at(12)")
    return directions


class Watching:
    """A seam that keeps the states which edits meet at some layers, each a list of (1, T, D)."""

    def __init__(self, steer: Seam, layers: set[int]):
        self.steer, self.met = steer, {layer: list[Tensor]() for layer in layers}

    def __call__(
        self, x: Tensor, delta: Tensor, norms: Norms, layer: int, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        if layer in self.met:
            self.met[layer].append((x + norms.post(delta)).cpu())
        return self.steer(x, delta, norms, layer, position)


@torch.no_grad()
def explain(
    pool: DecodingPool,
    tokenizer: Tokenizer,
    read: list[Direction],
    prompt: Sequence[int],
    edits: Sequence[Edit],
    limit: int,
) -> Explanation:
    """Run token ids with their edits, and greedily so many new tokens; then all that was run once
    more at one go, with the edits and without.
    """
    decoder, like, new = pool.decoder, pool.decoder.embed.weight, list[int]()
    if limit:
        batch = Batch.of([prompt], decoder, [limit], tokenizer.stop_ids)
        with pool.take(1, batch.length) as decoding:
            chosen = decode_tokens(decoding, batch, lambda n: [edits])
            new = [token for (token,), _ in chosen if token >= 0]
    ids = [*prompt, *new]
    run = ids[:-1] if new else ids  # the last new one is not
    tokens, zero = torch.tensor([run], device=like.device), torch.tensor([0], device="cpu")
    seams = {
        "plain": Watching(unsteered, {v.layer for v in read}),
        "steered": Watching(seam([edits], like), {edit.layer for edit in edits}),
    }
    ends, states = {}, {}
    for way, watching in seams.items():
        cache = Cache(decoder, zero, len(prompt), len(run))
        parts = [decoder(part, cache, watching) for part in tokens.split(CHUNK, dim=1)]
        ends[way] = torch.cat(parts, dim=1)
        states[way] = {L: torch.cat(met, 1)[0].double() for L, met in watching.met.items()}
    likeliest = int(decoder.logits(ends["steered"][:, -1:]).argmax())
    following = torch.tensor([[*ids[1:], *([] if new else [likeliest])]], device=like.device)
    chances = [logprobs_of(decoder, h, following)[0].exp().cpu() for h in ends.values()]
    positions = [*range(1 - len(prompt), 1 + len(new))]
    moves = replay(states["steered"], edits, positions[: len(run)], like.dtype)
    projections = [states["plain"][v.layer] @ v.direction.cpu().double() for v in read]
    rows = [*(row for kind in zip(*moves, strict=True) for row in kind), *chances, *projections]
    whole = torch.stack([row.float() for row in rows])  # of what was run, and nan for the rest:
    whole = F.pad(whole, (0, len(ids) - len(run)), value=torch.nan)
    before, d, length, odds, readings = whole.split([*[len(edits)] * 3, 2, len(read)])
    names, behind = tokenizer.pieces(ids), "" if new else tokenizer.pieces([ids[-1], likeliest])[1]
    return Explanation(names, positions, [*edits], before, d, length, odds, behind, read, readings)


def replay(
    states: dict[int, Tensor], edits: Sequence[Edit], positions: list[int], dtype: torch.dtype
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What each edit met and did, one after another: projection, d and the state's length, (T,).

    states: a layer's (T, D) before its edits. dtype: what directions are rounded to.
    """
    moves, position = [], torch.tensor(positions, device="cpu")
    for edit in edits:
        h, u, move = states[edit.layer], edit.direction.cpu().to(dtype).double(), edit.move
        before = h @ u
        d = (move.bias - move.slope * before).clamp(move.low, move.high)
        d = d.where((move.first <= position) & (position <= move.last), 0.0)
        moves.append((before, d, h.norm(dim=-1)))
        states[edit.layer] = h + d[:, None] * u
    return moves
