"""A batch's edits: what `steer=` accepts, whether that fits the model, and the seam it becomes."""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import tinysteer_kernels as kernels
import torch
from torch import Tensor
from typing_extensions import TypeIs  # comes with torch

from tinysteer.model.decoder import Norms, Seam, add, unsteered
from tinysteer.steering.edits import Edit, Origin, Verbs, levels_up
from tinysteer.steering.vectors import SteeringVector

EDITS = 4  # of a row at one layer that fixed tables have room for, at least
DIRECTIONS = 64  # in their bank, at least
Rows = Sequence[Sequence[Edit]]  # a list of edits for each row of a batch
Steer = Sequence[Edit] | Sequence[Sequence[Edit]] | Edit | None
Changing = Callable[[int], Steer]  # the number of tokens chosen so far -> edits for the next


def changes(steer: Steer | Changing) -> TypeIs[Changing]:
    """Whether to ask for edits at each step. A verb that was not called is no such wish."""
    return callable(steer) and not unfinished(steer)


def per_row(steer: Steer, n_rows: int) -> list[list[Edit]]:
    """What `steer=` accepts, one list a row: None, an edit, a list for all rows, or one a row.

    ValueError for anything else.
    """
    rows = [] if steer is None else listed(steer)
    for edit in [one for row in distinct(rows) for one in listed(row)]:
        if unfinished(edit):
            raise ValueError("steer takes edits: pick a layer and a verb, as in v.at(12).add()")
        if not isinstance(edit, Edit):
            kind = type(edit).__name__
            raise ValueError(f"steer takes a list of edits, or one such list a prompt, not {kind}")
    if all(isinstance(row, Edit) for row in rows):
        return [rows] * n_rows
    if any(isinstance(row, Edit) for row in rows):
        raise ValueError(
            "steer has edits and lists of edits: give each prompt a list, or all one (edits of "
            "several layers are a list: unpack it, as in [*v.at(range(10, 21)).add(), other])"
        )
    if len(rows) != n_rows:
        raise ValueError(f"steer has {len(rows)} lists of edits for {n_rows} prompts")
    copies = {id(row): list(row) for row in rows}  # rows that share a list go on sharing one
    return [copies[id(row)] for row in rows]


def listed(value: Any) -> list:
    """What a list holds, or one thing alone as a list."""
    several = isinstance(value, Sequence) and not isinstance(value, Verbs | str)
    return list(value) if several else [value]


def unfinished(value: object) -> bool:
    """Whether it lacks a layer, a verb, or the verb's call to be an edit."""
    owner = getattr(value, "__self__", value)  # of a verb that was not called
    return isinstance(owner, Verbs | SteeringVector)


def distinct(rows: Sequence) -> list:
    """Each list of edits once: rows may share one."""
    return list({id(row): row for row in rows}.values())


def signature(rows: Rows) -> tuple:
    """What says, while the rows are kept, whether others are the same: equal if they are."""
    lists = {id(row): row for row in rows}
    order = {key: i for i, key in enumerate(lists)}
    edits = [[(e.layer, e.move, direction_key(e.direction)) for e in row] for row in lists.values()]
    unsure = any(key[2] is None for row in edits for _, _, key in row)  # whether one has changed
    return edits, [order[id(row)] for row in rows], unsure and object()


def check_fit(rows: Rows, n_layers: int, dim: int, model: str = "", revision: str = "") -> None:
    """Whether the edits can be made in this model.

    ValueError for a layer, a width or a depth that it does not have; a warning for a vector made
    for another model of the same shape, which may well do something there (paper: cross-model).
    """
    here = Origin("", model, revision, n_layers)
    edits = [edit for row in distinct(rows) for edit in row]
    for edit in edits:
        origin = edit.origin or here
        maker = f"it was made for {origin.model or 'another model'}: is that the model you meant?"
        if edit.direction.shape != (dim,):
            raise ValueError(f"the vector is {len(edit.direction)} wide, this model {dim}: {maker}")
        if not 0 <= edit.layer < n_layers:
            raise ValueError(f"layer {edit.layer}: this model has layers 0 to {n_layers - 1}")
        if origin.model and origin.n_layers != n_layers:
            raise ValueError(
                f"the vector has {origin.n_layers} layers, this model {n_layers}: {maker}"
            )
    others = {edit.origin for edit in edits} - {None}
    for other in sorted({o.made_for for o in others if differ(o, here)}):
        warnings.warn(
            f"steering {here.made_for} with vectors made for {other}: their layers and targets may "
            "not carry over",
            stacklevel=levels_up(),
        )


