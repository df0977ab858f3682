"""Prompts in, text out: a batch decoded with a KV cache, steered, streamed row by row."""

import numbers
import operator
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from tinysteer.decoding.pool import DecodingPool
from tinysteer.decoding.sampling import Sampler
from tinysteer.decoding.step import BROKEN, Decoding
from tinysteer.steering.edits import Edit
from tinysteer.text.streaming import TextStream
from tinysteer.text.tokenizer import pad


@dataclass(frozen=True)
class Options:
    """How to generate. ValueError for a value out of its range.

    Where one value or one a prompt may be given, a row's text depends on its own value alone:
    the same prompt, edits and seed give the same text in any batch, up to rounding, which in
    half precision may tip a token.
    """

    max_new_tokens: int | Sequence[int] = 128  # one for all prompts, or one each
    temperature: float = 0.0  # 0: greedy
    # The next three cut what is drawn from, and need a temperature above 0.
    top_k: int | None = None  # draw from that many of the likeliest tokens
    top_p: float | None = None  # from the fewest tokens that hold this share of probability
    min_p: float | None = None  # from tokens at least this fraction as likely as the likeliest
    seed: int | Sequence[int] | None = None  # one for all prompts, or one each; None: at random
    stop: str | Sequence[str] | None = None  # strings that end a text, left out of it
    chat: bool = True  # put prompts into the model's chat template; False: take them as they are
    batch_size: int = 32  # prompts decoded together
    graph: bool = True  # on a GPU, capture a step and replay it; False: launch each anew
    kernels: bool = True  # on a GPU, use the kernels; False: PyTorch's operations

    def __post_init__(self):
        ranges = {  # what it must be, its type, whether it is in range
            "temperature": ("0 (greedy) or more", numbers.Real, lambda t: t >= 0),
            "top_k": ("1 or more", numbers.Integral, lambda k: k >= 1),
            "top_p": ("above 0 and at most 1", numbers.Real, lambda p: 0 < p <= 1),
            "min_p": ("from 0 to 1", numbers.Real, lambda p: 0 <= p <= 1),
            "batch_size": ("1 or more", numbers.Integral, lambda n: n >= 1),
        }
        cuts = ("top_k", "top_p", "min_p")
        for name, (words, kind, fits) in ranges.items():
            value = getattr(self, name)
            if value is None and name in cuts:
                continue
            if not (isinstance(value, kind) and fits(value)):
                raise ValueError(f"{name} is {value!r}; it must be {words}")
            if name in cuts and not self.temperature:
                raise ValueError(f"{name} changes nothing at temperature 0: set temperature too")
        if not all(isinstance(s, str) and s for s in self.stop_strings):
            raise ValueError(f"stop is {self.stop!r}; it must be strings that are not empty")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return tuple(self.stop) if isinstance(self.stop, list | tuple) else (self.stop,)

    def per_prompt(self, name: str, n_prompts: int) -> list:
        """`max_new_tokens` or `seed`, one value a prompt."""
        value = getattr(self, name)
        several = isinstance(value, Sequence) and not isinstance(value, str)
        values = list(value) if several else [value] * n_prompts
        if len(values) != n_prompts:
            raise ValueError(f"{name} has {len(values)} values for {n_prompts} prompts")
        for i, value in enumerate(values):
            absent = value is None and name == "seed"
            if not absent and not (isinstance(value, numbers.Integral) and 0 <= value < 2**63):
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
    rows: Sequence[TextStream],
    edits: Callable[[int], Sequence[Sequence[Edit]]],
    sampler: Sampler | None = None,
    *,
    graph: bool = True,
    kernels: bool = True,
) -> Iterator[tuple[int, str]]:
    """Yield (row, piece of text) until every row is done; prompts are lists of token ids.

    edits: how many tokens were chosen so far -> the edits for the next, a list a row.
    """
    tokens, start = pad(prompts, pool.decoder.multiple)
    limits = [row.limit for row in rows]
    stop_ids = frozenset().union(*(row.stop_ids for row in rows))
    with pool.take(len(prompts), tokens.shape[1] + max(limits), graph) as step:
        step.begin(tokens, start, limits, stop_ids, edits(0), sampler, kernels)
        for chosen in tokens_of(step, max(limits), edits):
            for i, (row, token) in enumerate(zip(rows, chosen, strict=True)):
                if row.done:
                    continue
                if token == BROKEN:
                    raise ValueError(
                        f"logits became NaN or infinite in {pool.decoder.embed.weight.dtype}: "
                        "lower the weights of the edits, or load the model in bfloat16 or float32"
                    )
                if piece := row.push(token):
                    yield i, piece
                if row.done:
                    step.end(i)
            if all(row.done for row in rows):
                return


def tokens_of(
    step: Decoding, n_tokens: int, edits: Callable[[int], Sequence[Sequence[Edit]]]
) -> Iterator[list[int]]:
    """What each step chose. On a GPU the step after it is on its way before that is read."""
    waiting = deque([step.read()])
    for n in range(1, n_tokens):
        if len(waiting) > step.lag:
            yield waiting.popleft()()
        step.steer(edits(n))
        step()
        waiting.append(step.read())
    for read in waiting:
        yield read()
