"""A batch's edits: what `steer=` accepts, whether that fits the model, and the seam it becomes."""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

import tinysteer_kernels as kernels
import torch
from torch import Tensor

from tinysteer.model.config import Config
from tinysteer.model.decoder import Norms, Seam, add, unsteered
from tinysteer.steering.edits import Direction, Edit, Origin
from tinysteer.steering.vectors import SteeringVector

Steer = Sequence[Edit] | Sequence[Sequence[Edit]] | Edit | None
Changing = Callable[[int], Steer]  # the number of tokens chosen so far -> edits for the next


def changes(steer: Steer | Changing) -> bool:
    """Whether to ask for edits at each step. A verb that was not called is no such wish."""
    return callable(steer) and not isinstance(getattr(steer, "__self__", None), Direction)


def per_row(steer: Steer, n_rows: int) -> list[list[Edit]]:
    """What `steer=` accepts, one list a row: None, an edit, a list for all rows, or one a row.

    ValueError for anything else.
    """
    if steer is None:
        return [[]] * n_rows
    steer = [steer] if isinstance(steer, Edit | Direction | SteeringVector) else steer
    for row in steer if isinstance(steer, Sequence) else [steer]:
        for edit in row if isinstance(row, Sequence) else [row]:
            if isinstance(edit, Direction | SteeringVector):
                raise ValueError("steer takes edits: pick a layer and a verb, as in v.at(12).add()")
            if not isinstance(edit, Edit):
                kind = getattr(edit, "__qualname__", type(edit).__name__)
                raise ValueError(
                    f"steer takes a list of edits, or one such list a prompt, not {kind}"
                )
    if all(isinstance(edit, Edit) for edit in steer):
        return [list(steer)] * n_rows
    if any(isinstance(edit, Edit) for edit in steer):
        raise ValueError("steer has edits and lists of edits: give each prompt a list, or all one")
    if len(steer) != n_rows:
        raise ValueError(f"steer has {len(steer)} lists of edits for {n_rows} prompts")
    return [list(row) for row in steer]


def check_fit(
    rows: Sequence[Sequence[Edit]], n_layers: int, dim: int, model: str = "", revision: str = ""
) -> None:
    """Whether the edits can be made in this model.

    ValueError for a layer, a width or a depth that it does not have; a warning for a vector made
    for another model of the same shape, which may well do something there (paper: cross-model).
    """
    here = Origin("", model, revision, n_layers)
    for edit in (edit for row in rows for edit in row):
        origin = edit.origin or here
        maker = f"it was made for {origin.model or 'another model'}"
        if edit.direction.shape != (dim,):
            width = edit.direction.shape[-1]
            raise ValueError(f"the vector is {width} wide, this model {dim}: {maker}")
        if not 0 <= edit.layer < n_layers:
            raise ValueError(f"layer {edit.layer}: this model has layers 0 to {n_layers - 1}")
        if origin.n_layers != n_layers:
            raise ValueError(
                f"the vector has {origin.n_layers} layers, this model {n_layers}: {maker}"
            )
    origins = {edit.origin for row in rows for edit in row} - {None}
    others = {o.made_for for o in origins if differ(o, here)}
    for other in sorted(others):
        warnings.warn(
            f"steering {here.made_for} with vectors made for {other}: their layers and targets may "
            "not carry over",
            stacklevel=levels_up(),
        )


def differ(a: Origin, b: Origin) -> bool:
    """Whether two vectors are known to be for different models. A folder has no owner's name."""
    models = (a.model, b.model)
    if not all("/" in model for model in models):
        models = tuple(model.split("/")[-1] for model in models)
    return any(x and y and x != y for x, y in (models, (a.revision, b.revision)))


def levels_up() -> int:
    """How far above the caller the first frame lies that is neither ours nor torch's."""
    frame, levels = sys._getframe(1), 1
    while frame.f_back and frame.f_globals["__name__"].split(".")[0] in ("tinysteer", "torch"):
        frame, levels = frame.f_back, levels + 1
    return levels


