"""A program that a check runs: started, watched, killed and reaped, without waiting for it.

It is a session of its own, so that nobody's terminal is its own and all that it starts can be ended
with it. It is not started by vfork, as ``subprocess`` would: then this process would stand still
until the program is loaded, from wherever that is.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import select
import signal
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar, Final

from forwarder.system.signals import OF_A_MASTER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from forwarder.checker.loop import Loop

CANNOT_RUN: Final = 126
"""The status of a program that could not be executed, as shells have it."""

# The ones that the checker or Python ignores; a program would inherit that, signal(7).
_IGNORED: Final = (*OF_A_MASTER, signal.SIGPIPE, signal.SIGXFSZ)
_PR_SET_PDEATHSIG: Final = 1
_prctl: Final = getattr(ctypes.CDLL(None), "prctl", None)  # found before a fork, not after it
# The checker's own limit is the hard one, and some programs close all descriptors one by one.
_DESCRIPTORS: Final = 1024
# How often to look for the end of one that cannot be watched. Arbitrary.
_LOOK_S: Final = 0.02


# Killed programs that the kernel does not let go of; with so many, no more are started. Arbitrary.
_MOST_STUCK: Final = 64


class Child:
    """A running program. Owns the process, and a pidfd, until the process is reaped."""

    __slots__ = ("_loop", "_on_end", "_pid", "_pidfd")

    _stuck: ClassVar[set[Child]] = set()

    def __init__(
        self,
        argv: tuple[str, ...],
        environment: Mapping[str, str],
        output_fd: int,
        loop: Loop,
        on_end: Callable[[int], None],
    ) -> None:
        """Start it; it writes to ``output_fd``, which stays the caller's, and reads nothing.

        ``on_end`` gets its status, as of waitpid(2), unless it is killed. Raises OSError.
        """
        if len(self._stuck) >= _MOST_STUCK:
            raise OSError(errno.EAGAIN, f"{_MOST_STUCK} that were killed have not ended yet")
        self._loop = loop
        self._on_end: Callable[[int], None] | None = on_end
        self._pidfd: int | None = None
        self._pid = _start(argv, environment, output_fd)
        try:
            self._pidfd = os.pidfd_open(self._pid)
            loop.watch(self._pidfd, select.EPOLLIN, self._on_events)
        except (OSError, AttributeError):  # no descriptor is left; before Linux 5.3
            self._close()
            loop.call_at(loop.now, self._look)

    def kill(self) -> None:
        """End it, and all that it has started and that has not left its session.

        It is reaped as soon as the kernel lets go of it, which may be never: D in ps(1).
        """
        if self._on_end is None:
            return
        self._on_end = None
        self._stuck.add(self)
        os.kill(self._pid, signal.SIGKILL)
        self._kill_group()
        self._look()

    def _on_events(self, _events: int) -> None:
        self._look()

    def _look(self) -> None:
        """Reap it if it has ended."""
        if not self._pid:
            return
        ended = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            if self._pidfd is None:
                self._loop.call_at(self._loop.now + _LOOK_S, self._look)
            return
        self._kill_group()  # before it is reaped: its number may be another's then
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        self._close()
        self._stuck.discard(self)
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end(status)

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # it is not made yet; a setuid program
            os.killpg(self._pid, signal.SIGKILL)

    def _close(self) -> None:
        fd, self._pidfd = self._pidfd, None
        if fd is not None:
            self._loop.unwatch(fd)
            os.close(fd)


def _start(argv: tuple[str, ...], environment: Mapping[str, str], output_fd: int) -> int:
    """Fork, and execute a program in the child. Returns its pid. Raises OSError."""
    parent = os.getpid()
    with warnings.catch_warnings():
        # From Python 3.12 on: of a process with threads, here those that look names up. The child
        # takes no lock that one of them may hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            _become(argv, environment, output_fd, parent)
        finally:
            os._exit(CANNOT_RUN)
    return pid


def _become(
    argv: tuple[str, ...], environment: Mapping[str, str], output_fd: int, parent: int
) -> None:
    """In the child: be the program. Comes back only if that is impossible."""
    os.setsid()
    os.dup2(output_fd, 1)
    os.dup2(output_fd, 2)
    os.close(output_fd)  # perhaps there is no other one left
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY or hard > _DESCRIPTORS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_DESCRIPTORS, hard))
    if _prctl is not None:
        # It ends with the checker, however that ends: prctl(2).
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return
    try:
        os.execve(argv[0], argv, environment)  # noqa: S606 - no shell is wanted
    except OSError as err:
        os.write(2, f"cannot run {argv[0]}: {err.strerror}".encode())
