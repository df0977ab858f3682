"""Edits: moves of the residual stream along one direction, and the verbs that make them.

A list of edits is what `steer=` takes. Layer L is the residual stream after block L, counted from 0
(transformers' hidden_states[L + 1]).
"""

import numbers
import operator
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import torch
from tinysteer_kernels import Move
from tinysteer_kernels.tables import ALWAYS
from torch import Tensor

# Half-open windows of positions. Generation begins at the last prompt token, position 0, because
# that is the one that produces the first new token.
WINDOWS = {"all": (None, None), "prompt": (None, 0), "last": (0, 1), "generation": (0, None)}
Where = str | tuple[int | None, int | None]
Number = float | None  # None: what the vector itself has
NUMBERS = "times, weight, alpha and target"
LARGEST = 1e15  # a larger one's square, summed in a norm, is beyond float32
FAINT = 0.1  # of a vector's norm: an addition of less is hardly meant


class Origin(NamedTuple):
    """Which vector an edit comes from, made for which model; empty strings where not known."""

    vector: str
    model: str
    revision: str
    n_layers: int

    @property
    def made_for(self) -> str:
        revisions = " and ".join(part[:8] for part in self.revision.split(" and "))
        return f"{self.model}@{revisions}" if revisions else self.model


@dataclass(frozen=True, eq=False)
class Edit:
    """A move along one direction at one layer. Made by the verbs of a `Direction`.

    Equal to another one that makes the same move along the same direction at the same layer.
    """

    layer: int
    direction: Tensor = field(repr=False)  # (D,) float32, unit length
    move: Move  # d = clip(bias - slope <h, u>, low, high), and where
    origin: Origin | None = field(default=None, repr=False)

    def __post_init__(self):
        for value in (self.move.bias, self.move.slope):
            if not abs(value) <= LARGEST:
                raise ValueError(f"{NUMBERS} must be finite numbers up to 1e15, not {value!r}")
        if not self.direction.isfinite().all():
            raise ValueError("the direction has NaN or infinite values")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Edit):
            return NotImplemented
        same = (self.layer, self.move) == (other.layer, other.move)
        return same and torch.equal(self.direction, other.direction)

    def __repr__(self) -> str:
        defaults = Move._field_defaults
        move = (f"{k}={v:g}" for k, v in self.move._asdict().items() if v != defaults[k])
        vector = f" {self.origin.vector}" if self.origin and self.origin.vector else ""
        return f"<Edit{vector} at layer {self.layer}: {', '.join(move) or 'nothing'}>"


def window(where: Where) -> dict[str, int]:
    """A key of WINDOWS, or (first, stop) -> an edit's `first` and `last`."""
    bounds = WINDOWS.get(where, ()) if isinstance(where, str) else where
    whole = isinstance(bounds, tuple | list) and all(
        b is None or (isinstance(b, numbers.Integral) and not isinstance(b, bool)) for b in bounds
    )
    if not whole or len(bounds) != 2:
        raise ValueError(
            f"where={where!r}: use {', '.join(map(repr, WINDOWS))} or (first, stop), "
            "positions counted from the last prompt token, 0"
        )
    lowest, highest = ALWAYS
    first, stop = bounds
    first = lowest if first is None else max(first, lowest)
    last = highest if stop is None else min(stop - 1, highest)
    if first > last:
        raise ValueError(f"where={where!r} holds no position: stop must be greater than first")
    return {"first": first, "last": last}


def parse_window(text: str) -> Where:
    """A key of WINDOWS, or "FIRST,STOP", where either may be left out.

    ValueError for any other text.
    """
    if text in WINDOWS:
        return text
    try:
        first, stop = (int(end) if end else None for end in text.split(","))
    except ValueError:
        names = ", ".join(WINDOWS)
        raise ValueError(f"{text!r} is none of {names}, and not FIRST,STOP") from None
    window((first, stop))
    return first, stop


def number(value: float) -> float:
    """A number of an edit as a float. ValueError for what is not one."""
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{NUMBERS} must be finite numbers, not {value!r:.40}")


def layer_of(layer: int, n_layers: int) -> int:
    """A layer counted from 0; a negative one counts from the last. ValueError for what is none."""
    if isinstance(layer, bool) or not hasattr(layer, "__index__"):
        raise ValueError(f"layer {layer!r:.40}: a layer is a whole number")
    layer = operator.index(layer)
    if not -n_layers <= layer < n_layers:
        raise ValueError(f"layer {layer}: this vector has layers 0 to {n_layers - 1}")
    return layer % n_layers


