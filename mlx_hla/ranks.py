"""Ranks: processes on one machine or several that `mlx.launch` starts and an `mx.distributed` group joins.

What they tell each other here is of a size that all of them know beforehand, begins with a word that no
array of numbers begins with, and is checked before it is used; nothing is unpickled. An exchange waits for
the other ranks and for whatever MLX has still to do, so all ranks must come to it in the same order.
"""

# R ranks, K ranks of a part

from __future__ import annotations

import contextlib
import hashlib
import itertools
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hla.errors import InputError
from mlx_hla.patience import PATIENCE, VARIABLE

WORD = b"mlx-hla\0"
_count = itertools.count()
TEXT, MARK = 40, 8  # bytes of a value that is shown, and of its digest
LOST = "peer"  # MLX's word for a rank whose connection has ended


class Lost(InputError):
    """Another rank has ended, or does something else."""


class Part:
    """K neighbours of a group, in the place of a group of their own, which MLX's ring cannot make.

    Every exchange of a part goes around the whole group: all parts must make the same ones with arrays of the
    same shapes, and each rank receives R / K times the bytes of a group of its own.
    """

    def __init__(self, group: mx.distributed.Group, size: int):
        if group.size() % size:
            raise InputError(f"{group.size()} ranks cannot be cut into parts of {size}")
        self.whole, self._size = group, size

    def rank(self) -> int:
        return self.whole.rank() % self._size

    def size(self) -> int:
        return self._size

    @property
    def first(self) -> int:
        """The rank in the whole group of this part's rank 0."""
        return self.whole.rank() // self._size * self._size


def is_group(value: object) -> bool:
    return isinstance(value, mx.distributed.Group | Part)


def gathered(x: mx.array, group: Any) -> mx.array:
    """x of every rank, `[R, ..]`."""
    if not isinstance(group, Part):
        return mx.distributed.all_gather(x[None], group=group)
    every = mx.distributed.all_gather(x[None], group=group.whole)
    return every[group.first : group.first + group.size()]


def summed(x: mx.array, group: Any) -> mx.array:
    """The sum of x over the ranks, of the same bits on all of them."""
    return (
        gathered(x, group).sum(axis=0) if isinstance(group, Part) else mx.distributed.all_sum(x, group=group)
    )


@contextlib.contextmanager
def waiting(group: Any, what: str) -> Iterator[None]:
    """Here the other ranks are waited for: the clock runs, and a rank that is lost is told of in a line."""
    who, before = f"rank {world(group).rank()} of {world(group).size()}", PATIENCE.line
    ended = f"{who}: another rank has ended, in {what}: if it says nothing, it was killed or is out of reach"
    PATIENCE.on_loss(ended)
    PATIENCE.expect(
        f"{who}: heard nothing of another rank for {PATIENCE.seconds:g} s, in {what}; "
        f"{VARIABLE} sets how long to wait"
    )
    try:
        yield
    except RuntimeError as e:
        if LOST not in str(e):
            raise
        PATIENCE.end()
        raise Lost(ended) from e
    finally:
        PATIENCE.expect(before)


def world(group: Any) -> mx.distributed.Group:
    return group.whole if isinstance(group, Part) else group


def exchange(group: Any, data: bytes, what: str) -> list[bytes]:
    """The bytes of every rank of the whole group; all give equally many."""
    # Each has its number: MLX may give out what an earlier one left in memory when a rank is lost.
    head = WORD + next(_count).to_bytes(8, "big")
    row = mx.array(np.frombuffer(head + data, np.uint8))
    with waiting(group, what):
        every = np.array(mx.distributed.all_gather(row[None], group=world(group)))
    found = [each.tobytes() for each in every]
    for rank, each in enumerate(found):
        if not each.startswith(head):
            PATIENCE.end()
            raise Lost(
                f"rank {world(group).rank()} of {len(found)}: rank {rank} has ended, or is at something else "
                f"than {what}, which all ranks must come to together"
            )
    return [each[len(head) :] for each in found]


def agree(group: Any, what: str, about: Mapping[str, object]) -> None:
    """An error on every rank unless all have the same values; the names are the same on all of them.

    A value is compared by its text, and the beginning of that is shown. 48 bytes a value are exchanged.
    """
    own = b""
    for value in about.values():
        text = str(value)
        shown = ascii(text)[1:-1].encode()[:TEXT]
        own += shown.ljust(TEXT, b"\0") + hashlib.sha256(text.encode(errors="replace")).digest()[:MARK]
    every = exchange(group, own, what)
    for i, name in enumerate(about):
        cells = [each[i * (TEXT + MARK) : (i + 1) * (TEXT + MARK)] for each in every]
        for rank, cell in enumerate(cells):
            if cell != cells[0]:
                texts = [c[:TEXT].rstrip(b"\0").decode("ascii", "replace") for c in (cells[0], cell)]
                first, other = (ascii(t)[1:-1] for t in texts)
                PATIENCE.end()
                raise InputError(
                    f"{what}: the ranks differ in {name}: rank 0 has {first}, rank {rank} has {other}"
                )


def blobs_of_first(group: Any, blobs: list[bytes] | None, count: int, limit: int, what: str) -> list[bytes]:
    """`count` pieces of at most `limit` bytes each, which rank 0 gives, on every rank."""
    own = b"".join(struct.pack(">Q32s", len(b), hashlib.sha256(b).digest()) for b in blobs or [b""] * count)
    out = []
    for i, (size, digest) in enumerate(struct.iter_unpack(">Q32s", exchange(group, own, what)[0])):
        if size > limit:
            raise InputError(f"{what}: rank 0 sends {size} bytes, more than {limit}")
        mine = blobs[i] if blobs is not None else bytes(size)
        with waiting(group, what):
            every = summed(mx.array(np.frombuffer(mine or b"\0", np.uint8)), world(group))
            out.append(np.array(every).tobytes()[:size])
        if hashlib.sha256(out[-1]).digest() != digest:
            raise InputError(f"{what}: what rank 0 sends does not arrive whole")
    return out


def fingerprint(arrays: Mapping[str, mx.array]) -> str:
    """The same for the same bits of the same shapes; a sum over them on the device, no cryptography."""
    h = hashlib.sha256()
    for name, a in sorted(arrays.items()):
        words = a.flatten().view(
            mx.uint16 if a.dtype.size == 2 else mx.uint32 if a.dtype.size == 4 else mx.uint8
        )
        place = mx.arange(1, words.size + 1, dtype=mx.uint32) * 2654435761
        mixed = (words.astype(mx.uint32) + 1) * (place ^ (place >> 15))
        h.update(f"{name} {a.dtype} {a.shape} {mixed.sum().item()}\n".encode())
    return h.hexdigest()
