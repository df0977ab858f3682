"""Plans: edits written down in JSON, for the command line and for programs alike.

    {"edits": [{"vector": "json.safetensors", "layer": 3, "verb": "to_target"},
               {"vector": "brief.safetensors", "layer": 2, "verb": "add", "weight": 4.0,
                "where": [0, 64]}]}

`vector` is a file, found from the plan's folder; `layer` and `verb` say which edit; `weight` is
for add, `alpha` and `target` for to_target, at_least and at_most; `where` is one of edits.WINDOWS
or [first, stop]. What is left out has the verb's default.
"""

import json
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from tinysteer.edits import WINDOWS, Edit
from tinysteer.vectors import SteeringVector

TARGETS = ("alpha", "target")
VERBS = {  # the numbers each may be given
    "add": ("weight",),
    "to_target": TARGETS,
    "at_least": TARGETS,
    "at_most": TARGETS,
    "ablate": (),
}
NEEDED = ("vector", "layer", "verb")


def load_plan(source: str | Path | Mapping[str, Any], folder: str | Path = ".") -> list[Edit]:
    """A plan's file, or its content as a dict -> its edits, in order.

    Vectors' files are found from the plan's own folder, a dict's from `folder`. ValueError that
    names the key which is wrong, before any vector is read; FileNotFoundError.
    """
    if isinstance(source, Mapping):
        return make_edits(source, "plan", Path(folder))
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"there is no plan {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    return make_edits(content, str(path), path.parent)


def make_edits(content: Any, name: str, folder: Path) -> list[Edit]:
    """A plan's content -> its edits; `name` is what errors call it."""
    if not isinstance(content, Mapping) or not isinstance(content.get("edits"), list):
        raise ValueError(f'{name}: a plan is {{"edits": [...]}}')
    for key in content.keys() - {"edits"}:
        raise ValueError(f'{name}: {key!r} is no key of a plan, which is {{"edits": [...]}}')
    for i, entry in enumerate(content["edits"]):
        check_entry(entry, f"{name}: edits[{i}]")
    vectors: dict[str, SteeringVector] = {}
    edits = []
    for i, entry in enumerate(content["edits"]):
        file = entry["vector"]
        if file not in vectors:
            vectors[file] = SteeringVector.load(folder / file)
        try:
            edits.append(make_edit(vectors[file], entry))
        except ValueError as error:  # a layer the vector does not have, an empty window
            raise ValueError(f"{name}: edits[{i}]: {error}") from None
    return edits


def make_edit(vector: SteeringVector, entry: Mapping[str, Any]) -> Edit:
    """A checked entry -> its edit."""
    numbers = {key: entry[key] for key in VERBS[entry["verb"]] if key in entry}
    where = entry.get("where", "all")
    where = where if isinstance(where, str) else tuple(where)
    return getattr(vector.at(entry["layer"]), entry["verb"])(**numbers, where=where)


def check_entry(entry: Any, name: str) -> None:
    """ValueError naming the key that is missing, unknown or of the wrong type."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{name} is {entry!r}, not an object with {', '.join(NEEDED)}")
    for key in NEEDED:
        if key not in entry:
            raise ValueError(f"{name}.{key} is missing")
    verb = entry["verb"]
    if not isinstance(verb, str) or verb not in VERBS:
        raise ValueError(f"{name}.verb is {verb!r}; it must be one of {', '.join(VERBS)}")
    kinds = {  # what a value must be, and whether it is
        "vector": ("a file's name", lambda v: isinstance(v, str) and v),
        "layer": ("a whole number", lambda v: isinstance(v, Integral) and not truth(v)),
        "verb": ("a verb", lambda v: True),
        "where": (
            f"one of {', '.join(WINDOWS)}, or [first, stop] with null for no end",
            is_window,
        ),
        **{
            key: ("a number", lambda v: isinstance(v, Real) and not truth(v)) for key in VERBS[verb]
        },
    }
    for key, value in entry.items():
        if key not in kinds:
            raise ValueError(f"{name}.{key} is no key of {verb}, which has {', '.join(kinds)}")
        words, fits = kinds[key]
        if not fits(value):
            raise ValueError(f"{name}.{key} is {value!r}; it must be {words}")


def truth(value: Any) -> bool:
    return isinstance(value, bool)


def is_window(value: Any) -> bool:
    if isinstance(value, str):
        return value in WINDOWS
    ends = value if isinstance(value, list | tuple) else ()
    return len(ends) == 2 and all(
        end is None or (isinstance(end, Integral) and not truth(end)) for end in ends
    )
