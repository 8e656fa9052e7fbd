"""Workers whose master was killed: they keep serving, and give their sockets to the next master.

Those that let their sessions end have none left, and say where they had some.

An orphan waits for that one at an abstract unix socket, :class:`OrphanDoor`; a new master knocks at
the doors of its user, :func:`from_orphans`. The connection stays, and the sessions follow over it
when there are workers that take them, see ``foreign.Orphan``.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import signal
import socket
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from forwarder.ipc.channel import MAX_FDS, MAX_MESSAGE_BYTES, Channel, ChannelClosed, channel_kind
from forwarder.net import proc
from forwarder.net.sockets import peer_credentials
from forwarder.serving.addresses import address_of
from forwarder.succession.inherit import listening_sockets

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from forwarder.ipc.channel import Message, Received

log = logging.getLogger(__name__)

_DOOR_PREFIX: Final = "forwarder-orphan"
_DOOR_TIMEOUT_S: Final = 2.0  # an orphan that does not answer by then keeps its sockets
_KNOCK_AGAIN_S: Final = 0.05
_GONE: Final = frozenset({errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE})
END: Final = "end"  # what an orphan says after its sockets
# What a master sends when it has the sockets; older code closes the connection after that.
TAKEN: Final = b'{"op": "taken"}'
TAKEN_MESSAGE: Final[Message] = json.loads(TAKEN)
_TABLES: Final = tuple(Path("/proc/net", name) for name in ("tcp", "tcp6", "udp", "udp6"))
# TCP_LISTEN, and TCP_CLOSE, which is the state of UDP sockets that are not connected.
_LISTENING: Final = frozenset({"0A", "07"})
# Enough to recognise an instance by, and few enough for one message.
_MOST_PLACES: Final = 100
_UNIX_SOCKETS: Final = Path("/proc/net/unix")


def from_orphans(
    uid: int,
    is_wanted: Callable[[Iterable[str]], bool],
    keep: Callable[[socket.socket], None],
) -> list[socket.socket]:
    """Take over the listening sockets of orphans that run as ``uid``; blocks a moment for any.

    An orphan none of whose places ``is_wanted`` belongs to another instance and keeps them. The
    others stop accepting at once, and leave when they have no session any more; ``keep`` is called
    with the connection to each, which becomes its own.
    """
    found: dict[int, socket.socket] = {}
    for name, door in _knock(uid):
        with ExitStack() as stack:
            stack.enter_context(door)
            try:
                numbers, places = _receive_all(door)
                given = list(listening_sockets(numbers))
                is_ours = is_wanted([*places, *places_of(given)])
                if is_ours:
                    door.send(TAKEN)
            except TimeoutError:
                _end_hung(door, name, uid)
                continue
            except OSError as err:  # ECONNRESET, EPIPE: it has just ended, as orphans do
                level = logging.INFO if err.errno in _GONE else logging.WARNING
                log.log(level, "inherit: orphan %s gives no sockets: %s", name, err.strerror)
                continue
            if is_ours:
                keep(door)
                stack.pop_all()
        for sock in given:
            # Two orphans may share a socket, one of them having adopted it.
            inode = os.fstat(sock.fileno()).st_ino
            if is_ours and inode not in found:
                found[inode] = sock
            else:
                sock.close()
    if found:
        log.info("inherit: took over %d sockets of workers without a master", len(found))
        _end_deaf(uid, list(found.values()))
    return list(found.values())


class OrphanDoor:
    """Where an orphan waits for a new master. Owns its socket."""

    def __init__(
        self,
        loop: AbstractEventLoop,
        places: Iterable[str],
        sockets: Mapping[int, socket.socket],
        on_taken: Callable[[Channel, list[Received]], None],
    ) -> None:
        """Listen. A master of our user or of root gets the sockets that there are by then.

        They stay the caller's. It recognises us by ``places``, see :func:`places_of`. When it has
        taken them, ``on_taken`` gets the channel to it, which becomes its own, and what it has said
        meanwhile. Raises OSError.
        """
        self._loop = loop
        self._places = list(places)
        self._sockets = sockets
        self._on_taken = on_taken
        self._sock = socket.socket(socket.AF_UNIX, channel_kind())
        self._sock.setblocking(False)
        try:
            self._bind()
            self._sock.listen(1)
        except BaseException:
            self._sock.close()
            raise
        loop.add_reader(self._sock.fileno(), self._on_master)

    def _bind(self) -> None:
        """Take the name of our user and pid, or one like it if another user has taken that."""
        name = f"\0{_DOOR_PREFIX}/{os.geteuid()}/{os.getpid()}"
        try:
            self._sock.bind(name)
        except OSError as err:
            if err.errno != errno.EADDRINUSE:
                raise
            self._sock.bind(f"{name}-{secrets.token_hex(8)}")

    def close(self) -> None:
        """Stop waiting."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()

    def _on_master(self) -> None:
        try:
            peer, _ = self._sock.accept()
        except OSError:
            return
        if not _is_trusted(peer, os.geteuid()):
            peer.close()
            return
        channel = Channel(peer)
        try:
            fds = [sock.fileno() for sock in self._sockets.values()]
            for start in range(0, len(fds), MAX_FDS):
                channel.send({"op": "sockets"}, fds[start : start + MAX_FDS])
            channel.send({"op": END, "places": self._places})
        except ChannelClosed:
            channel.close()
            return
        self._loop.add_reader(channel.fileno(), self._on_answer, channel)
        self._flush(channel)

    def _flush(self, channel: Channel) -> None:
        """Send the rest of many sockets as the master takes them."""
        with suppress(ChannelClosed):
            channel.flush()
            if channel.has_outbox:
                self._loop.call_later(0.01, self._flush, channel)

    def _on_answer(self, channel: Channel) -> None:
        self._loop.remove_reader(channel.fileno())
        said: list[Received] = []
        with suppress(ChannelClosed, ValueError, RecursionError):
            said = channel.receive()
        is_waiting = self._sock.fileno() >= 0  # else another master has taken them meanwhile
        if is_waiting and said and said[0].message == TAKEN_MESSAGE:
            self.close()
            self._on_taken(channel, said[1:])
        else:  # a master of another instance
            for one in said:
                one.close()
            channel.close()


