"""What lies in files: JSON, one object or one a line, and tensors. Errors name file and line."""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

Pairs = Callable[[list[tuple[str, Any]]], dict[str, Any]]


def read_object(text: bytes, name: str, pairs: Pairs | None = None) -> dict[str, Any]:
    """A JSON object in UTF-8, made by `pairs` where given. ValueError that names another text."""
    try:
        content = json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8; nested too deeply
        raise ValueError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds a {type(content).__name__}, not a JSON object")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, {} where there is no file. ValueError for any other content."""
    return read_object(path.read_bytes(), str(path)) if path.exists() else {}


def printable(text: object, most: int = 200) -> str:
    """A file's own words for a terminal: no line breaks, no escape sequences, and not too many."""
    words = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text)[: most + 1])
    return words if len(words) <= most else words[:most] + "..."


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of a JSONL file behind its place, "FILE, line N"; empty lines are passed over.

    FileNotFoundError; ValueError for what is not UTF-8, not JSON or not an object.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if line.strip():
            name = f"{path}, line {number}"
            yield name, read_object(line, name)


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write a safetensors file, all in float32. FileNotFoundError where there is no folder.

    Written here, since the library's own writer wants numpy, which nothing else here needs: the
    header's length, the header in JSON, the numbers.
    """
    if not (folder := Path(path).absolute().parent).is_dir():
        raise FileNotFoundError(f"there is no folder {folder} to save into")
    # As UTF-8 can hold them: names of files may have other bytes in them.
    texts = {key: str(text).encode(errors="replace").decode() for key, text in metadata.items()}
    header: dict[str, Any] = {"__metadata__": texts}
    data = b""
    for name, tensor in tensors.items():
        values = tensor.flatten().tolist()
        begin, data = len(data), data + struct.pack(f"<{len(values)}f", *values)
        offsets = [begin, len(data)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file -> its tensors, and its metadata. FileNotFoundError, ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no steering vector file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or is not a safetensors file: {error}") from None
