"""Plans: edits written down in JSON, for the command line and for programs alike.

    {"edits": [{"vector": "json.safetensors", "layer": 3, "verb": "to_target"},
               {"vector": "brief.safetensors", "layers": [2, 4], "verb": "add", "times": 1.5,
                "where": [0, 64]}]}

`vector` is a file, entries from the plan's folder; `layer`, or `layers` from the first to the last,
and `verb` say which edits; `times` or `weight` is for add, `alpha` and `target` for to_target,
at_least and at_most; `where` is one of edits.WINDOWS or [first, stop]. What is left out has the
verb's default.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from tinysteer.steering.edits import LARGEST, WINDOWS, Edit, window
from tinysteer.steering.vectors import SteeringVector
from tinysteer.text.files import read_object

TARGETS = ("alpha", "target")
VERBS = {  # the numbers each may be given
    "add": ("times", "weight"),
    "to_target": TARGETS,
    "at_least": TARGETS,
    "at_most": TARGETS,
    "ablate": (),
}
ONE_OF = (("layer", "layers"), ("times", "weight"))  # of which an entry has one at most
FORM = '{"edits": [...]}'


def load_plan(source: str | Path | Mapping[str, Any], folder: str | Path = ".") -> list[Edit]:
    """A plan's file, or its content as a dict -> its edits, in order.

    Vectors' files are entries from the plan's own folder, a dict's from `folder`. ValueError that
    names the key which is wrong, before any vector is read; FileNotFoundError.
    """
    if isinstance(source, Mapping):
        return make_edits(source, "plan", Path(folder))
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"there is no plan {path}")
    content = read_object(path.read_bytes(), str(path), unique)
    return make_edits(content, str(path), path.parent)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What JSON leaves open: a key that stands twice is an error."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"{next(k for k in names if names.count(k) > 1)!r} stands there twice")
    return entries


def make_edits(content: Mapping[str, Any], name: str, folder: Path) -> list[Edit]:
    """A plan's content -> its edits; `name` is what errors call it."""
    for key in content:
        if key != "edits":
            raise ValueError(f"{name}: {key!r} is not a key of a plan, which is {FORM}")
    entries = content.get("edits")
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise ValueError(f"{name}: 'edits' must be a list: a plan is {FORM}")
    for i, entry in enumerate(entries):
        check_entry(entry, f"{name}: edits[{i}]")
    vectors: dict[str, SteeringVector] = {}
    edits = []
    for i, entry in enumerate(entries):
        file, key = str(entry["vector"]), "layers" if "layers" in entry else "layer"
        layers = span(*entry[key]) if key == "layers" else [entry[key]]
        try:
            if file not in vectors:
                vectors[file] = SteeringVector.load(folder / file)
            directions = vectors[file].at(layers)
        except (ValueError, FileNotFoundError) as error:
            key = key if file in vectors else "vector"
            raise type(error)(f"{name}: edits[{i}].{key}: {error}") from None
        numbers = {key: entry[key] for key in VERBS[entry["verb"]] if key in entry}
        edits += getattr(directions, entry["verb"])(**numbers, where=entry.get("where", "all"))
    return edits


def check_entry(entry: Any, name: str) -> None:
    """ValueError naming the key that is missing, unknown or of the wrong type."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{name} is {entry!r:.40}, not an object with vector, layer and verb")
    verb = entry.get("verb")
    kinds = {  # what a value must be, and whether it is
        "vector": ("a file's name", lambda v: isinstance(v, str | Path) and str(v)),
        "layer": ("a whole number", lambda v: is_number(v, Integral)),
        "layers": ("[first, last] with first <= last, whole numbers from 0 on", is_span),
        "verb": (f"one of {', '.join(VERBS)}", lambda v: isinstance(v, str) and v in VERBS),
        "where": (f"one of {', '.join(WINDOWS)}, or [first, stop] with null for no end", window),
    }
    numbers = VERBS.get(verb, ()) if isinstance(verb, str) else ()
    kinds |= dict.fromkeys(numbers, ("a finite number", is_number))
    strange = [f"; {key!r} is not a key" for key in entry if key not in kinds]
    for key in ("vector", "layer", "verb"):
        if key not in entry and not (key == "layer" and "layers" in entry):
            raise ValueError(f"{name}.{key} is missing{''.join(strange)}")
    for both in ONE_OF:
        if entry.keys() >= {*both}:
            raise ValueError(f"{name} has {' and '.join(both)}: give one of them")
    for key in ("verb", *entry):
        if key not in kinds:
            raise ValueError(f"{name}.{key} is not a key of {verb}, which has {', '.join(kinds)}")
        words, fits = kinds[key]
        with suppress(ValueError):
            if fits(entry[key]):
                continue
        raise ValueError(f"{name}.{key} is {entry[key]!r:.40}; it must be {words}")


def span(first: int, last: int) -> range:
    """The layers from the first to the last, both included. ValueError where there are none."""
    if not 0 <= first <= last:
        raise ValueError(f"layers {first} to {last}: write the first and the last, from 0 on")
    return range(first, last + 1)


def is_span(value: Any) -> bool:
    whole = isinstance(value, Sequence) and all(is_number(v, Integral) for v in value)
    return whole and len(value) == 2 and bool(span(*value))


def is_number(value: Any, kind: Any = Real) -> bool:
    """Of that kind, not too large, and not a truth value, which Python takes for a number."""
    return isinstance(value, kind) and not isinstance(value, bool) and abs(value) <= LARGEST
