"""Prompts in, text out: a batch decoded with a KV cache, steered, streamed row by row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tinysteer.model import Cache, Decoder, Seam, unsteered
from tinysteer.sampling import Pick, greedy
from tinysteer.streaming import TextStream
from tinysteer.tokenizer import pad


@dataclass(frozen=True)
class Options:
    """How to generate. ValueError for a value out of its range.

    Where one value or one a prompt may be given, a row's text depends on its own value alone:
    the same prompt, edits and seed give the same text in any batch.
    """

    max_new_tokens: int | Sequence[int] = 128  # one for all prompts, or one each
    temperature: float = 0.0  # 0: greedy
    top_k: int | None = None  # draw from that many of the likeliest tokens
    top_p: float | None = None  # from the fewest tokens that hold this share of probability
    min_p: float | None = None  # from tokens at least this fraction as likely as the likeliest
    seed: int | Sequence[int] | None = None  # one for all prompts, or one each; None: at random
    stop: str | Sequence[str] = ()  # strings that end a text, left out of it
    chat: bool = True  # put prompts into the model's chat template; False: take them as they are
    batch_size: int = 32  # prompts decoded together

    def __post_init__(self):
        ranges = {
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k is None or self.top_k >= 1, "1 or more"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1"),
            "batch_size": (self.batch_size >= 1, "1 or more"),
            "stop": ("" not in self.stop_strings, "strings that are not empty"),
        }
        for name, (fits, range_) in ranges.items():
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {range_}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def per_prompt(self, name: str, n_prompts: int) -> list:
        """`max_new_tokens` or `seed`, one value a prompt."""
        value = getattr(self, name)
        if value is None or isinstance(value, int):
            return [value] * n_prompts
        if len(value) != n_prompts:
            raise ValueError(f"{name} has {len(value)} values for {n_prompts} prompts")
        return list(value)


def check_lengths(
    prompts: Sequence[Sequence[int]], limits: Sequence[int], context_length: int
) -> None:
    """ValueError for a prompt that is empty or leaves no room for its new tokens."""
    for i, (ids, limit) in enumerate(zip(prompts, limits, strict=True)):
        if not ids:
            raise ValueError(f"prompt {i} is empty")
        if limit < 0:
            raise ValueError(f"max_new_tokens is {limit} for prompt {i}; it must be 0 or more")
        if len(ids) + limit > context_length:
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens and may get {limit} new ones: "
                f"{len(ids) + limit} exceed the model's context of {context_length}; "
                "shorten the prompt or lower max_new_tokens"
            )


def decode(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[TextStream],
    steer: Seam = unsteered,
    pick: Pick = greedy,
) -> Iterator[tuple[int, str]]:
    """Yield (row, piece of text) until every row is done; prompts are lists of token ids."""
    tokens, start = pad(prompts)
    tokens, prompt = tokens.to(decoder.embed.weight.device), tokens.shape[1]
    cache = Cache(decoder, start, prompt, prompt + max(row.limit for row in rows))
    x = decoder.prefill(tokens, cache, steer)
    while True:
        chosen = pick(decoder.logits(x)[:, -1])
        for i, token in enumerate(chosen.tolist()):
            if not rows[i].done and (piece := rows[i].push(token)):
                yield i, piece
        if all(row.done for row in rows):
            return
        x = decoder(chosen[:, None], cache, steer)