def unit(directions: Tensor) -> Tensor:
    """(n_layers, D) -> the same at length 1; rows of zeros stay."""
    norms = directions.norm(dim=-1, keepdim=True)
    return torch.where(norms > 0, directions / norms, 0.0)


def levels_up() -> int:
    """How far above the caller the first frame lies that is neither ours nor torch's."""
    frame, levels = sys._getframe(1), 1
    while frame.f_back and frame.f_globals["__name__"].split(".")[0] in ("tinysteer", "torch"):
        frame, levels = frame.f_back, levels + 1
    return levels


Made = TypeVar("Made")  # what a verb gives: an edit, or one for each of several layers


class Verbs(Generic[Made]):
    """What makes edits. `where` says at which positions they act: "all" (as in the paper),
    "prompt" (before the last prompt token), "last" (that token alone), "generation" (from it on)
    or (first, stop), counted from it.
    """

    def add(
        self, *bare: NoReturn, times: Number = None, weight: Number = None, where: Where = "all"
    ) -> Made:
        """h + weight u; or `times` the vector's own norm, by default once (paper, section 2: c u).

        TypeError for a bare number, ValueError for both. A warning for a weight under a tenth of
        the norm, which hardly moves a state.
        """
        if bare:
            raise TypeError(
                "add takes no bare number: times=1.5 counts the vector's own norm, weight=20.0 "
                "the unit direction"
            )
        if times is not None and weight is not None:
            raise ValueError("add takes times or weight, not both")
        if weight is None:
            times = 1.0 if times is None else number(times)
            return self._each(lambda v: v._edit(where, bias=times * v.norm))
        weight = number(weight)
        return self._each(lambda v: v._weighted(weight, where))

    def to_target(self, alpha: float = 1.0, *, target: Number = None, where: Where = "all") -> Made:
        """Set the projection to `target`, or go `alpha` of the way (paper: adjust_rs)."""
        return self._each(lambda v: v._towards(alpha, target, where))

    def at_least(self, alpha: float = 1.0, *, target: Number = None, where: Where = "all") -> Made:
        """As `to_target`, but only ever upwards."""
        return self._each(lambda v: v._towards(alpha, target, where, low=0.0))

    def at_most(self, alpha: float = 1.0, *, target: Number = None, where: Where = "all") -> Made:
        """As `to_target`, but only ever downwards."""
        return self._each(lambda v: v._towards(alpha, target, where, high=0.0))

    def ablate(self, *, where: Where = "all") -> Made:
        """Remove the direction: the projection becomes 0."""
        return self._each(lambda v: v._edit(where, slope=1.0))

    def _each(self, make: "Callable[[Direction], Edit]") -> Made:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Direction(Verbs[Edit]):
    """A steering vector at one layer: a unit direction and what was measured along it.

    Weights and targets are in units of the unit direction.
    """

    layer: int
    direction: Tensor = field(repr=False)  # (D,) float32, unit length
    norm: float  # of the mean difference
    target: float  # mean projection of the states with the instruction
    baseline: float  # and of those without it
    origin: Origin | None = field(default=None, repr=False)

    def _each(self, make: "Callable[[Direction], Edit]") -> Edit:
        return make(self)

    def _weighted(self, weight: float, where: Where) -> Edit:
        if 0 < abs(weight) < FAINT * self.norm:
            warnings.warn(
                f"a weight under a tenth of the vector's norm, {self.norm:.3g} at layer "
                f"{self.layer}, hardly moves a state: times=1 adds that norm",
                stacklevel=levels_up(),
            )
        return self._edit(where, bias=weight)

    def _towards(self, alpha: float, target: Number, where: Where, **clip: float) -> Edit:
        alpha, target = number(alpha), self.target if target is None else number(target)
        return self._edit(where, bias=alpha * target, slope=alpha, **clip)

    def _edit(self, where: Where, **move: Any) -> Edit:
        return Edit(self.layer, self.direction, Move(**move, **window(where)), self.origin)


class Directions(tuple[Direction, ...], Verbs[list[Edit]]):
    """Those of several layers: a verb makes a list of edits, one at each."""

    def _each(self, make: Callable[[Direction], Edit]) -> list[Edit]:
        return [make(direction) for direction in self]
