"""Listening sockets that exist before this master does: their owners hand them over.

Three givers, one result, a list of sockets that the listener table matches to rules by address:

* the master that is being upgraded: numbers in ``FORWARDER_FDS``;
* a service manager: ``LISTEN_FDS`` and ``LISTEN_PID``, sd_listen_fds(3);
* workers whose master was killed, see ``orphans``.

So the queues of these sockets outlive their masters. Binds nothing itself.
"""

from __future__ import annotations

import logging
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from forwarder.net.sockets import LentSocket

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

log = logging.getLogger(__name__)

FDS_VARIABLE: Final = "FORWARDER_FDS"
LENT_VARIABLE: Final = "FORWARDER_LENT_FDS"  # those of them that are a service manager's
_MOST_DESCRIPTORS: Final = 1 << 20  # of a process, NR_OPEN of Linux
_FIRST_LISTEN_FD: Final = 3  # SD_LISTEN_FDS_START
_KINDS: Final = frozenset(
    {
        *((family, socket.SOCK_STREAM) for family in (socket.AF_INET, socket.AF_INET6)),
        *((family, socket.SOCK_DGRAM) for family in (socket.AF_INET, socket.AF_INET6)),
        (socket.AF_UNIX, socket.SOCK_STREAM),
    }
)


def from_environment() -> list[socket.socket]:
    """Take over the sockets that the environment names; it names none afterwards.

    A number that is no open descriptor is reported and skipped.
    """
    numbers = _numbers_of(FDS_VARIABLE)
    lent = set(_numbers_of(LENT_VARIABLE))
    count = os.environ.pop("LISTEN_FDS", "")
    if os.environ.pop("LISTEN_PID", "") == str(os.getpid()) and count.isdecimal():
        most = os.sysconf("SC_OPEN_MAX")
        given = range(_FIRST_LISTEN_FD, _FIRST_LISTEN_FD + min(int(count[:9]), most))
        numbers += given
        lent.update(given)
    os.environ.pop("LISTEN_FDNAMES", None)
    return list(listening_sockets(numbers, lent))


def foreign_descriptors() -> list[int]:
    """Descriptors that our parent has left open, and that no variable says are for us.

    Perhaps a file of root, which a worker without rights must not get. Call it before anything else
    is opened.
    """
    meant = {0, 1, 2}
    for name, text in os.environ.items():
        if name.startswith("FORWARDER_"):
            with suppress(ValueError):  # it is about something else
                meant.update(numbers_in(text))
    count = os.environ.get("LISTEN_FDS", "")[:9]
    first = _FIRST_LISTEN_FD
    given = range(first, first + int(count)) if count.isdecimal() else range(0)
    try:
        numbers = [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]
    except OSError:
        return []
    return [fd for fd in numbers if fd not in meant and fd not in given and _is_open(fd)]


def _is_open(fd: int) -> bool:
    """False for the descriptor by which they were listed."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _numbers_of(variable: str) -> list[int]:
    """Descriptors that a variable names, which is gone afterwards; none if it is not from us."""
    text = os.environ.pop(variable, "")
    try:
        return numbers_in(text)
    except ValueError:
        log.warning("inherit: %s is not from a predecessor; ignored: %.100s", variable, text)
        return []


def numbers_as_text(numbers: Iterable[int]) -> str:
    """Numbers in their order, runs of them as ``3-1000``: one variable takes 128 KiB at most."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" for first, last in runs)


def numbers_in(text: str) -> list[int]:
    """The numbers that :func:`numbers_as_text` has written. Raises ValueError for anything else."""
    found: list[int] = []
    for run in filter(None, text.split(",")):
        first, _, last = run.partition("-")
        numbers = range(int(first), int(last or first) + 1)
        if not 0 <= numbers.start <= numbers.stop <= _MOST_DESCRIPTORS:
            raise ValueError(text)
        found += numbers
    return found


def listening_sockets(
    numbers: Iterable[int], lent: Container[int] = frozenset()
) -> Iterable[socket.socket]:
    """Descriptors as sockets, the caller's; one that no client can reach is reported and closed.

    Those in ``lent`` are a service manager's.
    """
    for number in numbers:
        try:
            sock = (LentSocket if number in lent else socket.socket)(fileno=number)
            is_listening = _is_listening(sock)
        except OSError as err:
            log.warning("inherit: descriptor %d is no socket: %s", number, err.strerror)
            continue
        if is_listening and (sock.family, sock.type) in _KINDS:
            os.set_inheritable(number, False)
            yield sock
        else:
            log.warning("inherit: descriptor %d is no listening TCP, UDP or unix socket", number)
            sock.close()


def _is_listening(sock: socket.socket) -> bool:
    """Whether clients can reach it: a TCP listener, or a UDP socket that is not connected."""
    if sock.type != socket.SOCK_DGRAM:
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    try:
        sock.getpeername()
    except OSError:
        return True
    return False
