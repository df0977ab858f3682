"""The files of a tokenizer: tokenizer.json, and what lies around it, read and checked."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from tinysteer.text.files import printable, read_json

ABOUT, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
# Ends of a turn, for checkpoints whose configs name only the end of the text.
TURN_ENDS = ("<|end|>", "<end_of_turn>", "<|eot_id|>", "<|im_end|>")
TURN_BEGINS = ("<|user|>", "<start_of_turn>", "<|start_header_id|>", "<|im_start|>")
GROWTH = 1000  # times its length: a normaliser that makes more of a text is no tokenizer's


def read_vocabulary(folder: Path) -> tokenizers.Tokenizer:
    """tokenizer.json, without padding and truncation. FileNotFoundError, ValueError."""
    file = folder / "tokenizer.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json; where it has a tokenizer.model, convert that "
            "with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        vocabulary = tokenizers.Tokenizer.from_file(str(file))
        vocabulary.no_padding()
        vocabulary.no_truncation()
    except BaseException as error:  # the library raises bare Exceptions, and panics
        raise refused(f"{file} is damaged", error) from None
    for part in (vocabulary.normalizer, vocabulary.decoder):
        if part is not None and growth(json.loads(part.__getstate__())) > GROWTH:
            raise ValueError(f"{file} makes more than {GROWTH} characters of one: it is not loaded")
    return vocabulary


def refused(what: str, error: BaseException) -> BaseException:
    """What to raise for an error of the tokenizers library, whose panics are no Exceptions."""
    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
        return error
    return ValueError(f"{what}: {printable(error)}")


def growth(part: Mapping[str, Any]) -> float:
    """How many characters a normaliser or decoder makes of one, at most."""
    times = 1.0
    for inner in (*part.get("normalizers", ()), *part.get("decoders", ())):
        times *= growth(inner)
    if part.get("type") == "Replace":
        pattern = part.get("pattern", {}).get("String", "")
        times *= max(1 + len(part.get("content", "")) / max(len(pattern), 1), 1)
    return times * max(1, len(part.get("prepend", "")))


def read_special(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """tokenizer_config.json over special_tokens_map.json, and the special tokens they name."""
    about = read_json(folder / MAP) | read_json(folder / ABOUT)
    special: dict[str, str] = {}
    for key, value in about.items():
        if not key.endswith("_token") or value is None or isinstance(value, bool):
            continue  # "bos_token", not "add_bos_token": its text, or a description that holds it
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ValueError(f"{folder / ABOUT}: {key} is {value!r:.60}, not a token's text")
        special[key] = str(text)
    return about, special


def add_tokens(vocabulary: tokenizers.Tokenizer, folder: Path, about: Mapping[str, Any]) -> None:
    """Tokens that these files have beside tokenizer.json, in the order of their ids. ValueError."""
    told = {}
    for text, i in read_json(folder / ADDED).items():
        told[i] = {"content": text}
    declared = about.get("added_tokens_decoder") or {}
    if not isinstance(declared, dict):
        raise ValueError(f"{folder / ABOUT}: added_tokens_decoder is not an object")
    told |= {int(i) if i.isdecimal() else i: token for i, token in declared.items()}
    for i, token in told.items():
        content = token.get("content") if isinstance(token, dict) else None
        if type(i) is not int or not isinstance(content, str) or not content:
            raise ValueError(
                f"{folder}: added token {i!r:.40} is {token!r:.60}: not an id and a text"
            )
    for i in sorted(told):
        text = told[i]["content"]
        if vocabulary.token_to_id(text) is None:
            flags = {k: v for k, v in told[i].items() if k in FLAGS and isinstance(v, bool)}
            vocabulary.add_tokens([tokenizers.AddedToken(text, **{"special": True} | flags)])
        if vocabulary.token_to_id(text) != i:
            own = vocabulary.token_to_id(text)
            raise ValueError(
                f"{folder}: token {text!r:.60} is {own} in tokenizer.json, {i} elsewhere"
            )


FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_stops(folder: Path, vocabulary: tokenizers.Tokenizer, eos: str) -> frozenset[int]:
    """Ids that end a text, by all files that name any. ValueError for what is no id."""
    if eos and vocabulary.token_to_id(eos) is None:
        raise ValueError(f"{folder / ABOUT}: eos_token {eos!r:.60} is not in the vocabulary")
    ends = (vocabulary.token_to_id(end) for end in (eos, *TURN_ENDS))
    stops = {i for i in ends if i is not None}
    n = max(vocabulary.get_vocab().values(), default=-1) + 1
    for name in ("config.json", "generation_config.json"):
        c = read_json(folder / name)
        n = max(n, size_of(c))
        inner = c.get("text_config")
        told = c.get("eos_token_id", inner.get("eos_token_id") if isinstance(inner, dict) else None)
        for i in told if isinstance(told, list) else [told]:
            if i is None or (type(i) is int and i == -1):
                continue
            if type(i) is not int or not 0 <= i < n:
                raise ValueError(
                    f"{folder / name}: eos_token_id {i!r:.40} is not a whole number below {n}"
                )
            stops.add(i)
    return frozenset(stops)


def size_of(config: Mapping[str, Any]) -> int:
    """Rows of the embedding, which may be more than the vocabulary has tokens."""
    size = config.get("vocab_size")
    return size if type(size) is int else 0


def read_template(folder: Path, about: Mapping[str, Any]) -> str | None:
    """The chat template, from the three places where it may lie. ValueError for what is none."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_bytes().decode("utf-8-sig")
    template = read_json(folder / "chat_template.json").get("chat_template")
    template = template or about.get("chat_template")
    if isinstance(template, Sequence) and not isinstance(template, str):  # several, by name
        entries = [entry for entry in template if isinstance(entry, dict)]
        named = {str(entry.get("name")): entry.get("template") for entry in entries}
        template = named.get("default", next(iter(named.values()), None))
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{folder}: the chat template is {template!r:.60}, not a text")
    return template


def check_template(template: str, vocabulary: tokenizers.Tokenizer, folder: Path) -> None:
    """ValueError for a template whose turns are marked by tokens that the vocabulary lacks."""
    for token in sorted({*re.findall(r"<\|\w+\|>", template)}):
        if vocabulary.token_to_id(token) is None:
            raise ValueError(
                f"{folder}: its chat template writes {token}, which is not a token of it"
            )
