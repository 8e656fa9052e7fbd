"""The deposit of a worker: what it leaves with the master, so that its sessions outlive it.

Two parts. Memory that both share says of each session what is not in the kernel, and whose data is
in which pipe: the worker writes, and the master reads when the worker is dead. Messages bring the
duplicates of descriptors, many at a time. A row of the memory and the descriptors belong together
if they have the same serial: so it does not matter which of the two a worker came to before it was
killed, nor that it has used a descriptor's number again.

Knows no session and no rule.
"""

from __future__ import annotations

import json
import mmap
import struct
from array import array
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from forwarder.ipc.channel import MAX_FDS, MAX_MESSAGE_BYTES, from_memory_file, to_memory_file
from forwarder.ipc.messages import MAX_SHORT_BYTES, Op
from forwarder.net.pipes import MOST_PIPES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from forwarder.ipc.channel import Channel, Message, Received

# Of a session: number of its terms, port behind the first one of the rule, id, when it has begun,
# how long connecting took, the upstream's descriptor in the worker, its server's row and how often
# it was adopted (see ``pack_server``), when it was last; and the serial, which is written last.
ROW: Final = struct.Struct("=HHQdfIIfI")
_WORDS: Final = ROW.size // 4
_SERIAL: Final = _WORDS - 1
# Sessions whose descriptors go into one message.
SESSIONS_AT_ONCE: Final = MAX_FDS // 2
_NUMBERS_AT_ONCE: Final = MAX_MESSAGE_BYTES // 8
# The kind of its sessions when they are on their way to another worker.
KEPT: Final = "kept"
_HEADER: Final = struct.Struct("=I")
_SERVER_BITS: Final = 24
# More than the longest terms of a rule; bounds what a worker makes the master read. Arbitrary.
_MOST_TERMS_BYTES: Final = 4 * 1024 * 1024


class Word(IntEnum):
    """What a message brings.

    KEEP and PIPES: pairs of a number and a serial, with two descriptors for each; GONE and
    PIPES_GONE: numbers. A session has the number of its client's descriptor in the worker.
    """

    KEEP = 1
    GONE = 2
    PIPES = 3
    PIPES_GONE = 4


class DepositMemory:
    """A row for each session of one worker, by its client's descriptor, and a note for each pipe.

    Made by the master before it forks the worker. A page exists once something in it was written.
    A note says whose data is in a pipe, if there is some: the pipe's serial in the upper half, the
    descriptor that it was read from in the lower one.
    """

    __slots__ = ("_room", "descriptors", "notes", "rows", "serials")

    def __init__(self, descriptors: int) -> None:
        """For a worker that has no descriptor with a number from ``descriptors`` on."""
        self.descriptors = descriptors
        self._room = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self.rows = mmap.mmap(-1, descriptors * ROW.size)
        self.serials = memoryview(self.rows).cast("I")[_SERIAL::_WORDS]
        self.notes = memoryview(mmap.mmap(-1, MOST_PIPES * 8)).cast("Q")

    @property
    def has_room(self) -> bool:
        """Whether the master takes more: its word."""
        return bool(self._room[0])

    @has_room.setter
    def has_room(self, has_room: bool) -> None:
        self._room[0] = has_room


def pack_server(row: int, adoptions: int, *, is_counted: bool) -> int:
    """The row of a server, 0 for none, a small number, and whether the gate counts it, as one."""
    return row | is_counted << _SERVER_BITS | adoptions << _SERVER_BITS + 1


def unpack_server(packed: int) -> tuple[int, int, bool]:
    """Row, small number and whether it is counted again."""
    is_counted = bool(packed >> _SERVER_BITS & 1)
    return packed & (1 << _SERVER_BITS) - 1, packed >> _SERVER_BITS + 1, is_counted


def send(channel: Channel, word: Word, numbers: Sequence[int], fds: Sequence[int] = ()) -> bool:
    """Send a message now; False: not now. ``fds`` stay the sender's. Raises ChannelClosed."""
    return channel.send_raw(_HEADER.pack(word) + array("I", numbers).tobytes(), fds)


def send_terms(channel: Channel, number: int, row: int, terms: Mapping[str, object]) -> None:
    """Say what the terms of this number are, and which row counts their rule.

    Long ones travel in a memory file, as there may be thousands of access rules. Raises
    ChannelClosed, and OSError if there is no descriptor for that.
    """
    message: Message = {"op": Op.TERMS, "number": number, "row": row}
    content = json.dumps(terms).encode()
    if len(content) <= MAX_SHORT_BYTES:
        channel.send({**message, "terms": terms})
    else:
        channel.send(message, [to_memory_file(content)], gives=True)


def read_terms(received: Received) -> tuple[int, int, dict[str, object]]:
    """What :func:`send_terms` has sent. Raises ValueError or KeyError for nonsense."""
    message = received.message
    number, row = message["number"], message["row"]
    if received.fds:
        terms = json.loads(from_memory_file(received.fds.pop(0), _MOST_TERMS_BYTES))
    else:
        terms = message["terms"]
    if not (isinstance(number, int) and isinstance(row, int) and isinstance(terms, dict)):
        raise ValueError("no terms")  # noqa: TRY004 - as all nonsense
    return number, row, terms


def send_numbers(channel: Channel, word: Word, numbers: list[int]) -> bool:
    """Send numbers, and take out of the list what was sent; False: the rest not now.

    Raises ChannelClosed.
    """
    while numbers:
        part = numbers[:_NUMBERS_AT_ONCE]
        if not send(channel, word, part):
            return False
        del numbers[: len(part)]
    return True


def read(raw: bytes) -> tuple[Word, array[int]]:
    """What a message says. Raises ValueError for nonsense."""
    try:
        word = Word(_HEADER.unpack_from(raw)[0])
        numbers = array("I")
        numbers.frombytes(raw[_HEADER.size :])
    except struct.error as err:
        raise ValueError("not a message of a deposit") from err
    return word, numbers