class Steering:
    """The edits of a batch, ready to be a decoder's seam: tables of the layers that have any."""

    bank: Tensor  # (N, D) in the model's type, the directions that the tables name
    tables: dict[int, kernels.Edits]

    def __init__(
        self,
        rows: Sequence[Sequence[Edit]],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        capacity: int = 0,
    ):
        distinct = {id(row): row for row in rows}  # rows may share one list
        edits = [edit for row in distinct.values() for edit in row]
        unique = {direction_key(edit): edit.direction for edit in edits}
        index = {key: i for i, key in enumerate(unique)}
        bank = [u.to("cpu", dtype) for u in unique.values()] or [torch.zeros(0, device="cpu")]
        bank = torch.stack(bank)
        moves: dict[int, dict[int, list[kernels.Edit]]] = {}  # layer, id of a row
        for key, row in distinct.items():
            for edit in row:
                move = edit.move._replace(index=index[direction_key(edit)])
                moves.setdefault(edit.layer, {}).setdefault(key, []).append(move)
        none: list[kernels.Edit] = []
        self.bank, self.tables = bank.to(device), {}
        for layer, by_row in moves.items():
            each = [by_row.get(id(row), none) for row in rows]
            tables = kernels.compile_edits(bank, each, capacity)
            self.tables[layer] = kernels.Edits(*(table.to(device) for table in tables))

    def __call__(
        self, x: Tensor, delta: Tensor, norms: Norms, layer: int, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        if layer not in self.tables:
            return add(x, delta, norms)
        tables = self.tables[layer]
        return add(x, delta, norms, bank=self.bank, edits=tables, position=position)


class Fixed(Steering):
    """Steering whose tables keep their sizes and places: every layer's, for a captured step."""

    def __init__(
        self,
        config: Config,
        n_rows: int,
        capacity: int,
        n_directions: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        self.bank = torch.zeros(n_directions, config.dim, device=device, dtype=dtype)
        self.blank = kernels.compile_edits(self.bank[:0].cpu(), [[]] * n_rows, capacity)
        self.stack = kernels.Edits(
            *(torch.stack([table] * config.n_layers).to(device) for table in self.blank)
        )
        layers = range(config.n_layers)
        self.tables = {L: kernels.Edits(*(table[L] for table in self.stack)) for L in layers}

    def copy_(self, other: Steering) -> "Fixed":
        """Take other's edits: of as many rows and the same capacity, made on the host."""
        each = [other.tables.get(L, self.blank) for L in self.tables]
        for mine, *theirs in zip(self.stack, *each, strict=True):
            send(torch.stack(theirs), mine)
        send(other.bank, self.bank[: len(other.bank)])
        return self

    def move(self, rows: Sequence[Sequence[Edit]]) -> None:
        """Take other numbers for the edits that are there: same rows, layers and directions."""
        names = ("bias", "slope", "low", "high", "first", "last")
        tables = [getattr(self.blank, name).expand(len(self.tables), -1, -1) for name in names]
        tables = [table.clone() for table in tables]
        places, moves = [], []
        for b, row in enumerate(rows):
            slots: Counter[int] = Counter()
            for edit in row:
                places.append((edit.layer, b, slots[edit.layer]))
                moves.append([getattr(edit.move, name) for name in names])
                slots[edit.layer] += 1
        layer, b, k = torch.tensor(places, device="cpu").T
        columns = torch.tensor(moves, dtype=torch.float64, device="cpu").T  # int32 fits
        for name, table, column in zip(names, tables, columns, strict=True):
            table[layer, b, k] = column.to(table.dtype)
            send(table, getattr(self.stack, name))

    def part(self, n_rows: int) -> Steering:
        """The edits of the first rows, in the same tables."""
        part = Steering([], self.bank.device)
        part.bank = self.bank
        part.tables = {
            L: kernels.Edits(*(x[:n_rows] for x in table)) for L, table in self.tables.items()
        }
        return part


def direction_key(edit: Edit) -> tuple:
    """Where a direction lies in memory: `at` makes another view of it each time."""
    return edit.direction.data_ptr(), edit.direction.stride()


def structure(rows: Sequence[Sequence[Edit]]) -> list:
    """What of edits is more than numbers: each row's layers and directions, and what they read."""
    return [[(e.layer, *direction_key(e), e.move.slope != 0) for e in row] for row in rows]


def send(source: Tensor, target: Tensor) -> None:
    """Copy from the host, without waiting for what the device has still to do."""
    if target.is_cuda:
        source = source.pin_memory()  # which PyTorch keeps until the copy is done
    target.copy_(source, non_blocking=True)


def depth(rows: Sequence[Sequence[Edit]]) -> int:
    """How many edits a row has at one layer, at most."""
    return max((n for row in rows for n in Counter(e.layer for e in row).values()), default=0)


def seam(
    rows: Sequence[Sequence[Edit]],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Seam:
    """One list of edits a row -> what a decoder of that type takes as `steer`."""
    return Steering(rows, device, dtype) if any(rows) else unsteered


class Explaining(Steering):
    """Steering that keeps how far each edit moved each position."""

    def __init__(
        self,
        rows: Sequence[Sequence[Edit]],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(rows, device, dtype)
        self.d: dict[int, list[Tensor]] = {layer: [] for layer in self.tables}  # (B, T, K) each

    def __call__(
        self, x: Tensor, delta: Tensor, norms: Norms, layer: int, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        if layer in self.tables:
            table = self.tables[layer]
            u = kernels.directions(self.bank, table)
            h = (x + norms.post(delta)).float()
            self.d[layer].append(kernels.moves(h, u, table, position))
        return super().__call__(x, delta, norms, layer, position)
