"""Checks of kind ``command``: a program whose status says how the server is."""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING, Final

from forwarder.checker.probes import why
from forwarder.checker.probes.attempt import Attempt
from forwarder.checker.probes.child import CANNOT_RUN, Child
from forwarder.net.sockets import NUL
from forwarder.system.signals import describe_end

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.checker.loop import Loop
    from forwarder.checker.outcome import Aim, Outcome, Probe
    from forwarder.config.model import Check
    from forwarder.net.sockets import Target

# What a program may write. One that writes more is ended: it would be read for as long as it runs.
_MOST_OUTPUT: Final = 64 * 1024
_PIECE: Final = 16 * 1024
# Of its output, to find the last line in.
_KEPT: Final = 4096
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Of shells: a program in a script was not found, or could not be executed. That is no fault of a
# server.
_NOT_FOUND: Final = 127


def begin(check: Check, aim: Aim, loop: Loop, done: Callable[[Outcome], None]) -> Probe:
    """See :class:`~forwarder.checker.outcome.Begin`. Forks."""
    return _Running(check, aim, loop, done)


def environment(aim: Aim) -> dict[str, str]:
    """All that a program finds in its environment.

    The server as configured, and where this check goes: an address and a port, or the path or the
    ``@name`` of a unix socket and no port.
    """
    return {
        "PATH": _PATH,
        "FORWARDER_SERVER": aim.server,
        "FORWARDER_HOST": _host(aim.target),
        "FORWARDER_PORT": "" if aim.target.is_unix else str(aim.target.port),
    }


def _host(target: Target) -> str:
    if isinstance(target.sockaddr, str):
        return target.sockaddr.replace(NUL, "@", 1)
    return target.sockaddr[0]


class _Running(Attempt):
    """A program at work. Owns it, and the pipe that it writes to."""

    __slots__ = ("_child", "_pipe", "_tail", "_written")

    def __init__(self, check: Check, aim: Aim, loop: Loop, done: Callable[[Outcome], None]) -> None:
        """See :class:`~forwarder.checker.outcome.Begin`."""
        super().__init__(check, loop, done)
        self._child: Child | None = None
        self._pipe: int | None = None
        self._tail = b""
        self._written = 0
        try:
            self._start(check, aim)
        except OSError as err:
            reason = f"cannot start {check.argv[0]}: {why.of_error(err.strerror)}"
            self.end_soon(reason, is_ours=True)

    def _start(self, check: Check, aim: Aim) -> None:
        self._pipe, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            os.set_blocking(self._pipe, False)
            self._loop.watch(self._pipe, select.EPOLLIN, self._on_output)
            self._child = Child(check.argv, environment(aim), theirs, self._loop, self._on_end)
        finally:
            os.close(theirs)

    def _on_output(self, _events: int) -> None:
        if self._pipe is not None and self._read(self._pipe):
            self._close_pipe()  # it may go on without writing

    def _read(self, pipe: int) -> bool:
        """Read a piece of its output. Returns whether no more can come."""
        try:
            data = os.read(pipe, _PIECE)
        except BlockingIOError:
            return False
        self._tail = (self._tail + data)[-_KEPT:]
        self._written += len(data)
        if self._written > _MOST_OUTPUT:
            self.end(f"wrote more than {_MOST_OUTPUT >> 10} KiB")
        return not data

    def _on_end(self, status: int) -> None:
        """It has ended; the rest of its output is in the pipe."""
        before = -1
        while self._pipe is not None and before != self._written:
            before = self._written
            self._read(self._pipe)
        code = os.waitstatus_to_exitcode(status)
        reason = why.last_line(self._tail)
        if code == 0:
            self.end(reason, is_good=True)
        else:
            is_ours = code in (CANNOT_RUN, _NOT_FOUND)
            self.end(reason or describe_end(status), is_ours=is_ours)

    def on_silence(self) -> None:
        """See :class:`Attempt`."""
        reason = why.last_line(self._tail)
        self.end(f"did not end {why.within(self._timeout_s)}{reason and ': '}{reason}")

    def close(self, *, is_orderly: bool) -> None:
        """See :class:`Attempt`: end what it has started, too."""
        del is_orderly
        self._close_pipe()
        child, self._child = self._child, None
        if child is not None:
            child.kill()

    def _close_pipe(self) -> None:
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            self._loop.unwatch(pipe)
            os.close(pipe)
