"""Messages with descriptors between the master and one worker, over a SEQPACKET socket pair.

Keeps message boundaries (unix(7)), so nothing has to be framed. Never blocks: what the peer does
not take yet waits in an outbox. Knows no message's meaning.
"""

from __future__ import annotations

import array
import errno
import fcntl
import json
import os
import socket
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from forwarder.net.sockets import OUT_OF_RESOURCES

if TYPE_CHECKING:
    from collections.abc import Sequence

Message: TypeAlias = dict[str, object]

# SCM_MAX_FD is 253 (unix(7)); a round number below it.
MAX_FDS: Final = 250
# Larger content travels as a memory file. Well below the default socket buffer of 212,992 bytes.
MAX_MESSAGE_BYTES: Final = 32 * 1024
# Messages taken in at once: a peer that never stops sending must not hold us up. Arbitrary.
MAX_AT_ONCE: Final = 64
_SPACE: Final = 0x20


class ChannelClosed(Exception):  # noqa: N818 - an event, not a fault
    """The other side is gone."""


@dataclass(slots=True)
class Received:
    """One message and the descriptors that came with it, which the receiver owns and closes.

    ``is_truncated``: some did not arrive because the receiving process ran out of descriptors.
    ``raw``: a message that is not JSON, see :meth:`Channel.send_raw`; then ``message`` is empty.
    """

    message: Message
    fds: list[int]
    is_truncated: bool = False
    raw: bytes = b""

    def read(self, data: bytes) -> None:
        """Take in what was said. Raises ValueError or RecursionError for nonsense."""
        if data[0] < _SPACE:
            self.raw = data
        else:
            self.message = json.loads(data)

    def close(self) -> None:
        """Close the descriptors that are still in it."""
        while self.fds:
            os.close(self.fds.pop())


class Channel:
    """One end of the pair. Owns the socket.

    ``is_short``: the outbox waits because memory ran out; no event reports that there is some
    again.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.is_short = False
        sock.setblocking(False)
        self._sock = sock
        self._outbox: deque[tuple[bytes, tuple[int, ...], bool]] = deque()

    def fileno(self) -> int:
        """The socket's descriptor, for a selector; -1 when closed."""
        return self._sock.fileno()

    @property
    def has_outbox(self) -> bool:
        """Whether messages wait for the peer: call :meth:`flush` when the socket is writable."""
        return bool(self._outbox)

    def send(self, message: Message, fds: Sequence[int] = (), *, gives: bool = False) -> None:
        """Send ``message``, now or when the peer takes it.

        ``fds`` must stay open until then; with ``gives`` the channel owns and closes them.
        Raises ChannelClosed.
        """
        data = json.dumps(message).encode()
        if len(data) > MAX_MESSAGE_BYTES or len(fds) > MAX_FDS:
            raise ValueError("message too large for the channel")
        self._outbox.append((data, tuple(fds), gives))
        try:
            self.flush()
        except ChannelClosed:
            self._drop_all()
            raise

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Send ``data`` that is no JSON, now or not at all; returns whether it was sent.

        It begins with a byte below that of a space, and is no longer than other messages.
        Raises ChannelClosed.
        """
        return not self._outbox and self._try_send(data, fds)

    def flush(self) -> None:
        """Send what waits, as far as the peer takes it. Raises ChannelClosed."""
        while self._outbox and self._try_send(*self._outbox[0][:2]):
            self._drop_first()

    def receive(self) -> list[Received]:
        """The messages that have arrived, at most MAX_AT_ONCE: the next event reports the rest.

        Raises ChannelClosed when the peer has gone, ValueError or RecursionError for nonsense; the
        messages read with it are then lost.
        """
        found: list[Received] = []
        while len(found) < MAX_AT_ONCE:
            try:
                data, ancillary, flags, _ = self._recvmsg()
            except OSError as err:
                if err.errno in _LATER:
                    return found
                raise ChannelClosed from err
            if not data:
                if found:
                    return found  # the end is reported by the next call
                raise ChannelClosed
            fds = array.array("i")
            for level, kind, payload in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
            is_truncated = bool(flags & socket.MSG_CTRUNC)
            found.append(Received({}, fds.tolist(), is_truncated))
            try:
                found[-1].read(data)
            except BaseException:
                for received in found:
                    received.close()
                raise
        return found

    def _recvmsg(self) -> tuple[bytes, list[tuple[int, int, bytes]], int, object]:
        try:
            return self._sock.recvmsg(MAX_MESSAGE_BYTES, _MOST_ANCILLARY, _CLOEXEC)
        except ConnectionResetError:  # it has ended without reading all; what it said is still here
            return self._sock.recvmsg(MAX_MESSAGE_BYTES, _MOST_ANCILLARY, _CLOEXEC)

    def close(self) -> None:
        """Close; what waits in the outbox is lost."""
        self._drop_all()
        self._sock.close()

    def _drop_all(self) -> None:
        while self._outbox:
            self._drop_first()

    def _drop_first(self) -> None:
        _, fds, gives = self._outbox.popleft()
        for fd in fds if gives else ():
            os.close(fd)

    def _try_send(self, data: bytes, fds: Sequence[int]) -> bool:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._sock.sendmsg([data], ancillary)
        except BlockingIOError:
            return False
        except OSError as err:
            # unix(7): too many descriptors in flight, until the peer takes some.
            self.is_short = err.errno == errno.ETOOMANYREFS or err.errno in OUT_OF_RESOURCES
            if self.is_short:
                return False
            raise ChannelClosed from err
        self.is_short = False
        return True


# Nothing has arrived, or memory ran out; then the event comes again.
_LATER: Final = OUT_OF_RESOURCES | {errno.EAGAIN}
_MOST_ANCILLARY: Final = socket.CMSG_SPACE(MAX_FDS * 4)
_CLOEXEC: Final = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


def channel_kind() -> socket.SocketKind:
    """The type of socket that keeps message boundaries; macOS has no SEQPACKET."""
    return getattr(socket, "SOCK_SEQPACKET", socket.SOCK_DGRAM)


def channel_pair() -> tuple[Channel, Channel]:
    """Two connected ends; the caller owns both. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, channel_kind())
    return Channel(ours), Channel(theirs)


def to_memory_file(content: bytes) -> int:
    """Put ``content`` into an anonymous file and return its descriptor, which the caller closes.

    Raises OSError, such as EFBIG: the limit of file sizes is for this one, too.
    """
    fd = os.memfd_create("forwarder", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
    except OSError:
        os.close(fd)
        raise
    return fd


def from_memory_file(fd: int, limit: int = -1) -> bytes:
    """Content of a memory file. Closes the descriptor.

    With a ``limit`` in bytes the sender is not trusted. Raises ValueError for a longer file, and
    for another kind of file, which could block or never end.
    """
    with open(fd, "rb", buffering=0) as file:
        if limit < 0:
            os.lseek(fd, 0, os.SEEK_SET)
            return file.readall()
        return read_memory_file(fd, limit)


def read_memory_file(fd: int, limit: int) -> bytes:
    """Content of a memory file of someone who is not trusted; the descriptor stays open.

    Raises ValueError as :func:`from_memory_file`.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)  # EINVAL unless it is in memory, fcntl(2)
        content = os.pread(fd, limit + 1, 0)
    except OSError as err:
        raise ValueError("not a memory file") from err
    if len(content) > limit:
        raise ValueError("more than is allowed")
    return content