def places_of(socks: Iterable[socket.socket]) -> list[str]:
    """Where sockets listen, or as many of these places as fit into a message."""
    return sorted({address_of(sock).place for sock in socks})[:_MOST_PLACES]


def read_places(end: Message) -> list[str]:
    """Where an orphan listens or has listened, as it says at the end; older code does not."""
    places = end.get("places")
    return [one for one in places if isinstance(one, str)] if isinstance(places, list) else []


def _knock(uid: int) -> Iterator[tuple[str, socket.socket]]:
    """Connect to the doors of orphans of ``uid``; the caller owns the sockets, which time out.

    Any process may give a socket such a name. So only orphans of ``uid`` are waited for, and all
    doors that let no master in, together, not longer than one of those.
    """
    names = _doors(uid)
    until = time.monotonic() + _DOOR_TIMEOUT_S
    foreign = 0
    while names:
        for name in tuple(names):
            door = _connected(name)
            if door is None:
                continue
            names.remove(name)
            if door.fileno() >= 0 and _is_trusted(door, uid):
                door.settimeout(_DOOR_TIMEOUT_S)
                yield name, door
            elif door.fileno() >= 0:
                foreign += 1
                door.close()
        if names and time.monotonic() >= until:
            log.warning("inherit: %d orphans let no master in, such as %s", len(names), names[0])
            break
        time.sleep(_KNOCK_AGAIN_S if names else 0)
    if foreign:
        log.warning("inherit: %d sockets of other users have names of orphans", foreign)


def _connected(name: str) -> socket.socket | None:
    """An open door; a closed socket if no process is behind it; None if its queue is full."""
    door = socket.socket(socket.AF_UNIX, channel_kind())
    door.setblocking(False)
    try:
        door.connect(f"\0{name}")
    except BlockingIOError:
        door.close()
        return None
    except OSError as err:
        log.debug("inherit: orphan %s has gone: %s", name, err)
        door.close()
    return door


