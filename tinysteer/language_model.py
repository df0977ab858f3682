"""The front door: `load`, and the language model that it returns, a decoder with its tokenizer."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import torch
from torch import Tensor
from tqdm import tqdm

from tinysteer.decoding import generation
from tinysteer.decoding.explanation import Explanation, explain
from tinysteer.decoding.pool import DecodingPool
from tinysteer.decoding.sampling import Sampler
from tinysteer.loading.checkpoint import load_config, load_decoder, parse_device, parse_dtype
from tinysteer.loading.hub import EMBEDDED, fetch, is_embedded
from tinysteer.model.cache import Cache
from tinysteer.model.config import Config
from tinysteer.model.decoder import CHUNK, Decoder
from tinysteer.model.recorder import Recorder
from tinysteer.steering.batch import Changing, Steer, changes, check_fit, per_row, seam
from tinysteer.steering.edits import Edit
from tinysteer.text.streaming import TextStream
from tinysteer.text.tokenizer import Prompt, Tokenizer


def load(
    source: str | Path = EMBEDDED[0],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> "LanguageModel":
    """Load a model from a folder in Hugging Face layout, or from the Hub by its id ("owner/name").

    "tiny-instruct" and "tiny-base" come with the package: 1.3 million parameters, for trying out.
    dtype: of the weights in memory, "float32" or torch.float32 and so on; default the
    checkpoint's own. device: default the GPU where there is one. revision: a branch, tag or
    commit of the Hub. Errors are sentences that name the cure: ValueError for what the files
    hold, FileNotFoundError, PermissionError and ConnectionError for getting them.
    """
    dtype = parse_dtype(dtype)
    device = parse_device(device)
    folder = fetch(source, revision)
    config = load_config(folder)
    tokenizer = Tokenizer.load(folder)
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

    def complete(
        self, prompts: str | Sequence[Prompt], steer: Steer | Changing = None, **options
    ) -> list[str]:
        """The model's answers: one string a prompt, in order, without prompt or special tokens.

        prompts: users' messages, or conversations as lists of {"role": ..., "content": ...}.
        options: the fields of `Options`, such as max_new_tokens=128, temperature=0.0, seed=None,
        stop=(). ValueError, before anything is run, for a prompt that exceeds the context, for
        edits that do not fit this model and for options out of range.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        pieces = self.stream(prompts, steer, **options)
        texts = [""] * len(prompts)
        for i, piece in pieces:
            texts[i] += piece
        return texts

    @overload
    def stream(self, prompts: str, steer: Steer | Changing = None, **options) -> Iterator[str]: ...
    @overload
    def stream(
        self, prompts: Sequence[Prompt], steer: Steer | Changing = None, **options
    ) -> Iterator[tuple[int, str]]: ...
    def stream(self, prompts, steer=None, **options):
        """The same piece by piece: text for one string, (index, text) for a list of prompts.

        A function given as `steer` is asked before each step, and at 0 for the prompts and the
        first token. On a GPU a step is under way while the token before it is read: what changes
        after a piece has come acts from the token after the next.
        """
        if isinstance(prompts, str):
            return (piece for _, piece in self.stream([prompts], steer, **options))
        options = generation.Options(**options)
        ids = self._ids(prompts, options.chat)
        rows = [self._edits(steer(0) if changes(steer) else steer, len(ids))]
        limits = options.per_prompt("max_new_tokens", len(ids))
        seeds = options.per_prompt("seed", len(ids))
        generation.check_lengths(ids, limits, self.config.context_length)

        def edits(n: int) -> list[list[Edit]]:
            if not changes(steer):
                return rows[0]
            return rows.pop() if rows else self._edits(steer(n), len(ids))

        return self._stream(ids, edits, limits, seeds, options)

    def _stream(self, ids, edits, limits, seeds, options) -> Iterator[tuple[int, str]]:
        stop = options.stop_strings + (self.tokenizer.stop_strings if options.chat else ())
        # Prompts of like length share a batch; rows that may not get a token need none.
        order = sorted((i for i in range(len(ids)) if limits[i]), key=lambda i: len(ids[i]))
        size = options.batch_size
        batches = [order[at : at + size] for at in range(0, len(order), size)]
        for batch in tqdm(batches, "batches", leave=False, disable=None if batches[1:] else True):
            sampler = None
            if options.temperature:
                draws = [seeds[i] for i in batch], max(limits[i] for i in batch)
                cuts = options.top_k, options.top_p, options.min_p
                sampler = Sampler(*draws, options.temperature, *cuts, self.device)
            streams = [
                TextStream(self.tokenizer.decode, limits[i], self.tokenizer.stop_ids, stop)
                for i in batch
            ]

            def of_batch(n: int, batch: list[int] = batch) -> list[list[Edit]]:
                rows = edits(n)
                return [rows[i] for i in batch]

            how = {"graph": options.graph, "kernels": options.kernels}
            own = [ids[i] for i in batch]
            for row, piece in generation.decode(self.pool, own, streams, of_batch, sampler, **how):
                yield batch[row], piece

    def explain(
        self,
        prompts: str | Sequence[Prompt],
        steer: Steer = None,
        *,
        max_new_tokens: int = 0,
        chat: bool = True,
    ) -> list[Explanation]:
        """Which tokens the edits move, at which layers and how far: one `Explanation` a prompt.

        The prompts are run as one padded batch; with max_new_tokens their greedy continuations,
        made with the edits, are shown too, up to a stop id. Errors as for `complete`.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        ids = self._ids(prompts, chat)
        edits = self._edits(steer, len(ids))
        limits = generation.Options(max_new_tokens).per_prompt("max_new_tokens", len(ids))
        generation.check_lengths(ids, limits, self.config.context_length)
        return explain(self.decoder, self.tokenizer, ids, edits, limits[0]) if ids else []

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
        chunks, cache, steer = self._run(tokens, steer, start, prompt_length)
        normed = torch.cat([self.decoder(chunk, cache, steer) for chunk in chunks], dim=1)
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
        chunks, cache, steer = self._run(tokens, steer, start, prompt_length)
        recorder = Recorder(self.config.n_layers, steer)
        for chunk in chunks:
            self.decoder(chunk, cache, recorder)
        return torch.stack([torch.cat(states, dim=1) for states in recorder.states])

    def _run(self, tokens, steer, start, prompt_length):
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
        steer = seam(self._edits(steer, B), self.decoder.embed.weight)
        return tokens.long().to(self.device).split(CHUNK, dim=1), cache, steer

    def _ids(self, prompts: Sequence[Prompt], chat: bool) -> list[list[int]]:
        if not isinstance(prompts, Sequence):
            raise ValueError(f"prompts must be a string or a list, not {type(prompts).__name__}")
        return [self.tokenizer.ids(prompt, chat) for prompt in prompts]

    def _edits(self, steer: Steer, n_rows: int) -> list[list[Edit]]:
        rows = per_row(steer, n_rows)
        check_fit(rows, self.config.n_layers, self.config.dim, self.name, self.revision)
        return rows
