"""JSON in files, one object or one a line. Errors name file and line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, {} where there is no file. ValueError for any other content."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of a JSONL file behind its place, "FILE, line N"; empty lines are passed over.

    FileNotFoundError; ValueError for what is not UTF-8, not JSON or not an object.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{name}: a JSON {type(row).__name__}, not an object")
        yield name, row
