"""What a decoder remembers of the positions it has run: their keys and values.

B  batch    T  new positions    S  columns, the new ones included    G  key/value heads
"""

import copy

import torch
from tinysteer_kernels import PADDING
from tinysteer_kernels.decode import View
from torch import Tensor

from tinysteer.model.config import Layer


class Cache:
    """A `Decoder`'s keys and values of `length` columns, and where each row's text lies in them.

    Rows are padded on the left: row b's text begins at column start[b] (B,), and every prompt
    ends before column `prompt`. room (B,) says how many positions each row will have at most;
    default all columns from its start.

    What changes from step to step is in tensors, so that a captured step goes on from there, and
    `begin` makes them ready for another batch. Attention may look at the `filled` columns, rounded
    up to a multiple of `block`. A row that starts behind its query holds nothing: it neither sees
    nor changes anything.
    """

    BLOCK = 64

    def __init__(
        self, decoder, start: Tensor, prompt: int, length: int, room: Tensor | None = None
    ):
        config, weight = decoder.config, decoder.embed.weight
        B, device = len(start), weight.device
        shape = (config.n_layers, B, config.n_kv_heads, length, config.head_dim)
        self.k, self.v = weight.new_empty(shape), weight.new_empty(shape)
        self.kinds, self.length = set(config.layers), length
        self.tables = {
            rope: [table.to(device, weight.dtype) for table in rope.tables(length)]
            for rope in {layer.rope for layer in config.layers}
        }
        with torch.device(device):
            self.start = torch.zeros(B, dtype=torch.long)
            self.column, self.last = torch.zeros(2, 1, dtype=torch.long)  # next; of the prompts
            self.sets = {rope: torch.zeros(B, 1, dtype=torch.long) for rope in self.tables}
        self.begin(start, prompt, room)

    def begin(self, start: Tensor, prompt: int, room: Tensor | None = None) -> None:
        """Forget all, for as many rows that start elsewhere."""
        room = self.length - start if room is None else room
        self.filled, self.block = 0, self.BLOCK
        self.k.zero_()  # what is hidden still counts where it is no number: 0 x NaN
        self.v.zero_()
        self.start.copy_(start)
        self.column.zero_()
        self.last.fill_(prompt - 1)
        for rope, sets in self.sets.items():
            sets.copy_(rope.choose(room)[:, None])

    def part(self, n_rows: int) -> "Cache":
        """The first rows, in the same memory."""
        part = copy.copy(self)
        part.k, part.v, part.start = self.k[:, :n_rows], self.v[:, :n_rows], self.start[:n_rows]
        part.sets = {rope: sets[:n_rows] for rope, sets in self.sets.items()}
        return part

    def resume(self, part: "Cache", fixed: bool) -> None:
        """Go on behind what `part` has run. fixed: from here on the columns are counted on the
        device alone, as in a captured step, and attention may look at all of them.
        """
        self.filled, self.block = (0, self.length) if fixed else (part.filled, part.block)

    def end(self, done: Tensor) -> None:
        """Rows that are done (B,) hold nothing from now on: not edited, they look at nothing."""
        self.start.masked_fill_(done, self.length)

    def advance(self, T: int) -> tuple[dict[Layer, View], Tensor]:
        """Make room for T columns: each kind of layer's view, and the positions (B, T)."""
        self.filled += T
        assert self.filled <= self.length, f"{self.filled} columns > {self.length}"
        reach = min(-(-self.filled // self.block) * self.block, self.length)
        query = self.column + torch.arange(T, device=self.column.device)
        self.column += T
        offset = query - self.start[:, None]  # (B, T) within the row's own text
        nearest = offset.clamp(min=0)
        turns = {
            rope: [table[sets, nearest][:, None] for table in self.tables[rope]]
            for rope, sets in self.sets.items()
        }
        views = {
            kind: View(cos, sin, query, self.start, reach, kind.window)
            for kind in self.kinds
            for cos, sin in [turns[kind.rope]]
        }
        position = (query - self.last).expand(offset.shape)
        return views, position.masked_fill(offset < 0, PADDING).to(torch.int32)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each (B, G, length, head_dim)."""
        return self.k[layer], self.v[layer]
