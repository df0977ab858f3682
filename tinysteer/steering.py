"""Steering vectors, the edits they make, and the seam that applies a batch's edits.

A vector has one direction per layer. `vector.at(L)` picks one, its verbs make edits; a list of
edits is what `steer=` takes. Layer L is the residual stream after block L, counted from 0
(transformers' hidden_states[L + 1]).
"""

import json
import numbers
import operator
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tinysteer_kernels as kernels
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinysteer.model import Seam, unsteered

TENSORS = ("directions", "norms", "targets", "baselines")
FORMAT = "tinysteer-vector-1"
CONVENTION = "layer L is the residual stream after block L, counted from 0"
# Half-open windows of positions. Generation begins at the last prompt token, position 0, because
# that is the one that produces the first new token.
WINDOWS = {"all": (None, None), "prompt": (None, 0), "generation": (0, None)}
Where = str | tuple[int | None, int | None]


@dataclass(frozen=True, eq=False)
class Edit:
    """A move along one direction at one layer. Made by the verbs of a `Direction`."""

    layer: int
    direction: Tensor = field(repr=False)  # (D,) float32, unit length
    move: kernels.Edit  # d = clip(bias - slope <h, u>, low, high), and where

    def __post_init__(self):
        largest = torch.finfo(torch.float32).max
        for value in (self.move.bias, self.move.slope):
            if not abs(value) <= largest:
                raise ValueError(f"weight, alpha and target must be finite numbers, not {value!r}")
        if not self.direction.isfinite().all():
            raise ValueError("the direction has NaN or infinite values")

    def __repr__(self) -> str:
        defaults = kernels.Edit._field_defaults
        move = (f"{k}={v:g}" for k, v in self.move._asdict().items() if v != defaults[k])
        return f"<Edit at layer {self.layer}: {', '.join(move) or 'nothing'}>"


def window(where: Where) -> dict[str, int]:
    """ "all", "prompt", "generation" or (first, stop) -> an edit's `first` and `last`."""
    bounds = WINDOWS.get(where) if isinstance(where, str) else where
    whole = isinstance(bounds, tuple) and all(
        b is None or isinstance(b, numbers.Integral) for b in bounds
    )
    if not whole or len(bounds) != 2:
        raise ValueError(
            f"where={where!r}: use {', '.join(map(repr, WINDOWS))} or (first, stop), "
            "positions counted from the last prompt token, 0"
        )
    lowest, highest = kernels.ALWAYS
    first, stop = bounds
    first = lowest if first is None else max(first, lowest)
    last = highest if stop is None else min(stop - 1, highest)
    if first > last:
        raise ValueError(f"where={where!r} holds no position: stop must be greater than first")
    return {"first": first, "last": last}


@dataclass(frozen=True, eq=False)
class Direction:
    """A steering vector at one layer: a unit direction and what was measured along it.

    Weights and targets are in units of the unit direction, so `add(v.norm)` adds the mean
    difference itself. `where` says at which positions an edit acts: "all" (as in the paper),
    "prompt" (before the last prompt token), "generation" (from it on) or (first, stop).
    """

    layer: int
    direction: Tensor = field(repr=False)  # (D,) float32, unit length
    norm: float  # of the mean difference
    target: float  # mean projection of the states with the instruction
    baseline: float  # and of those without it

    def add(self, weight: float | None = None, *, where: Where = "all") -> Edit:
        """h + weight u. Default: the difference's own norm (paper, section 2: c u)."""
        return self._edit(where, bias=self.norm if weight is None else weight)

    def to_target(
        self, alpha: float = 1.0, *, target: float | None = None, where: Where = "all"
    ) -> Edit:
        """Set the projection to `target`, or go `alpha` of the way (paper: adjust_rs)."""
        target = self.target if target is None else target
        return self._edit(where, bias=alpha * target, slope=alpha)

    def at_least(
        self, alpha: float = 1.0, *, target: float | None = None, where: Where = "all"
    ) -> Edit:
        """As `to_target`, but only ever upwards."""
        target = self.target if target is None else target
        return self._edit(where, bias=alpha * target, slope=alpha, low=0.0)

    def at_most(
        self, alpha: float = 1.0, *, target: float | None = None, where: Where = "all"
    ) -> Edit:
        """As `to_target`, but only ever downwards."""
        target = self.target if target is None else target
        return self._edit(where, bias=alpha * target, slope=alpha, high=0.0)

    def ablate(self, *, where: Where = "all") -> Edit:
        """Remove the direction: the projection becomes 0."""
        return self._edit(where, slope=1.0)

    def _edit(self, where: Where, **move: float) -> Edit:
        move = {name: float(value) for name, value in move.items()}
        return Edit(self.layer, self.direction, kernels.Edit(**move, **window(where)))