def _receive_all(door: socket.socket) -> tuple[list[int], list[str]]:
    """All that an orphan gives, and its places. Raises OSError, with nothing of it left open."""
    numbers: list[int] = []
    try:
        while True:
            data, fds, _, _ = socket.recv_fds(door, MAX_MESSAGE_BYTES, MAX_FDS)
            numbers += fds
            if not data or not fds:
                return numbers, read_places(_message(data))
    except OSError:
        for number in numbers:  # no worker would accept on them, and clients would wait
            os.close(number)
        raise


def _message(data: bytes) -> Message:
    """Nothing if it is no message."""
    with suppress(ValueError, RecursionError):
        message = json.loads(data)
        if isinstance(message, dict):
            return message
    return {}


def new_doors(uid: int, known: set[str]) -> Iterator[socket.socket]:
    """Connections to doors of orphans of ``uid``, the caller's; it does not block.

    ``known`` has the names of those that are not new, and gets the others.
    """
    for name in _doors(uid):
        if name in known:
            continue
        door = _connected(name)
        if door is None:
            continue  # next time
        known.add(name)
        if door.fileno() >= 0 and _is_trusted(door, uid):
            yield door
        else:
            door.close()


def door_of(pid: int, uid: int) -> socket.socket | None:
    """A connection to the door of an orphan, which may still have to open it; None if not yet.

    The caller owns it. It does not block. Raises OSError if another process has the name.
    """
    door = _connected(f"{_DOOR_PREFIX}/{uid}/{pid}")
    if door is None or door.fileno() < 0:
        return None
    if peer_credentials(door)[0] != pid:
        door.close()
        raise PermissionError(errno.EPERM, f"another process has the name of orphan {pid}")
    return door


def _doors(uid: int) -> list[str]:
    try:
        text = _UNIX_SOCKETS.read_text(errors="replace")
    except OSError:
        return []
    name = rf"@({_DOOR_PREFIX}/{uid}/[0-9]+(?:-[0-9a-f]+)?)$"
    return sorted(set(re.findall(name, text, re.MULTILINE)))


def _end_hung(door: socket.socket, name: str, uid: int) -> None:
    """End an orphan that does not answer: its share of new clients would hang with it."""
    pid, peer_uid = peer_credentials(door)
    if peer_uid == uid and pid > 1:
        log.warning("inherit: orphan %s is hung; killing pid %d", name, pid)
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _end_deaf(uid: int, ours: list[socket.socket]) -> None:
    """End workers that were stopped before their master was killed, and so never became orphans.

    They share our addresses and keep sockets of their own, whose clients would hang.
    """
    known = {os.fstat(sock.fileno()).st_ino for sock in ours}
    addresses = {(sock.type, proc.encode(sock)) for sock in ours if sock.family != socket.AF_UNIX}
    foreign = {
        f"socket:[{fields[9]}]"
        for table in _TABLES
        for fields in proc.rows(table)
        if (_kind(table), fields[1]) in addresses
        and fields[3] in _LISTENING
        and int(fields[9]) not in known
    }
    for process in Path("/proc").glob("[0-9]*") if foreign else ():
        with suppress(OSError):  # it has gone, or is not ours to look at
            if process.stat().st_uid != uid or "State:\tT" not in (process / "status").read_text():
                continue
            if any(str(fd.readlink()) in foreign for fd in (process / "fd").iterdir()):
                log.warning("inherit: worker pid=%s is stopped; killing it", process.name)
                os.kill(int(process.name), signal.SIGKILL)


def _kind(table: Path) -> socket.SocketKind:
    return socket.SOCK_DGRAM if table.name.startswith("udp") else socket.SOCK_STREAM


def _is_trusted(peer: socket.socket, trusted: int) -> bool:
    """Whether the other end runs as ``trusted`` or as root."""
    _, uid = peer_credentials(peer)
    return uid in (0, trusted)
