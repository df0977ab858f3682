"""A GPU's memory as arrays of bytes: each access is checked, and shared memory knows of races.

An address is aligned and lies in one array, or in the block's shared memory, else AddressError. Of
shared memory each two bytes know which warps have read and written them since the last barrier, and
whether a copy may still arrive: where one warp writes what another may be looking at, it is a race.
"""

import numpy as np

BASE = 1 << 32  # of global memory: addresses need 64 bits
GUARD = 256  # bytes at least between two arrays


class AddressError(Exception):
    """An access to what no array holds, or that is not aligned."""


class Memory:
    """Global memory: arrays at addresses of their own."""

    def __init__(self):
        self.bytes = np.zeros(GUARD, np.uint8)
        self.spans: dict[int, int] = {}  # where an array begins, where it ends

    def put(self, array: np.ndarray, skew: int = 0) -> int:
        """A copy's address, `skew` bytes beyond a multiple of 16."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        start = len(self.bytes) + skew
        self.spans[start] = start + len(data)
        padded = np.pad(data, (skew, 2 * GUARD - (skew + len(data)) % GUARD))
        self.bytes = np.concatenate((self.bytes, padded))
        return BASE + start

    def get(self, pointer: int) -> np.ndarray:
        """The bytes of what was put there."""
        return self.bytes[pointer - BASE : self.spans[pointer - BASE]]

    def places(self, address, size: int, warp, writes: bool) -> np.ndarray:
        """Indices of `size` bytes from each address on: (N,) -> (N, size)."""
        start = address - BASE
        starts, ends = np.array([*self.spans.items()]).T
        span = np.searchsorted(starts, start, side="right") - 1
        return checked(start, size, (span >= 0) & (start + size <= ends[span]))

    def load(self, address, size: int, warp) -> np.ndarray:
        return self.bytes[self.places(address, size, warp, writes=False)]

    def store(self, address, data: np.ndarray, warp) -> None:
        self.bytes[self.places(address, data.shape[-1], warp, writes=True)] = data


class Shared(Memory):
    """A block's shared memory, which knows who has touched it."""

    def __init__(self, size: int):
        self.bytes = np.full(size, 0xAB, np.uint8)
        # bit w of each two bytes: whether warp w has read or written them since the last barrier
        self.readers, self.writers = (np.zeros(size // 2 + 1, np.uint32) for _ in range(2))
        self.awaited = np.zeros(size // 2 + 1, bool)  # a copy may arrive at any time
        self.races = 0

    def places(self, address, size: int, warp, writes: bool) -> np.ndarray:
        places = checked(address, size, (address >= 0) & (address + size <= len(self.bytes)))
        pair, mine = places[:, ::2] // 2, (np.uint32(1) << warp)[:, None]
        others = (self.writers[pair] | (self.readers[pair] if writes else 0)) & ~mine
        self.races += int(np.sum((others != 0) | self.awaited[pair]))
        np.bitwise_or.at(self.writers if writes else self.readers, pair, mine)
        return places

    def store(self, address, data: np.ndarray, warp) -> None:
        """At one place several threads may store, but only the same."""
        places = self.places(address, data.shape[-1], warp, writes=True)
        self.bytes[places] = data
        self.races += int(np.sum(self.bytes[places] != data))


def checked(start, size: int, inside) -> np.ndarray:
    """Indices of `size` bytes from each start on, if all are inside and aligned."""
    if not inside.all():
        raise AddressError(f"{size} bytes at {start[~inside][0]} are in no array")
    if (start % size).any():
        raise AddressError(f"{size} bytes at {start[start % size > 0][0]} are not aligned")
    return start[:, None] + np.arange(size)
