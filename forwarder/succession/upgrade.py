"""Starting the newly installed code beside the running one. Decides nothing about the old one.

The successor inherits the listening sockets by number, binds nothing twice, and reports over a
line, a pair of sockets, when all its workers serve. If it ends without that, it has failed and the
old one goes on.

It is not our child but that of process 1, or of a subreaper (prctl(2)): a service manager that is
notified of a main process which it has not inherited yet never waits for it, and takes a stop for
done at once. So only the successor itself reports how it ends, and only the end of the line shows
that it has: the kernel closes the line however a process ends, and no worker keeps it open.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from forwarder.balancing.table import TABLE_BYTES
from forwarder.ipc.channel import channel_kind, from_memory_file, to_memory_file
from forwarder.net.sockets import LentSocket
from forwarder.succession import line
from forwarder.succession.inherit import (
    FDS_VARIABLE,
    LENT_VARIABLE,
    numbers_as_text,
    numbers_in,
)
from forwarder.system import memfile
from forwarder.system.pidfile import FD_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import NoReturn

    from forwarder.system.pidfile import PidFile

_CONTROL_VARIABLE: Final = "FORWARDER_CONTROL"
_NAMES_VARIABLE: Final = "FORWARDER_NAMES_FD"
_SERVERS_VARIABLE: Final = "FORWARDER_SERVERS_FDS"  # of the table, and of who has which seat
# Some 200 bytes for each seat of the table, and as much again for what was said of it. Arbitrary.
_MOST_ABOUT_SERVERS: Final = 32 * 1024 * 1024
# A successor that is not ready by then has failed: it is ended, and the old one goes on.
UPGRADE_TIMEOUT_S: Final = 60.0
# The first lets its workers' sessions end, the second does not, the third kills it.
_GIVING_UP: Final = (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL)
_GIVING_UP_S: Final = 3.0  # between two of them; a master kills its own workers after 2 s
# Messages over the line until the new one serves. One byte: in older code the line was a pipe, from
# which a master reads no more, and a successor of older code sends these.
_READY: Final = b"R"
_READY_WITHOUT_SOME: Final = b"r"  # it has no rule for some of the sockets
_MOST_BYTES: Final = 16  # of one message


@dataclass(frozen=True, slots=True, kw_only=True)
class Estate:
    """What a successor gets beside sockets and pid file.

    ``control`` is the path of our control socket, which it may replace. ``names`` is what is known
    of names, ``servers`` who has which seat of the table of servers, both as text. ``table`` is the
    file of that, which stays its owner's.
    """

    control: str | None
    names: bytes
    servers: bytes
    table: int


class Successor:
    """The process of the new code. Owns our end of the line to it."""

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        pid_file: PidFile | None,
        estate: Estate,
        now: float,
    ) -> None:
        """Execute the same command line again. What it inherits stays ours, too.

        Raises OSError. Blocks until the new program is being executed.
        """
        self.deadline = now + UPGRADE_TIMEOUT_S
        self.is_ready = False  # it serves
        self.has_dropped_some = False  # it turns handshakes away at sockets that it does not serve
        self.end: str | None = None  # how it has ended, as far as that is known
        self._said_of_end = "without a word"
        self._signals = list(_GIVING_UP)
        numbers = [sock.fileno() for sock in listeners]
        with ExitStack() as stack:
            names_fd = _lent(estate.names, stack)
            servers = [estate.table, _lent(estate.servers, stack)]
            self.line, theirs = socket.socketpair(socket.AF_UNIX, channel_kind())
            stack.enter_context(theirs)
            self.line.setblocking(False)
            environment = {
                **os.environ,
                FDS_VARIABLE: numbers_as_text(numbers),
                LENT_VARIABLE: numbers_as_text(
                    sock.fileno() for sock in listeners if isinstance(sock, LentSocket)
                ),
                line.READY_VARIABLE: str(theirs.fileno()),
                _CONTROL_VARIABLE: estate.control or "",
                _NAMES_VARIABLE: str(names_fd),
                _SERVERS_VARIABLE: numbers_as_text(servers),
            }
            kept = [*numbers, theirs.fileno(), names_fd, *servers]
            if pid_file is not None:
                environment[FD_VARIABLE] = str(pid_file.fileno())
                kept.append(pid_file.fileno())
            try:
                self.pid = _execute_apart([sys.executable, *sys.orig_argv[1:]], environment, kept)
            except OSError:
                self.line.close()
                raise

    def fileno(self) -> int:
        """Readable when it has sent something or has ended."""
        return self.line.fileno()

    def hear(self) -> None:
        """Read its messages, up to the one that it serves: what follows is for another reader."""
        while self.end is None:
            try:
                said = self.line.recv(_MOST_BYTES)
            except BlockingIOError:
                return
            except OSError:  # it has ended without having read all that we sent
                said = b""
            if not said:
                self.end = self._said_of_end
            elif said[:1] == line.ENDING:
                self._said_of_end = f"exit status {said[1:].decode(errors='replace')}"
            elif said in (_READY, _READY_WITHOUT_SOME):
                self.is_ready = True
                self.has_dropped_some = said == _READY_WITHOUT_SOME
                return

    def give_up(self, now: float) -> None:
        """Signal it to end, more firmly each time; the next time is at ``deadline``."""
        self.deadline = now + _GIVING_UP_S
        self.hear()
        if self.end is not None:
            return  # the pid may be another process's by now
        number = self._signals.pop(0) if len(self._signals) > 1 else self._signals[0]
        with suppress(OSError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it and close the line: only in its first moment, before it can have children."""
        with suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)
        self.close()

    def close(self) -> None:
        """Close our end of the line."""
        self.line.close()


