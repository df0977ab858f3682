"""Pieces of text from token ids as they come: never half a character, never past a stop."""

from collections.abc import Callable, Sequence

HALF = "\ufffd"  # what a decoder shows for bytes that are no character (yet)


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
        self.ids: list[int] = []
        self.shown, self.read = 0, 0  # ids whose text is out; ids that give context to the next
        self.held = ""  # text that may be the beginning of a stop string
        self.done = limit == 0

    def push(self, token: int) -> str:
        if token in self.stop_ids:
            self.done = True
        else:
            self.ids.append(token)
            self.done = len(self.ids) == self.limit
        self.held += self._decode_new()
        return self._release()

    def _decode_new(self) -> str:
        """Text of the ids not shown yet, in the context of those before; all of it at the end."""
        before = self.decode(self.ids[self.read : self.shown])
        after = self.decode(self.ids[self.read :])
        if after.endswith(HALF) and not self.done:
            return ""
        piece = after[len(before) :]
        if piece:  # ids without text of their own, such as special tokens, give no context
            self.read = self.shown
        self.shown = len(self.ids)
        return piece

    def _release(self) -> str:
        found = [(i + len(s), i) for s in self.stop if (i := self.held.find(s)) >= 0]
        if found:  # several: the first to be complete, as if the text had come by characters
            self.done = True
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