VERBS = ("add", "to_target", "at_least", "at_most", "ablate")


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """One direction per layer, and what extraction measured along it.

    All float32 on the CPU. A layer whose states did not differ has a zero direction and norm.
    """

    directions: Tensor  # (n_layers, D), rows of unit length
    norms: Tensor  # (n_layers,) length of the mean difference
    targets: Tensor  # (n_layers,) mean projection of the states with the instruction
    baselines: Tensor  # (n_layers,) mean projection of the states without it
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.directions.ndim != 2:
            raise ValueError(f"directions is {list(self.directions.shape)}, not [n_layers, D]")
        for name in TENSORS:
            tensor = getattr(self, name)
            if tensor.shape[:1] != (self.n_layers,) or tensor.ndim > 1 + (name == "directions"):
                raise ValueError(f"{name} is {list(tensor.shape)} for {self.n_layers} layers")
            if not tensor.isfinite().all():
                raise ValueError(f"{name} has NaN or infinite values")
        lengths = self.directions.float().norm(dim=-1)
        if not ((lengths == 0) | ((lengths - 1).abs() < 1e-3)).all():
            raise ValueError("directions must have unit length: their own length goes into norms")

    @classmethod
    def from_means(
        cls, with_instruction: Tensor, without: Tensor, metadata: dict[str, str] | None = None
    ) -> "SteeringVector":
        """Mean states with and without the instruction, each (n_layers, D) (paper, section 2)."""
        difference = with_instruction.double() - without.double()
        norms = difference.norm(dim=-1)
        directions = difference / norms.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        return cls(
            directions.float(),
            norms.float(),
            (with_instruction * directions).sum(-1).float(),
            (without * directions).sum(-1).float(),
            metadata or {},
        )

    @property
    def n_layers(self) -> int:
        return len(self.directions)

    @property
    def dim(self) -> int:
        return self.directions.shape[1]

    def __repr__(self) -> str:
        made = ", ".join(f"{k}={v!r}" for k, v in self.metadata.items() if k in ("model", "pairs"))
        return f"<SteeringVector of {self.n_layers} layers, width {self.dim}; {made or 'unnamed'}>"

    def at(self, layer: int) -> Direction:
        """The direction of one layer; negative layers count from the last."""
        layer = operator.index(layer)
        if not -self.n_layers <= layer < self.n_layers:
            raise ValueError(f"layer {layer}: this vector has layers 0 to {self.n_layers - 1}")
        layer %= self.n_layers
        if self.norms[layer] == 0:
            raise ValueError(
                f"layer {layer}: the states with and without the instruction are equal there, "
                "so it has no direction"
            )
        return Direction(
            layer,
            self.directions[layer],
            float(self.norms[layer]),
            float(self.targets[layer]),
            float(self.baselines[layer]),
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: the four tensors, and the metadata as strings.

        Written here, since the library's own writer wants numpy, which nothing else here needs:
        the header's length, the header in JSON, the numbers.
        """
        if not (folder := Path(path).absolute().parent).is_dir():
            raise FileNotFoundError(f"there is no folder {folder} to save into")
        about = {**self.metadata, "format": FORMAT, "layers": CONVENTION}
        header = {"__metadata__": {key: str(value) for key, value in about.items()}}
        data = b""
        for name in TENSORS:
            numbers = getattr(self, name).flatten().tolist()
            begin, data = len(data), data + struct.pack(f"<{len(numbers)}f", *numbers)
            shape = list(getattr(self, name).shape)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, len(data)]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVector":
        """Read what `save` wrote. FileNotFoundError, or ValueError for any other content."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no steering vector file {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.pop("format", None) != FORMAT:
                    raise ValueError(f"{path} is no tinysteer vector (no format {FORMAT})")
                metadata.pop("layers", None)
                return cls(*(file.get_tensor(name).float() for name in TENSORS), metadata)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None


Steer = Sequence[Edit] | Sequence[Sequence[Edit]] | Edit | None


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


def check_fit(rows: Sequence[Sequence[Edit]], n_layers: int, dim: int) -> None:
    """ValueError for an edit at a layer, or of a width, that the model does not have."""
    for edit in (edit for row in rows for edit in row):
        if not 0 <= edit.layer < n_layers:
            raise ValueError(f"layer {edit.layer}: this model has layers 0 to {n_layers - 1}")
        if edit.direction.shape != (dim,):
            raise ValueError(
                f"the vector is {edit.direction.shape[-1]} wide, this model {dim}: "
                "it was made for another model"
            )


class Steering:
    """The edits of a batch, ready to be a decoder's seam."""

    def __init__(self, rows: Sequence[Sequence[Edit]], device: torch.device | str = "cpu"):
        edits = [edit for row in rows for edit in row]
        unique = {id(edit.direction): edit.direction for edit in edits}
        index = {key: i for i, key in enumerate(unique)}
        self.bank = torch.stack([u.float() for u in unique.values()]).to(device)
        self.tables = {}
        for layer in {edit.layer for edit in edits}:
            moves = [
                [e.move._replace(index=index[id(e.direction)]) for e in row if e.layer == layer]
                for row in rows
            ]
            self.tables[layer] = kernels.compile_edits(self.bank, moves)

    def __call__(self, x: Tensor, layer: int, position: Tensor) -> Tensor:
        if layer not in self.tables:
            return x
        return kernels.steer(x, self.bank, self.tables[layer], position)


def seam(rows: Sequence[Sequence[Edit]], device: torch.device | str = "cpu") -> Seam:
    """One list of edits a row -> what a decoder takes as `steer`."""
    return Steering(rows, device) if any(rows) else unsteered