def differ(a: Origin, b: Origin) -> bool:
    """Whether two vectors are known to be for different models. A folder has no owner's name."""
    names = a.model, b.model
    if not all("/" in name for name in names):
        names = a.model.split("/")[-1], b.model.split("/")[-1]
    return any(x and y and x != y for x, y in (names, (a.revision, b.revision)))


class Steering:
    """The edits of a batch, ready to be a decoder's seam.

    bank (N, D), in the model's type: the directions that `tables` name, of each layer that has any.
    """

    def __init__(self, rows: Rows, like: Tensor):
        """One list of edits a row. like: has the type and the device that the bank will have."""
        named, directions = with_names(rows, {})
        layers = sorted({layer for row in distinct(named) for layer, _ in row})
        bank = stacked(directions, like.dtype)
        tables = kernels.compile_moves(bank, named, n_layers=max(layers, default=-1) + 1)
        self.bank, stack = bank.to(like.device), kernels.MoveTables(tables.packed.to(like.device))
        self.tables = {layer: stack[layer] for layer in layers}

    def __call__(
        self, x: Tensor, delta: Tensor, norms: Norms, layer: int, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        if layer not in self.tables:
            return add(x, delta, norms)
        tables = self.tables[layer]
        return add(x, delta, norms, bank=self.bank, tables=tables, position=position)


class FixedSteering(Steering):
    """Steering whose tables keep their sizes and places: every layer's, for a captured step."""

    def __init__(self, like: Tensor, n_layers: int, n_rows: int, capacity: int, n_directions: int):
        """capacity: of edits of a row at one layer. like (V, D): a model's embedding."""
        self.bank = like.new_zeros(n_directions, like.shape[1])
        self.mirror = torch.zeros_like(self.bank, device="cpu")  # of the bank, for the host to read
        self.capacity, self.n_layers = capacity, n_layers
        self.index: dict[tuple, int] = {}  # of the directions that the bank holds
        self.kept: list[Tensor] = []  # those directions, lest another take their memory
        blank = self._compiled([[]] * n_rows)
        self.stack = kernels.MoveTables(blank.packed.to(like.device))
        self.tables = {layer: self.stack[layer] for layer in range(n_layers)}

    def copy_(self, rows: Rows) -> None:
        """Take other edits, as many rows. Directions that are in the bank are not sent again."""
        try:
            named, new = with_names(rows, self.index)
            if len(self.index) > len(self.bank):
                self._forget()
                named, new = with_names(rows, self.index)
            if new:
                part = slice(len(self.kept), len(self.index))
                self.kept += new
                self.mirror[part] = stacked(new, self.mirror.dtype)
                send(self.mirror[part], self.bank[part])
            send(self._compiled(named).packed, self.stack.packed)
        except BaseException:  # some may not have arrived, even where the user broke it off
            self._forget()
            raise
        if any(direction.is_inference() for direction in self.kept):
            self._forget()  # nothing tells when one of those is changed in place

    def _compiled(self, named: Sequence[Sequence[tuple[int, kernels.Move]]]) -> kernels.MoveTables:
        bank = self.mirror[: len(self.kept)]
        return kernels.compile_moves(bank, named, self.capacity, self.n_layers)

    def _forget(self) -> None:
        self.index.clear()
        self.kept.clear()

    def part(self, n_rows: int) -> "FixedSteering":
        """The edits of the first rows, in the same tables: to be read, not to be changed."""
        part = copy.copy(self)
        tables = self.tables.items()
        part.tables = {L: kernels.MoveTables(table.packed[:n_rows]) for L, table in tables}
        return part


class SteeringBuffers:
    """The edits of a batch from step to step: `seam` is what a decoder takes as `steer`.

    fixed: in tables that keep their places, as captured steps read them. `size` says which of
    several; it grows with the edits of a row at one layer, at most, and with the directions.
    """

    def __init__(self, like: Tensor, n_layers: int, n_rows: int, fixed: bool):
        self.like, self.n_layers, self.n_rows, self.fixed = like, n_layers, n_rows, fixed
        self.stacks: dict[tuple[int, int], FixedSteering] = {}
        self.seam: Seam = unsteered
        self.size, self.edits = (0, 0), tuple[Sequence[Edit], ...]()
        self.signature: tuple | None = None

    def copy_(self, edits: Rows, anew: bool = False) -> None:
        """Take other edits, a list for each of the first rows; those that are the same stay."""
        new = signature(edits)
        if anew or new != self.signature:
            self.signature = None  # until they have arrived
            self.seam, self.size = self._take(edits)
            self.edits, self.signature = tuple(edits), new  # which speaks of memory these keep

    def _take(self, edits: Rows) -> tuple[Seam, tuple[int, int]]:
        if not self.fixed or not any(edits):
            return seam(edits, self.like), (0, 0)
        named = [(id(row), edit) for row in distinct(edits) for edit in row]
        depth = max(Counter((row, edit.layer) for row, edit in named).values())
        directions = {direction_key(edit.direction) for _, edit in named}
        size = rounded(max(depth, EDITS)), rounded(max(len(directions), DIRECTIONS))
        if size not in self.stacks:
            self.stacks[size] = FixedSteering(self.like, self.n_layers, self.n_rows, *size)
        self.stacks[size].copy_([*edits, *[[]] * (self.n_rows - len(edits))])
        return self.stacks[size], size

    def part(self, n_rows: int) -> Seam:
        """The seam for the first rows alone."""
        return self.seam.part(n_rows) if isinstance(self.seam, FixedSteering) else self.seam


def rounded(n: int) -> int:
    """Up to a power of two."""
    return 1 << (n - 1).bit_length()


def direction_key(direction: Tensor) -> tuple:
    """Where it lies in memory, and since which change: `at` makes another view of it each time."""
    version = None if direction.is_inference() else direction._version  # those count no changes
    return direction.data_ptr(), direction.stride(), version


def with_names(
    rows: Rows, index: dict[tuple, int]
) -> tuple[list[list[tuple[int, kernels.Move]]], list[Tensor]]:
    """Each row's (layer, move), directions named by `index`; and those that it did not have yet."""
    named: dict[int, list[tuple[int, kernels.Move]]] = {}
    new: list[Tensor] = []
    for row in distinct(rows):
        named[id(row)] = moves = []
        for edit in row:
            key = direction_key(edit.direction)
            if key not in index:
                index[key] = len(index)
                new.append(edit.direction)
            moves.append((edit.layer, edit.move._replace(index=index[key])))
    return [named[id(row)] for row in rows], new


def stacked(directions: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(N, D) on the host."""
    rows = [u.detach().cpu() for u in directions] or [torch.zeros(0, device="cpu")]
    return torch.stack(rows).to(dtype)


def send(source: Tensor, target: Tensor) -> None:
    """Copy from the host, without waiting for what the device has still to do."""
    assert source.shape == target.shape, (source.shape, target.shape)
    if target.is_cuda:
        source = source.pin_memory()  # which PyTorch keeps until the copy is done
    target.copy_(source, non_blocking=True)


def seam(rows: Rows, like: Tensor) -> Seam:
    """One list of edits a row -> what a decoder of like's type and device takes as `steer`."""
    return Steering(rows, like) if any(rows) else unsteered
