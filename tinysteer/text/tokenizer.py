"""Text to token ids and back: tokenizer.json, the model's chat template, stop ids, padding."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

from tinysteer.text.chat import render
from tinysteer.text.files import read_json

# Ends of a turn, for checkpoints whose configs name only the end of the text.
TURN_ENDS = ("<|end|>", "<end_of_turn>", "<|eot_id|>", "<|im_end|>")
Prompt = str | Sequence[Mapping[str, str]]  # a user's message, or a whole conversation


class Tokenizer:
    """A model's vocabulary and the form it wants its prompts in.

    `template` is the chat template, None for a base model; `stop_ids` end a text.
    """

    def __init__(
        self,
        vocabulary: tokenizers.Tokenizer,
        *,
        template: str | None = None,
        special: dict[str, str] | None = None,
        adds_bos: bool = False,
        stop_ids: frozenset[int] = frozenset(),
    ):
        self.vocabulary, self.template, self.stop_ids = vocabulary, template or None, stop_ids
        self.special = special or {}  # {"bos_token": "<s>", ...}, which templates may use
        self.bos_id = vocabulary.token_to_id(self.special.get("bos_token", ""))
        self.adds_bos = adds_bos and self.bos_id is not None
        # A base model goes on to ask itself the next question.
        self.stop_strings = () if self.template else ("\nQ:",)

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read tokenizer.json and, where they are, the files around it."""
        folder = Path(folder)
        try:
            vocabulary = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exceptions
            if (folder / "tokenizer.json").exists():
                raise ValueError(f"{folder / 'tokenizer.json'} is damaged: {error}") from None
            raise FileNotFoundError(
                f"{folder} has no tokenizer.json; where it has a tokenizer.model, convert that "
                "with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            ) from None
        vocabulary.no_padding()
        vocabulary.no_truncation()
        files = folder / "special_tokens_map.json", folder / "tokenizer_config.json"
        about = read_json(files[0]) | read_json(files[1])
        special = {  # "bos_token", not "add_bos_token": its text, or a description that holds it
            key: value["content"] if isinstance(value, dict) else value
            for key, value in about.items()
            if key.endswith("_token") and isinstance(value, str | dict)
        }
        added = vocabulary.encode("", add_special_tokens=True).ids
        if added and "bos_token" not in special:  # named by tokenizer.json alone
            special["bos_token"] = vocabulary.id_to_token(added[0])
        bos_id = vocabulary.token_to_id(special.get("bos_token", ""))
        adds_bos = about.get("add_bos_token")
        if adds_bos is None:
            adds_bos = bos_id is not None and added[:1] == [bos_id]
        ends = special.get("eos_token", ""), *TURN_ENDS
        stops: set[int | None] = {vocabulary.token_to_id(end) for end in ends}
        for name in ("config.json", "generation_config.json"):
            c = read_json(folder / name)
            ids = c.get("eos_token_id", (c.get("text_config") or {}).get("eos_token_id"))
            stops |= set(ids) if isinstance(ids, list) else {ids}
        ids = frozenset(i for i in stops if i is not None)
        template = read_template(folder, about)
        return cls(vocabulary, template=template, special=special, adds_bos=adds_bos, stop_ids=ids)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with one BOS in front where the model wants one."""
        try:
            ids = self.vocabulary.encode(text, add_special_tokens=False).ids
        except TypeError:  # a lone surrogate, from bytes that were no UTF-8
            raise ValueError(f"{text!r} is not valid text") from None
        if not self.adds_bos or self.bos_id is None:
            return ids
        own = next((i for i, token in enumerate(ids) if token != self.bos_id), len(ids))
        return [self.bos_id, *ids[own:]]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self.vocabulary.decode(list(ids), skip_special_tokens=True)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token as it reads behind the one before it, special ones by name, escaped."""
        pieces, show = [], partial(self.vocabulary.decode, skip_special_tokens=False)
        for i in range(len(ids)):
            before = show(list(ids[max(i - 1, 0) : i]))
            text = show(list(ids[max(i - 1, 0) : i + 1]))[len(before) :]
            pieces.append(repr(text)[1:-1] or f"<{ids[i]}>")
        return pieces

    def format(self, prompt: Prompt) -> str:
        """A prompt as the model wants it: its chat template, or "Q: ...\\nA:" without one."""
        if self.template is None:
            if not isinstance(prompt, str):
                raise ValueError(
                    "this is a base model without a chat template: "
                    "give each prompt as one string, not as a conversation"
                )
            return f"Q: {prompt}\nA:"
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        variables = {"messages": list(map(dict, messages)), "add_generation_prompt": True}
        absent = {"tools": None, "documents": None}  # templates ask whether they are none
        return render(self.template, self.special | absent | variables)

    def chat(self, prompt: Prompt) -> list[int]:
        """Ids of a formatted prompt, whose template may bring a BOS of its own or not."""
        return self.encode(self.format(prompt))

    def ids(self, prompt: Prompt, chat: bool = True) -> list[int]:
        """Ids of a prompt, formatted, or with chat=False as it is. ValueError for no prompt."""
        if isinstance(prompt, str):
            return self.chat(prompt) if chat else self.encode(prompt)
        messages = prompt if isinstance(prompt, Sequence) else ()
        if not messages or not all(isinstance(message, Mapping) for message in messages):
            raise ValueError(
                "a prompt is one string, or a conversation as a list of "
                f'{{"role": ..., "content": ...}}, not {prompt!r}'
            )
        if not chat:
            raise ValueError("a conversation needs the chat template: leave out chat=False")
        return self.chat(prompt)


def pad(prompts: Sequence[Sequence[int]], multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Lists of ids -> tokens (B, T), padded on the left, and the column each begins at (B,).

    T is the longest's length, rounded up to a multiple. Both on the CPU.
    """
    T = -(-max(map(len, prompts)) // multiple) * multiple
    start = torch.tensor([T - len(ids) for ids in prompts], device="cpu")
    rows = [[0] * (T - len(ids)) + list(ids) for ids in prompts]
    return torch.tensor(rows, device="cpu"), start


def read_template(folder: Path, about: dict) -> str | None:
    """The chat template, from the three places where it may lie."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = read_json(folder / "chat_template.json").get("chat_template")
    template = template or about.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default", next(iter(named.values()), None))
    return template
