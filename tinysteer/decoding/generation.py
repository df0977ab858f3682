"""Prompts in, answers out: a batch decoded with a KV cache, steered, streamed row by row."""

import difflib
import numbers
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from tinysteer.decoding.pool import DecodingPool
from tinysteer.decoding.sampling import Sampler
from tinysteer.decoding.step import BROKEN, Batch, Decoding, decode_tokens
from tinysteer.steering.batch import Rows
from tinysteer.text.messages import FORM, Form, check_form
from tinysteer.text.streaming import TextStream


class Options(Form, total=False):
    """How to generate: what `complete`, `generate` and `stream` take by keyword. See DEFAULTS.

    Where one value or one a prompt may be given, a row's text depends on its own value alone:
    the same prompt, edits and seed give the same text in any batch, up to rounding, which in
    half precision may tip a token.
    """

    max_new_tokens: int | Sequence[int]  # one for all prompts, or one each
    temperature: float  # 0: greedy
    # The next three cut what is drawn from, and need a temperature above 0.
    top_k: int | None  # draw from that many of the likeliest tokens
    top_p: float | None  # from the fewest tokens that hold this share of probability
    min_p: float | None  # from tokens at least this fraction as likely as the likeliest
    seed: int | Sequence[int] | None  # one for all prompts, or one each; None: at random
    stop: str | Sequence[str] | None  # strings that end a text, left out of it
    batch_size: int  # prompts decoded together
    graph: bool  # on a GPU, capture a step and replay it; False: launch each anew
    kernels: bool  # on a GPU, use the kernels; False: PyTorch's operations


DEFAULTS: Options = {
    "max_new_tokens": 128,
    "temperature": 0.0,
    "top_k": None,
    "top_p": None,
    "min_p": None,
    "seed": None,
    "stop": None,
    **FORM,
    "batch_size": 32,
    "graph": True,
    "kernels": True,
}
CUTS = ("top_k", "top_p", "min_p")
RANGES: dict[str, tuple[str, type, Callable[[Any], bool]]] = {  # in words, a type, whether it fits
    "temperature": ("0 (greedy) or more", numbers.Real, lambda t: t >= 0),
    "top_k": ("1 or more", numbers.Integral, lambda k: k >= 1),
    "top_p": ("above 0 and at most 1", numbers.Real, lambda p: 0 < p <= 1),
    "min_p": ("from 0 to 1", numbers.Real, lambda p: 0 <= p <= 1),
    "batch_size": ("1 or more", numbers.Integral, lambda n: n >= 1),
}


def nearest(name: str, names: Sequence[str]) -> str:
    """A question that names what was probably meant, or nothing."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def settled(given: Options) -> Options:
    """The options, defaults for the rest, `stop` as a list. ValueError: unknown, out of range."""
    for name in given:
        if name not in DEFAULTS:
            others = nearest(name, [*DEFAULTS]) or f"; options are {', '.join(DEFAULTS)}"
            raise ValueError(f"{name} is not an option{others}")
    options: Options = {**DEFAULTS, **given}
    values: dict[str, Any] = {**options}
    for name, (words, kind, fits) in RANGES.items():
        value = values[name]
        if value is None and name in CUTS:
            continue
        if not (isinstance(value, kind) and fits(value)):
            raise ValueError(f"{name} is {value!r}; it must be {words}")
        if name in CUTS and not options["temperature"]:
            raise ValueError(f"{name} changes nothing at temperature 0: set temperature too")
    stop: Any = options["stop"]
    stop = [] if stop is None else list(stop) if isinstance(stop, list | tuple) else [stop]
    if not all(isinstance(s, str) and s for s in stop):
        raise ValueError(f"stop is {options['stop']!r}; it must be strings that are not empty")
    check_form(form_of(options))
    return {**options, "stop": stop}


def form_of(options: Options) -> Form:
    return {name: options[name] for name in FORM}  # type: ignore[literal-required,return-value]


def per_prompt(name: str, value: Any, n_prompts: int) -> list:
    """`max_new_tokens` or `seed`, one value a prompt. ValueError."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    values = list(value) if several else [value] * n_prompts
    if len(values) != n_prompts:
        raise ValueError(f"{name} has {len(values)} values for {n_prompts} prompts")
    for i, value in enumerate(values):
        absent = value is None and name == "seed"
        if not absent and not (isinstance(value, numbers.Integral) and 0 <= int(value) < 2**63):
            raise ValueError(
                f"{name} is {value!r} for prompt {i}; it must be a whole number, 0 or more"
            )
    return [value if value is None else operator.index(value) for value in values]


def check_lengths(
    prompts: Sequence[Sequence[int]], limits: Sequence[int], context_length: int
) -> None:
    """ValueError for a prompt that is empty or leaves no room for its new tokens."""
    for i, (ids, limit) in enumerate(zip(prompts, limits, strict=True)):
        if not ids:
            raise ValueError(f"prompt {i} is empty")
        if len(ids) + limit > context_length:
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens and may get {limit} new ones: "
                f"{len(ids) + limit} exceed the model's context of {context_length}; "
                "shorten the prompt or lower max_new_tokens"
            )


@torch.inference_mode()
def decode(
    pool: DecodingPool,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[TextStream],
    edits: Callable[[int], Rows],
    options: Options = DEFAULTS,
    seeds: Sequence[int | None] = (),
) -> Iterator[tuple[int, str]]:
    """Yield (prompt's index, piece of text) until every text is done; prompts are token ids.

    edits: how many tokens were chosen so far -> the edits for the next, a list a prompt. options:
    settled ones. ValueError for logits that are not finite.
    """
    # Prompts of like length share a batch; those that may not get a token need none.
    order = sorted((i for i, t in enumerate(texts) if t.limit), key=lambda i: len(prompts[i]))
    size, device = options["batch_size"], pool.decoder.embed.weight.device
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    for rows in tqdm(batches, "batches", leave=False, disable=None if batches[1:] else True):
        limits, sampler = [texts[i].limit for i in rows], None
        if options["temperature"]:
            cuts = options["top_k"], options["top_p"], options["min_p"]
            drawn = [seeds[i] for i in rows], max(limits), options["temperature"]
            sampler = Sampler(*drawn, *cuts, device)
        how = limits, texts[0].stop_ids, sampler, options["kernels"]
        batch = Batch.of([prompts[i] for i in rows], pool.decoder, *how)

        def of_rows(n: int, rows: list[int] = rows) -> Rows:
            lists = edits(n)
            return [lists[i] for i in rows]

        with pool.take(len(rows), batch.length, options["graph"]) as decoding:
            steps = decode_tokens(decoding, batch, of_rows)
            yield from pushed(steps, {i: texts[i] for i in rows}, decoding)


def pushed(
    steps: Iterator[tuple[list[int], list[float]]], texts: dict[int, TextStream], decoding: Decoding
) -> Iterator[tuple[int, str]]:
    """Each step's tokens put into the texts, a row each, and what that makes certain."""
    for tokens, logprobs in steps:
        for b, (prompt, text) in enumerate(texts.items()):
            if text.done:
                continue
            if tokens[b] == BROKEN:
                raise ValueError(
                    f"logits became NaN or infinite in {decoding.decoder.embed.weight.dtype}: "
                    "lower the weights of the edits, or load the model in bfloat16 or float32"
                )
            if piece := text.push(tokens[b], logprobs[b]):
                yield prompt, piece
            if text.done:
                decoding.end(b)
        if all(text.done for text in texts.values()):
            return
