"""Pieces of text from token ids as they come: never half a character, never past a stop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

HALF = "\ufffd"  # what a decoder shows for bytes that are no character (yet)


@dataclass(frozen=True)
class Answer:
    """What a model said to one prompt."""

    text: str  # without the prompt, special tokens and what stopped it
    tokens: list[int]  # all that were chosen; one that stopped the text is the last of them
    logprobs: list[float]  # of each, by the model as it is steered, before any temperature
    reason: str  # why it ended: "stop" (such a token), "length" (the limit) or "stop string"


class TextStream:
    """One row's text. `push` takes an id and returns the text that is now certain.

    The pieces joined are the text: up to, and without, the first stop id or stop string, or at
    most `limit` tokens long.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        limit: int,
        stop_ids: frozenset[int] = frozenset(),
        stop: Sequence[str] = (),
    ):
        self.decode, self.limit, self.stop_ids, self.stop = decode, limit, stop_ids, stop
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""  # what is out
        self.shown, self.read = 0, 0  # tokens whose text is out; those that give the next context
        self.held = ""  # text that may be the beginning of a stop string
        self.reason = "length" if limit == 0 else ""

    @property
    def done(self) -> bool:
        return bool(self.reason)

    @property
    def ids(self) -> list[int]:
        """The tokens, without one that stopped the text."""
        return self.tokens[:-1] if self.reason == "stop" else self.tokens

    @property
    def answer(self) -> Answer:
        return Answer(self.text, self.tokens, self.logprobs, self.reason)

    def push(self, token: int, logprob: float = 0.0) -> str:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self.stop_ids:
            self.reason = "stop"
        elif len(self.tokens) == self.limit:
            self.reason = "length"
        self.held += self._decode_new()
        piece = self._release()
        self.text += piece
        return piece

    def _decode_new(self) -> str:
        """Text of the ids not shown yet, in the context of those before; all of it at the end."""
        ids = self.ids
        before = self.decode(ids[self.read : self.shown])
        after = self.decode(ids[self.read :])
        if after.endswith(HALF) and not self.done:
            return ""
        piece = after[len(before) :]
        if piece:  # ids without text of their own, such as special tokens, give no context
            self.read = self.shown
        self.shown = len(ids)
        return piece

    def _release(self) -> str:
        found = [(i + len(s), i) for s in self.stop if (i := self.held.find(s)) >= 0]
        if found:  # several: the first to be complete, as if the text had come by characters
            self.reason = "stop string"
            text, self.held = self.held[: min(found)[1]], ""
            return text
        keep = 0 if self.done else max((overlap(self.held, s) for s in self.stop), default=0)
        cut = len(self.held) - keep
        text, self.held = self.held[:cut], self.held[cut:]
        return text


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
