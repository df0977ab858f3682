"""Steering vectors as values: one direction per layer, their algebra and their files.

`vector.at(L)` picks a layer's direction, whose verbs make edits.
"""

import numbers
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack  # comes with torch

from tinysteer.loading.hub import pull, push
from tinysteer.steering import hub_card
from tinysteer.steering.edits import Direction, Directions, Origin, layer_of, unit
from tinysteer.text.files import read_tensors, write_tensors
from tinysteer.text.messages import Form, Prompt

TENSORS = ("directions", "norms", "targets", "baselines")
NUMBERS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HUB_FILE = "vector.safetensors"
FORMAT = "tinysteer-vector-1"
CONVENTION = "layer L is the residual stream after block L, counted from 0"


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """One direction per layer, and what extraction measured along it; all float32 on the CPU.

    A layer whose states did not differ has a zero direction and norm. A value: `a + b`, `a - b`,
    `2 * a`, `-a` and `a / 2` are vectors, whose difference at every layer (`norms * directions`) is
    that of the differences; `a == b` compares all numbers, not the metadata. The algebra sees a
    vector as a way from the states without the instruction, so that a result's target is its
    baseline plus its norm: `(2 * a).at(L).to_target()` goes twice as far as `a`, `-a` as far in the
    other direction.
    """

    directions: Tensor  # (n_layers, D), rows of unit length
    norms: Tensor  # (n_layers,) length of the mean difference
    targets: Tensor  # (n_layers,) mean projection of the states with the instruction
    baselines: Tensor  # (n_layers,) mean projection of the states without it
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.directions.ndim != 2 or not self.directions.numel():
            raise ValueError(f"directions is {list(self.directions.shape)}, not [n_layers, D]")
        for name in TENSORS:
            tensor = getattr(self, name)
            if tensor.shape[:1] != (self.n_layers,) or tensor.ndim > 1 + (name == "directions"):
                raise ValueError(f"{name} is {list(tensor.shape)} for {self.n_layers} layers")
            if tensor.dtype not in NUMBERS:
                raise ValueError(f"{name} is of {tensor.dtype}, not of float32 or the like")
            if not tensor.isfinite().all():
                raise ValueError(f"{name} has NaN or infinite values")
        lengths = self.directions.float().norm(dim=-1)
        if not torch.where(lengths == 0, self.norms == 0, (lengths - 1).abs() < 1e-3).all():
            raise ValueError("directions must have unit length, or 0 where the norm is 0")

    @classmethod
    def from_directions(
        cls, directions: Mapping[int, Tensor], n_layers: int | None = None, *, name: str = ""
    ) -> "SteeringVector":
        """Directions from elsewhere, {layer: (D,)} of any length, which becomes the norm.

        n_layers: the model's; default as many as are named. What states measure along them is not
        known, so baselines are 0 and targets the norms: `measured_on` finds both. ValueError.
        """
        n_layers = n_layers or max(directions, default=-1) + 1
        widths = {tuple(u.shape) for u in directions.values()}
        if not directions or not all(0 <= layer < n_layers for layer in directions):
            raise ValueError(f"layers {[*directions]}: name at least one of 0 to {n_layers - 1}")
        if len(widths) > 1 or not all(len(shape) == 1 for shape in widths):
            raise ValueError(f"directions must be (D,), all of one width, not {sorted(widths)}")
        blank = torch.zeros(*widths.pop(), device="cpu")
        rows = [directions.get(layer, blank).detach().cpu() for layer in range(n_layers)]
        difference = torch.stack([row.double() for row in rows])
        return cls._from_means(
            difference, torch.zeros_like(difference), {"name": name} if name else {}
        )

    def measured_on(
        self, model: Any, prompts: Sequence[Prompt], without: Sequence[Prompt], **form: Unpack[Form]
    ) -> "SteeringVector":
        """The same directions and norms, with targets and baselines: what the last tokens of
        prompts with the instruction, and of those without it, have along them (paper, section 2).

        model: a `LanguageModel`, whose number of layers the result has. ValueError for no prompts
        and where the widths differ.
        """
        means = []
        for side in (prompts, without):
            if isinstance(side, str) or not side:
                raise ValueError("measured_on takes two lists of at least one prompt")
            ids = (torch.tensor([row]) for row in model.prompt_ids(side, form))
            states = [model.residuals(row)[:, 0, -1].double().cpu() for row in ids]
            means.append(sum(states) / len(states))
        (n_layers, D), own = means[0].shape, f"{self.n_layers} layers of width {self.dim}"
        if self.dim != D or (more := n_layers - self.n_layers) < 0:
            raise ValueError(f"the vector has {own}, the model {n_layers} of width {D}")
        u = F.pad(self.directions.double(), (0, 0, 0, more))
        targets, baselines = ((mean * u).sum(-1).float() for mean in means)
        about = self.metadata | {"model": model.name, "revision": model.revision}
        return SteeringVector(u.float(), F.pad(self.norms, (0, more)), targets, baselines, about)

    @classmethod
    def _from_means(
        cls,
        with_instruction: Tensor,
        without: Tensor,
        metadata: dict[str, str] | None = None,
        directions: Tensor | None = None,
    ) -> "SteeringVector":
        """Mean states with and without the instruction, each (n_layers, D) (paper, section 2).

        directions: of any length, default the difference. The norm is the difference's projection.
        """
        difference = with_instruction.double() - without.double()
        u = unit(difference if directions is None else directions.double())
        tensors = (difference, with_instruction, without)
        norms, targets, baselines = ((x * u).sum(-1).float() for x in tensors)
        return cls(u.float(), norms, targets, baselines, metadata or {})

    @property
    def n_layers(self) -> int:
        return len(self.directions)

    @property
    def dim(self) -> int:
        return self.directions.shape[1]

    @property
    def origin(self) -> Origin:
        """What it is called, and the model it was made for."""
        model, revision = (self.metadata.get(key, "") for key in ("model", "revision"))
        return Origin(self.label, model, revision, self.n_layers)

    @property
    def label(self) -> str:
        """Its name or formula, or else the digest of the pairs it was made from."""
        about = self.metadata
        return about.get("name") or about.get("formula") or about.get("pairs_sha256", "")[:8]

    @property
    def _term(self) -> str:
        """How it stands in another one's formula."""
        label = self.label or "a vector"
        return f"({label})" if "formula" in self.metadata else label

    def __repr__(self) -> str:
        about = self.metadata
        facts = [f"{self.n_layers} layers of width {self.dim}"]
        if "method" in about:
            facts.append(f"{about['method']} of {about.get('pairs', '?')} pairs")
        if self.origin.model:
            facts.append(f"for {self.origin.made_for}")
        return f"<SteeringVector {self.label or 'unnamed'}: {', '.join(facts)}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in TENSORS)

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        return combine(self, other, 1.0) if isinstance(other, SteeringVector) else NotImplemented

    def __radd__(self, zero: int) -> "SteeringVector":
        return self if zero == 0 else NotImplemented  # what `sum` begins with

    def __sub__(self, other: "SteeringVector") -> "SteeringVector":
        return combine(self, other, -1.0) if isinstance(other, SteeringVector) else NotImplemented

    def __mul__(self, factor: float) -> "SteeringVector":
        if not isinstance(factor, numbers.Real):
            return NotImplemented
        factor = float(factor)
        about = self.metadata | {"formula": f"{factor:g} {self._term}"}
        return self._scaled(factor * self.difference, factor * self.moment, about)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "SteeringVector":
        return self * (1 / divisor) if isinstance(divisor, numbers.Real) else NotImplemented

    def __neg__(self) -> "SteeringVector":
        about = self.metadata | {"formula": f"-{self._term}"}
        return self._scaled(-self.difference, -self.moment, about)

    @property
    def difference(self) -> Tensor:
        """Mean difference of the states, (n_layers, D) float64."""
        return self.norms.double()[:, None] * self.directions.double()

    @property
    def moment(self) -> Tensor:
        """Projection of the states without the instruction on `difference`: linear in it."""
        return self.norms.double() * self.baselines.double()

    def _scaled(self, difference: Tensor, moment: Tensor, about: dict) -> "SteeringVector":
        norms = difference.norm(dim=-1)
        baselines = torch.where(norms > 0, moment / norms, 0.0)
        about = {key: value for key, value in about.items() if key != "name"}
        u, targets = unit(difference).float(), (baselines + norms).float()
        return SteeringVector(u, norms.float(), targets, baselines.float(), about)

    def random_like(self, seed: int | str = 0, without: Tensor | None = None) -> "SteeringVector":
        """Random directions with the same norms: the control of a claim.

        seed: a number, or a text that stands for one, so that what is named has a control of its
        own. without: mean states without the instruction, (n_layers, D), from which baselines and
        targets follow as for the vector itself; default none, which is enough for `add`.
        """
        if isinstance(seed, str):
            seed = zlib.crc32(seed.encode())
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.randn(self.directions.shape, generator=generator, device="cpu")
        directions = unit(noise) * (self.norms != 0)[:, None]
        baselines = (directions * (0.0 if without is None else without)).sum(-1)
        about = {k: v for k, v in self.metadata.items() if k in ("model", "revision", "tinysteer")}
        about["formula"] = f"random direction {seed} like {self._term}"
        return SteeringVector(directions, self.norms, baselines + self.norms, baselines, about)

    @overload
    def at(self, layer: int) -> Direction: ...
    @overload
    def at(self, layer: Sequence[int]) -> Directions: ...
    def at(self, layer: int | Sequence[int]) -> Direction | Directions:
        """The direction of one layer, or those of several, as in at(range(10, 21)), whose verbs
        make one edit a layer. Negative layers count from the last. ValueError.
        """
        if isinstance(layer, Sequence) and not isinstance(layer, str):
            if not layer:
                raise ValueError("at takes a layer, or several: there are none")
            return Directions(self.at(one) for one in layer)
        layer = layer_of(layer, self.n_layers)
        if self.norms[layer] == 0:
            raise ValueError(
                f"layer {layer} has no direction: states with and without it are equal"
            )
        norm, target, baseline = (float(getattr(self, name)[layer]) for name in TENSORS[1:])
        return Direction(layer, self.directions[layer], norm, target, baseline, self.origin)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: the four tensors, and the metadata as strings."""
        about = {**self.metadata, "format": FORMAT, "layers": CONVENTION}
        write_tensors(path, {name: getattr(self, name) for name in TENSORS}, about)

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVector":
        """Read what `save` wrote. FileNotFoundError, or ValueError for any other content."""
        tensors, metadata = read_tensors(path)
        try:
            if metadata.pop("format", None) != FORMAT or not tensors.keys() >= {*TENSORS}:
                raise ValueError(f"it is not a tinysteer vector (no format {FORMAT})")
            metadata.pop("layers", None)
            own = {k: t.float() if t.dtype in NUMBERS else t for k, t in tensors.items()}
            return cls(**{name: own[name] for name in TENSORS}, metadata=metadata)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def card(self, repo: str) -> str:
        """The README.md that `push_to_hub` publishes beside the file."""
        numbers = torch.stack((self.norms, self.targets, self.baselines), dim=1).tolist()
        return hub_card.card(repo, self.metadata, self.dim, numbers)

    def push_to_hub(self, repo: str, *, private: bool = False) -> str:
        """Publish the file and a generated card as `repo` ("owner/name") -> the page's address.

        Needs an account's token in HF_TOKEN or from `hf auth login`. ValueError,
        PermissionError, ConnectionError.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder) / HUB_FILE)
            (Path(folder) / "README.md").write_text(self.card(repo), encoding="utf-8")
            return push(folder, repo, private=private, message="Steering vector")

    @classmethod
    def from_hub(cls, repo: str, *, revision: str | None = None) -> "SteeringVector":
        """What `push_to_hub` published. FileNotFoundError, PermissionError, ConnectionError."""
        return cls.load(pull(repo, HUB_FILE, revision))


def combine(a: SteeringVector, b: SteeringVector, sign: float) -> SteeringVector:
    """a + sign b. ValueError where they have other layers or another width."""
    if a.directions.shape != b.directions.shape:
        shapes = " and ".join(f"{v.n_layers} layers of width {v.dim}" for v in (a, b))
        raise ValueError(f"vectors of {shapes} are of different models and cannot be added")
    difference = a.difference + sign * b.difference
    left = difference.norm(dim=-1) > 1e-6 * (a.norms + b.norms)  # of equal ones: rounding alone
    about = {
        key: value if value == b.metadata[key] else f"{value} and {b.metadata[key]}"
        for key, value in a.metadata.items()
        if key in b.metadata
    }
    about["formula"] = f"{a._term} {'+' if sign > 0 else '-'} {b._term}"
    return a._scaled(difference * left[:, None], a.moment + sign * b.moment, about)