def _lent(content: bytes, stack: ExitStack) -> int:
    """A memory file with ``content`` that is closed with the stack. Raises OSError."""
    fd = to_memory_file(content)
    stack.callback(os.close, fd)
    return fd


def _execute_apart(
    command: Sequence[str], environment: Mapping[str, str], kept: Sequence[int]
) -> int:
    """Execute a program as a process that is not our child; it inherits the descriptors ``kept``.

    A child of ours does that and leaves; when this returns another process has inherited the
    program. Returns its pid. Raises OSError. Blocks until it is being executed.
    """
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
    except OSError:
        os.close(read_fd)
        os.close(write_fd)
        raise
    if pid == 0:
        _execute_and_leave(write_fd, command, environment, kept)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as file:
        said = file.read()
    os.waitpid(pid, 0)
    number = int(said or 0)
    if number <= 0:
        raise OSError(-number, os.strerror(-number)) if number else OSError("its parent was killed")
    return number


def _execute_and_leave(
    write_fd: int, command: Sequence[str], environment: Mapping[str, str], kept: Sequence[int]
) -> NoReturn:
    """In a forked child: execute the program, write its pid, or -errno, and end."""
    said = -errno.EIO
    try:
        said = subprocess.Popen(command, env=environment, pass_fds=kept).pid
    except OSError as err:
        said = -(err.errno or errno.EIO)
    finally:
        os.write(write_fd, str(said).encode())
        os._exit(0)


def tell_predecessor(*, has_dropped_some: bool) -> socket.socket | None:
    """Report that we serve, all that we have inherited or not, if an upgrade started us; once.

    Returns our end of the line, which becomes the caller's; None if there is none.
    """
    fd = line.take()
    if fd is None:
        return None
    with suppress(OSError):  # a predecessor that has died meanwhile needs no answer
        os.write(fd, _READY_WITHOUT_SOME if has_dropped_some else _READY)
    try:
        sock = socket.socket(fileno=fd)
    except OSError:  # the pipe of older code
        os.close(fd)
        return None
    sock.set_inheritable(False)
    return sock


def control_of_predecessor() -> str | None:
    """The path of the control socket of the master that started us, if it has one."""
    return os.environ.get(_CONTROL_VARIABLE) or None


def names_of_predecessor() -> bytes:
    """What the master that started us knew of names, to be read once; nothing if there is none."""
    text = os.environ.pop(_NAMES_VARIABLE, "")
    if not (has_predecessor() and text.isdigit()):
        return b""
    try:
        return from_memory_file(int(text))
    except OSError:  # no such descriptor: another program has set the variable
        return b""


def servers_of_predecessor() -> tuple[int, bytes] | None:
    """The table of servers of the master that started us, and who has which seat; once.

    The table is a descriptor, which becomes the caller's, of a file of the right kind and size; the
    text is as it came. None if there is no table: older code has none, and passes on a variable of
    code before it, whose numbers mean nothing any more.
    """
    text = os.environ.pop(_SERVERS_VARIABLE, "")
    try:
        table, seats = numbers_in(text)
        # What this process has opened itself is not.
        is_given = os.get_inheritable(table) and os.get_inheritable(seats)
    except (ValueError, OSError):
        return None
    if not (is_given and has_predecessor() and memfile.is_made(table, TABLE_BYTES)):
        return None
    os.set_inheritable(table, False)
    try:
        return table, from_memory_file(seats, _MOST_ABOUT_SERVERS)
    except ValueError:
        return table, b""


def has_predecessor() -> bool:
    """Whether an upgrade has started us and waits to hear that we serve."""
    return line.READY_VARIABLE in os.environ
