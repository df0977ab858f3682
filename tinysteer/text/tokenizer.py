"""Text to token ids and back: tokenizer.json, the model's chat template, stop ids, padding."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from tinysteer.text.chat import render
from tinysteer.text.messages import BEGUN, FORM, Form, Prompt, cut_at_end, read_messages
from tinysteer.text.tokenizer_files import (
    TURN_BEGINS,
    add_tokens,
    check_template,
    read_special,
    read_stops,
    read_template,
    read_vocabulary,
    refused,
)

CHARACTERS = 256  # of a token, at most: a longer prompt than this many for each is not tokenized


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
        template_variables: Mapping[str, Any] | None = None,
    ):
        self.vocabulary, self.template, self.stop_ids = vocabulary, template or None, stop_ids
        self.special = special or {}  # {"bos_token": "<s>", ...}, which templates may use
        self.bos_id = vocabulary.token_to_id(self.special.get("bos_token", ""))
        self.adds_bos = adds_bos and self.bos_id is not None
        self.template_variables = dict(template_variables or {})
        added = vocabulary.get_added_tokens_decoder().values()
        self.special_texts = [token.content for token in added if token.special and token.content]

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """A base model goes on to ask itself the next question."""
        return () if self.template else ("\nQ:",)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        template: str | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> "Tokenizer":
        """Read tokenizer.json and, where they are, the files around it.

        template: in place of the files' own, "" for none.
        """
        folder = Path(folder)
        vocabulary = read_vocabulary(folder)
        about, special = read_special(folder)
        add_tokens(vocabulary, folder, about)
        added = vocabulary.encode("", add_special_tokens=True).ids
        if added and "bos_token" not in special:  # named by tokenizer.json alone
            special["bos_token"] = vocabulary.id_to_token(added[0]) or ""
        bos_id = vocabulary.token_to_id(special.get("bos_token", ""))
        adds_bos = about.get("add_bos_token")
        if adds_bos is None:
            adds_bos = bos_id is not None and added[:1] == [bos_id]
        stop_ids = read_stops(folder, vocabulary, special.get("eos_token", ""))
        template = read_template(folder, about) if template is None else template
        if template:
            check_template(template, vocabulary, folder)
        elif turns := [text for text in TURN_BEGINS if vocabulary.token_to_id(text) is not None]:
            warnings.warn(
                f"{folder} has tokens of turns ({turns[0]}) and no chat template: prompts are "
                "asked as Q: ... A:, unless load(..., chat_template=) gives one",
                stacklevel=3,
            )
        return cls(
            vocabulary,
            template=template,
            special=special,
            adds_bos=bool(adds_bos),
            stop_ids=stop_ids,
            template_variables=template_variables,
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with one BOS in front where the model wants one."""
        ids = self.tokens(text)
        if not self.adds_bos or self.bos_id is None:
            return ids
        own = next((i for i, token in enumerate(ids) if token != self.bos_id), len(ids))
        return [self.bos_id, *ids[own:]]

    def tokens(self, text: str) -> list[int]:
        """Ids of what is written, and no others. ValueError for what is not text."""
        try:
            return self.vocabulary.encode(text, add_special_tokens=False).ids
        except TypeError:  # a lone surrogate, from bytes that were no UTF-8
            raise ValueError(f"{text!r:.200} is not valid text") from None
        except BaseException as error:
            raise refused("the tokenizer", error) from None

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

    def format(self, prompt: Prompt, form: Form = FORM) -> str:
        """A prompt as the model wants it: its chat template, or "Q: ...\\nA:" without one."""
        if self.template is None:
            if not isinstance(prompt, str):
                raise ValueError(
                    "this is a base model without a chat template: "
                    "give each prompt as one string, not as a conversation"
                )
            return f"Q: {prompt}\nA:"
        messages, begun = read_messages(prompt, self.special_texts, form), form["continue_final"]
        if begun:
            messages[-1]["content"] += BEGUN
        variables = {"messages": messages, "add_generation_prompt": not begun}
        absent = {"tools": None, "documents": None}  # templates ask whether they are none
        own = self.template_variables | dict(form["template_variables"] or {})
        text = render(self.template, self.special | absent | own | variables)
        return cut_at_end(text) if begun else text

    def chat(self, prompt: Prompt) -> list[int]:
        """Ids of a formatted prompt, as transformers' `apply_chat_template` gives them."""
        return self.ids(prompt)

    def ids(self, prompt: Prompt, form: Form = FORM, most: int | None = None) -> list[int]:
        """Ids of a prompt, formatted, or with chat=False as it is. ValueError for no prompt.

        most: characters, beyond which a text is refused before it becomes tokens. A template says
        itself where a BOS stands; elsewhere there is one where the model wants it.
        """
        if not isinstance(prompt, str):
            messages = prompt if isinstance(prompt, Sequence) else ()
            if not messages or not all(isinstance(message, Mapping) for message in messages):
                raise ValueError(
                    "a prompt is one string, or a conversation as a list of "
                    f'{{"role": ..., "content": ...}}, not {prompt!r:.200}'
                )
            if not form["chat"]:
                raise ValueError("a conversation needs the chat template: leave out chat=False")
        text = self.format(prompt, form) if form["chat"] else str(prompt)
        if most is not None and len(text) > most:
            raise ValueError(f"it has {len(text):,} characters, more than any context here holds")
        if not form["chat"] or self.template is None:
            return self.encode(text)
        return self.tokens(text)

    def rows(
        self, prompts: Iterable[Prompt], form: Form, n_embedded: int, context_length: int
    ) -> list[list[int]]:
        """Ids of several prompts. ValueError that names the prompt, also for ids not embedded."""
        rows = []
        for i, prompt in enumerate(prompts):
            try:
                row = self.ids(prompt, form, CHARACTERS * context_length)
            except ValueError as error:
                raise ValueError(f"prompt {i}: {error}") from None
            if (highest := max(row, default=0)) >= n_embedded:
                token = self.vocabulary.id_to_token(highest)
                what = f"prompt {i} has the token {token!r:.60}, {highest}"
                raise ValueError(f"{what}: this model embeds {n_embedded}")
            rows.append(row)
        return rows

    def stops(self, strings: Sequence[str]) -> tuple[frozenset[int], list[str]]:
        """Strings that end a text -> the ids of those that are special tokens, and the rest."""
        special, ids = self.special_texts, set()
        for string in strings:
            token_id = self.vocabulary.token_to_id(string) if string in special else None
            if token_id is not None:
                ids.add(token_id)
            elif held := [token for token in special if token in string]:
                raise ValueError(f"stop {string!r} holds {held[0]!r}: give that token alone")
        return frozenset(ids), [string for string in strings if string not in special]


def pad(prompts: Sequence[Sequence[int]], multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Lists of ids -> tokens (B, T), padded on the left, and the column each begins at (B,).

    T is the longest's length, rounded up to a multiple. Both on the CPU.
    """
    T = -(-max(map(len, prompts)) // multiple) * multiple
    start = torch.tensor([T - len(ids) for ids in prompts], device="cpu")
    rows = [[0] * (T - len(ids)) + list(ids) for ids in prompts]
    return torch.tensor(rows, device="cpu"), start
