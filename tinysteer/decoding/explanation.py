"""What an edit does, token by token: which positions are moved, how far, and to what effect.

T  positions of a row     K  its edits     R  directions that are read
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysteer.decoding.pool import DecodingPool
from tinysteer.decoding.scoring import logprobs_of
from tinysteer.decoding.step import Batch, decode_tokens
from tinysteer.model.cache import Cache
from tinysteer.model.decoder import CHUNK, Norms, Seam, unsteered
from tinysteer.steering.batch import Rows, seam
from tinysteer.steering.edits import Direction, Edit
from tinysteer.text.tokenizer import Tokenizer

Read = Direction | Sequence[Direction]


class Asked(TypedDict, total=False):
    """What `LanguageModel.explain` takes by keyword."""

    read: Read
    max_new_tokens: int
    chat: bool


@dataclass(frozen=True, eq=False)
class Explanation:
    """One prompt as it was run: str() makes it a table, and a notebook shows a coloured one.

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
        heads += [f"read L{v.layer}" for v in self.read] + ["next token"] * bool(self.edits)
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

    def __str__(self) -> str:
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
    directions = [read] if isinstance(read, Direction) else [*read]
    if not all(isinstance(direction, Direction) for direction in directions):
        raise ValueError("read takes directions: pick a layer, as in read=vector.at(12)")
    return directions


class Watching:
    """A seam that keeps the states which edits meet at some layers, each a list of (B, T, D)."""

    def __init__(self, steer: Seam, layers: set[int]):
        self.steer, self.met = steer, {layer: list[Tensor]() for layer in layers}

    def __call__(
        self, x: Tensor, delta: Tensor, norms: Norms, layer: int, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        if layer in self.met:
            self.met[layer].append((x + norms.post(delta)).cpu())
        return self.steer(x, delta, norms, layer, position)

    def states(self, row: int, first: int, stop: int) -> dict[int, Tensor]:
        """Each layer's (T, D) float64 in a row's columns."""
        return {L: torch.cat(x, dim=1)[row, first:stop].double() for L, x in self.met.items()}


@torch.no_grad()
def explain(
    pool: DecodingPool,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    rows: Rows,
    read: list[Direction],
    limits: Sequence[int],
) -> list[Explanation]:
    """Run token ids with their edits, and greedily so many new tokens; then all that was run once
    more at one go, with the edits and without.
    """
    decoder, like = pool.decoder, pool.decoder.embed.weight
    batch = Batch.of(prompts, decoder, limits, tokenizer.stop_ids)
    new: list[list[int]] = [[] for _ in prompts]
    if max(limits):
        with pool.take(len(prompts), batch.length) as decoding:
            for chosen, _ in decode_tokens(decoding, batch, lambda n: rows):
                for ids, token in zip(new, chosen, strict=True):
                    ids += [token] * (token >= 0)
    (B, T), most = batch.tokens.shape, max(map(len, new))
    behind = torch.tensor([ids + [0] * (most - len(ids)) for ids in new], device="cpu").long()
    tokens = torch.cat([batch.tokens, behind.reshape(B, most)], dim=1).to(like.device)
    stop = T + max(most - 1, 0)  # the last new token is never run
    seams = (
        Watching(unsteered, {v.layer for v in read}),
        Watching(seam(rows, like), {edit.layer for row in rows for edit in row}),
    )
    ends = []
    for watching in seams:
        cache = Cache(decoder, batch.start, T, tokens.shape[1])
        parts = [decoder(part, cache, watching) for part in tokens[:, :stop].split(CHUNK, dim=1)]
        ends.append(torch.cat(parts, dim=1))
    likeliest = decoder.logits(ends[1][:, T - 1 : T])[:, 0].argmax(-1, keepdim=True)
    following = tokens[:, 1:] if most else torch.cat([tokens[:, 1:], likeliest], dim=1)
    odds = torch.stack([logprobs_of(decoder, h, following).exp().cpu() for h in ends])
    told = []
    for b, (prompt, ids) in enumerate(zip(prompts, new, strict=True)):
        first, last = T - len(prompt), T + max(len(ids) - 1, 0)
        positions = [*range(1 - len(prompt), 1 + len(ids))]

        def whole(numbers: Tensor, n: int = len(positions)) -> Tensor:
            """(..., columns that were run) -> float32, nan for the rest."""
            return F.pad(numbers.float(), (0, n - numbers.shape[-1]), value=float("nan"))

        before, d, length = replay(seams[1].states(b, first, last), rows[b], positions, like.dtype)
        states, readings = (
            seams[0].states(b, first, last),
            torch.zeros(len(read), last - first, device="cpu"),
        )
        for reading, v in zip(readings, read, strict=True):
            reading.copy_(states[v.layer] @ v.direction.cpu().double())
        told.append(
            Explanation(
                tokens=tokenizer.pieces([*prompt, *ids]),
                positions=positions,
                edits=list(rows[b]),
                before=whole(before),
                d=whole(d),
                length=whole(length),
                odds=whole(odds[:, b, first:last]),
                behind="" if ids else tokenizer.pieces([prompt[-1], int(likeliest[b])])[1],
                read=read,
                readings=whole(readings),
            )
        )
    return told


def replay(
    states: dict[int, Tensor], edits: Sequence[Edit], positions: list[int], dtype: torch.dtype
) -> Tensor:
    """What each edit met and did, one after another: projections, d and lengths, (3, K, T).

    states: a layer's (T, D) before its edits. dtype: what directions are rounded to.
    """
    T = len(next(iter(states.values()), ()))
    told = torch.zeros(3, len(edits), T, dtype=torch.double, device="cpu")
    for k, edit in enumerate(edits):
        h, u, move = states[edit.layer], edit.direction.cpu().to(dtype).double(), edit.move
        at, before = torch.tensor(positions[:T], device="cpu"), h @ u
        d = (move.bias - move.slope * before).clamp(move.low, move.high)
        d = d.where((move.first <= at) & (at <= move.last), 0.0)
        told[:, k] = torch.stack([before, d, h.norm(dim=-1)])
        states[edit.layer] = h + d[:, None] * u
    return told
