"""The front door: `load`, and the language model that it returns, a decoder with its tokenizer."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from typing_extensions import Unpack  # comes with torch

from tinysteer.decoding.explanation import Explanation, Read, directions_of, explain
from tinysteer.decoding.generation import (
    Options,
    check_lengths,
    decode,
    form_of,
    per_prompt,
    settled,
)
from tinysteer.decoding.pool import DecodingPool
from tinysteer.loading.checkpoint import load_config, load_decoder, parse_device, parse_dtype
from tinysteer.loading.hub import EMBEDDED, fetch, is_embedded
from tinysteer.model.cache import Cache
from tinysteer.model.config import Config
from tinysteer.model.decoder import CHUNK, Decoder, Seam
from tinysteer.model.recorder import Recorder
from tinysteer.steering.batch import Changing, Steer, changes, check_fit, per_row, seam
from tinysteer.steering.edits import Edit
from tinysteer.text.messages import FORM, Form, Prompt, check_form
from tinysteer.text.streaming import Answer, TextStream
from tinysteer.text.tokenizer import Tokenizer

Prompts = str | Sequence[Prompt]
Steering = Steer | Changing


def load(
    source: str | Path = EMBEDDED[0],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    *,
    chat_template: str | None = None,
    template_variables: Mapping[str, Any] | None = None,
) -> "LanguageModel":
    """Load a model from a folder in Hugging Face layout, or from the Hub by its id ("owner/name").

    "tiny-instruct" and "tiny-base" come with the package: 1.3 million parameters, for trying out.
    dtype: of the weights in memory, "float32" or torch.float32 and so on; default the
    checkpoint's own. device: default the GPU where there is one. revision: a branch, tag or
    commit of the Hub. chat_template: for the model's own, "" for none; template_variables: what it
    may use, such as a date. Errors are sentences that name the cure: ValueError for what the files
    hold, FileNotFoundError, PermissionError and ConnectionError for getting them.
    """
    dtype, device, folder = parse_dtype(dtype), parse_device(device), fetch(source, revision)
    config, tokenizer = (
        load_config(folder),
        Tokenizer.load(folder, chat_template, template_variables),
    )
    decoder = load_decoder(folder, config, dtype, device)
    if is_embedded(source):
        revision = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        return LanguageModel(decoder, tokenizer, str(source), revision)
    if Path(source).expanduser().is_dir():
        return LanguageModel(decoder, tokenizer, folder.resolve().name)
    return LanguageModel(decoder, tokenizer, str(source), folder.name)  # named by its commit


class LanguageModel:
    """A language model that can be steered. No edit stays behind in it when a call is over.

    Steering is an argument of every method. `steer` takes edits made by the verbs of
    `vector.at(layer)`: a list for all prompts, in order, or one list a prompt. `complete` and
    `stream` also take a function of the number of tokens chosen so far that returns such lists, so
    that edits may change while a text is made.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, name: str = "", revision: str = ""):
        self.decoder, self.tokenizer, self.name = decoder, tokenizer, name
        self.revision = revision  # a commit of the Hub; of an embedded model its weights' digest

    @property
    def decoder(self) -> Decoder:
        return self._decoder

    @decoder.setter
    def decoder(self, decoder: Decoder) -> None:
        self._decoder, self.pool = decoder, DecodingPool(decoder)

    @property
    def config(self) -> Config:
        return self.decoder.config

    @property
    def device(self) -> torch.device:
        return self.decoder.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.embed.weight.dtype

    def __repr__(self) -> str:
        c, dtype = self.config, str(self.dtype).removeprefix("torch.")
        return f"<{self.name}: {c.family}, {c.n_layers} layers of width {c.dim}, {dtype}>"

    @overload
    def complete(self, prompts: str, steer: Steering = ..., **options: Unpack[Options]) -> str: ...
    @overload
    def complete(
        self, prompts: Sequence[Prompt], steer: Steering = ..., **options: Unpack[Options]
    ) -> list[str]: ...
    def complete(
        self, prompts: Prompts, steer: Steering = None, **options: Unpack[Options]
    ) -> str | list[str]:
        """The texts of `generate` alone: one for a string, a list for a list."""
        answers = self.generate(prompts, steer, **options)
        return answers.text if isinstance(answers, Answer) else [one.text for one in answers]

    @overload
    def generate(
        self, prompts: str, steer: Steering = ..., **options: Unpack[Options]
    ) -> Answer: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], steer: Steering = ..., **options: Unpack[Options]
    ) -> list[Answer]: ...
    def generate(
        self, prompts: Prompts, steer: Steering = None, **options: Unpack[Options]
    ) -> Answer | list[Answer]:
        """The model's answers, each with its text, tokens, their log-probabilities and the reason
        why it ended: one for a string, a list, in order, for a list.

        prompts: users' messages, or conversations as lists of {"role": ..., "content": ...}.
        options: see `Options`. ValueError, before anything is run, for a prompt that exceeds the
        context, for edits that do not fit this model, for options unknown or out of range.
        """
        texts, pieces = self._begin(prompts, steer, options)
        for _ in pieces:
            pass
        answers = [text.answer for text in texts]
        return answers[0] if isinstance(prompts, str) else answers

    @overload
    def stream(
        self, prompts: str, steer: Steering = ..., **options: Unpack[Options]
    ) -> Iterator[str]: ...
    @overload
    def stream(
        self, prompts: Sequence[Prompt], steer: Steering = ..., **options: Unpack[Options]
    ) -> Iterator[tuple[int, str]]: ...
    def stream(
        self, prompts: Prompts, steer: Steering = None, **options: Unpack[Options]
    ) -> Iterator[str] | Iterator[tuple[int, str]]:
        """The same piece by piece: text for one string, (index, text) for a list of prompts.

        A function given as `steer` is asked before each step, and at 0 for the prompts and the
        first token. On a GPU a step is under way while the token before it is read: what changes
        after a piece has come acts from the token after the next.
        """
        _, pieces = self._begin(prompts, steer, options)
        return (piece for _, piece in pieces) if isinstance(prompts, str) else pieces

    def _begin(
        self, prompts: Prompts, steer: Steering, given: Options
    ) -> tuple[list[TextStream], Iterator[tuple[int, str]]]:
        """What will hold each answer, and the pieces, which are made as they are asked for."""
        options = settled(given)
        ids = self.prompt_ids(prompts, form_of(options))
        limits = per_prompt("max_new_tokens", options["max_new_tokens"], len(ids))
        seeds = per_prompt("seed", options["seed"], len(ids))
        first = self._edits(steer(0) if changes(steer) else steer, len(ids))
        check_lengths(ids, limits, self.config.context_length)

        def edits(n: int) -> list[list[Edit]]:
            return self._edits(steer(n), len(ids)) if n and changes(steer) else first

        stop_ids, stop = self.tokenizer.stops(options["stop"] or ())
        stop += self.tokenizer.stop_strings if options["chat"] else ()
        ends = self.tokenizer.stop_ids | stop_ids, stop
        texts = [TextStream(self.tokenizer.decode, limit, *ends) for limit in limits]
        return texts, decode(self.pool, ids, texts, edits, options, seeds)

    @overload
    def explain(
        self,
        prompts: str,
        steer: Steer = ...,
        *,
        read: Read = ...,
        max_new_tokens: int = ...,
        **form: Unpack[Form],
    ) -> Explanation: ...
    @overload
    def explain(
        self,
        prompts: Sequence[Prompt],
        steer: Steer = ...,
        *,
        read: Read = ...,
        max_new_tokens: int = ...,
        **form: Unpack[Form],
    ) -> list[Explanation]: ...
    def explain(
        self,
        prompts: Prompts,
        steer: Steer = None,
        *,
        read: Read = (),
        max_new_tokens: int = 0,
        **form: Unpack[Form],
    ) -> Explanation | list[Explanation]:
        """What the edits do to each token: which are moved, how far, and what that does to the
        next one. One `Explanation` for a string, a list for a list.

        read: directions, such as vector.at(15), to be read off every token without the edits.
        max_new_tokens: greedy new tokens, made with the edits, that are shown too, up to a stop
        id. form: as in `Options`. Errors as for `generate`.
        """
        ids, directions = self.prompt_ids(prompts, form), directions_of(read)
        rows = self._edits(steer, len(ids))
        self._edits([direction.ablate() for direction in directions], 1)  # whether they fit
        limits = per_prompt("max_new_tokens", max_new_tokens, len(ids))
        check_lengths(ids, limits, self.config.context_length)
        rest = zip(ids, rows, limits, strict=True)
        told = [explain(self.pool, self.tokenizer, directions, *row) for row in rest]
        return told[0] if isinstance(prompts, str) else told

    @torch.no_grad()
    def logits(
        self,
        tokens: Tensor,
        steer: Steer = None,
        *,
        start: Tensor | None = None,
        prompt_length: int | None = None,
    ) -> Tensor:
        """tokens (B, T) -> what follows each of them, (B, T, vocab_size) float32.

        start (B,): where rows padded on the left begin; default 0. prompt_length: how many of
        the columns are the prompt, for edits that tell it from what follows; default all.
        """
        chunks, cache, edits = self._run(tokens, steer, start, prompt_length)
        normed = torch.cat([self.decoder(chunk, cache, edits) for chunk in chunks], dim=1)
        return self.decoder.logits(normed)

    @torch.no_grad()
    def residuals(
        self,
        tokens: Tensor,
        steer: Steer = None,
        *,
        start: Tensor | None = None,
        prompt_length: int | None = None,
    ) -> Tensor:
        """tokens (B, T) -> the residual stream after every block, (n_layers, B, T, D).

        In the model's dtype, edits included. Other arguments as for `logits`.
        """
        chunks, cache, edits = self._run(tokens, steer, start, prompt_length)
        recorder = Recorder(self.config.n_layers, edits)
        for chunk in chunks:
            self.decoder(chunk, cache, recorder)
        return torch.stack([torch.cat(states, dim=1) for states in recorder.states])

    def _run(
        self, tokens: Tensor, steer: Steer, start: Tensor | None, prompt_length: int | None
    ) -> tuple[Sequence[Tensor], Cache, Seam]:
        if not isinstance(tokens, Tensor):
            raise ValueError(f"tokens must be a tensor (B, T), not {type(tokens).__name__}")
        if tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
            raise ValueError(
                f"tokens must be integers (B, T), not {tokens.dtype} {tuple(tokens.shape)}"
            )
        B, T = tokens.shape
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
            raise ValueError(f"tokens must be ids from 0 to {self.config.vocab_size - 1}")
        if self.config.context_length < T:
            raise ValueError(
                f"{T} tokens exceed the model's context of {self.config.context_length}"
            )
        if start is None:
            start = torch.zeros(B, dtype=torch.long, device="cpu")
        if start.shape != (B,) or not 0 <= int(start.min()) <= int(start.max()) < T:
            raise ValueError(f"start must be ({B},) columns from 0 to {T - 1}, not {start}")
        prompt_length = T if prompt_length is None else prompt_length
        if not 1 <= prompt_length <= T:
            raise ValueError(f"prompt_length is {prompt_length}; there are {T} columns of tokens")
        cache = Cache(self.decoder, start, prompt_length, T)
        edits = seam(self._edits(steer, B), self.decoder.embed.weight)
        return tokens.long().to(self.device).split(CHUNK, dim=1), cache, edits

    def prompt_ids(self, prompts: Prompts, form: Form = FORM) -> list[list[int]]:
        """Prompts as token ids, formatted as `form` says. ValueError that names the prompt."""
        rows = [prompts] if isinstance(prompts, str) else prompts
        if isinstance(rows, Mapping | bytes) or not isinstance(rows, Iterable):
            raise ValueError(f"prompts must be a string or a list, not {type(prompts).__name__}")
        sizes = self.config.vocab_size, self.config.context_length
        return self.tokenizer.rows(rows, check_form(form), *sizes)

    def _edits(self, steer: Steer, n_rows: int) -> list[list[Edit]]:
        rows = per_row(steer, n_rows)
        check_fit(rows, self.config.n_layers, self.config.dim, self.name, self.revision)
        return rows
