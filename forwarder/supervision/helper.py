"""A supervised child of the master that is no worker: without it everything is forwarded as before.

It runs as the workers' user, with no capability, no listening socket and no data of clients. It
ends with its master, however that ends. Its :class:`Job` says what it does.
"""

from __future__ import annotations

import ctypes
import logging
import os
import selectors
import signal
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import setproctitle

from forwarder.config.model import HANG_TIMEOUT_S
from forwarder.ipc.channel import Channel, ChannelClosed, channel_pair
from forwarder.ipc.heartbeat import Heartbeats, Vigil
from forwarder.supervision.policy import Backoff
from forwarder.system.children import keep_only
from forwarder.system.signals import describe_end, leave_to_the_master

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forwarder.ipc.channel import Message, Received

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG: Final = 1
# For the end of a killed process, before it is left to the one that adopts it. Arbitrary.
_REAP_S: Final = 0.2


class Job(Protocol):
    """What a helper does, and what the master has to do with it."""

    def run(self, channel: Channel, beat: Callable[[float], None]) -> None:
        """Do it, in the helper, until the channel closes; ``beat`` is called with the time."""

    def on_started(self) -> None:
        """In the master: there is a new helper, which knows nothing yet."""

    def on_message(self, received: Received) -> None:
        """In the master: a message of it. KeyError, TypeError and ValueError are its end."""


class Helper:
    """The helper while it is wanted. Owns the channel to it; the master reaps the process."""

    def __init__(
        self,
        name: str,
        job: Job,
        selector: selectors.BaseSelector,
        drop: Callable[[], None],
    ) -> None:
        """``drop`` gives up the master's rights, in the child.

        ``hang_s``: a helper without a sign of life for this long is hung, and replaced.
        """
        self.hang_s = HANG_TIMEOUT_S
        self._name = name
        self._job = job
        self._selector = selector
        self._drop = drop
        self._heartbeats = Heartbeats()
        self._cell = 0
        self._backoff = Backoff()
        self._channel: Channel | None = None
        self._pid: int | None = None
        self._started_at = 0.0
        self._is_killed = False  # by us; its end is reported by SIGCHLD
        self._is_wanted = False
        self._vigil = Vigil(0.0)

    @property
    def is_started(self) -> bool:
        """Whether there is one."""
        return self._channel is not None

    @property
    def is_free(self) -> bool:
        """Whether there is one that takes a message at once."""
        return self._channel is not None and not self._channel.has_outbox

    def describe(self, now: float) -> list[dict[str, object]]:
        """As in the status: nothing if none is wanted."""
        if not self._is_wanted:
            return []
        is_there = self._pid is not None
        return [
            {
                "name": self._name,
                "state": "running" if is_there else "waiting",
                "pid": self._pid,
                "uptime_s": round(now - self._started_at, 1) if is_there else 0.0,
            }
        ]

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do; None for never."""
        if not self._is_wanted:
            return None
        if self._pid is None:
            return self._backoff.not_before
        return self._vigil.looked_at + self.hang_s / 4

    def want(self, *, is_wanted: bool) -> None:
        """Start one at the next :meth:`turn`, or end it."""
        self._is_wanted = is_wanted
        if not is_wanted:
            self._kill()

    def turn(self, now: float) -> None:
        """Start it if it is wanted, or end it if it gives no sign of life."""
        if self._is_wanted and self._pid is None and now >= self._backoff.not_before:
            self._start(now)
        elif self._pid is not None:
            self._vigil.look(now, self.hang_s)
            silent_s = self._vigil.silent_s(self._heartbeats.last(self._cell), now)
            if silent_s > self.hang_s and not self._is_killed:
                log.error("helper.hung name=%s pid=%d; killing it", self._name, self._pid)
                self._kill()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send it a message, now or when it reads; one that has gone gets nothing.

        The descriptors become the channel's, which closes them.
        """
        if self._channel is None:
            for fd in fds:
                os.close(fd)
            return
        with suppress(ChannelClosed):  # SIGCHLD follows
            self._channel.send(message, fds, gives=True)
            self._watch()

    def on_exit(self, pid: int, status: int) -> None:
        """Note that a child has ended; another one is ignored."""
        if pid != self._pid:
            return
        self._hang_up()
        self._pid = None
        now = time.monotonic()
        if self._is_wanted:
            delay = self._backoff.on_death(self._started_at, now)
            how = describe_end(status)
            log.error(
                "helper.died name=%s pid=%d: %s; next start in %.1f s; forwarding goes on",
                self._name,
                pid,
                how,
                delay,
            )

    def end(self) -> None:
        """Kill it and reap it, at the end of the master."""
        self._is_wanted = False
        self._kill()
        self._hang_up()
        until = time.monotonic() + _REAP_S
        with suppress(ChildProcessError):
            while self._pid is not None and time.monotonic() < until:
                if os.waitpid(self._pid, os.WNOHANG)[0]:
                    self._pid = None
                else:
                    time.sleep(0.005)

    # -- birth and death

    def _start(self, now: float) -> None:
        self._cell = self._heartbeats.new_cell(now)
        try:
            ours, theirs = channel_pair()
        except OSError as err:
            self._on_unstarted(err, now)
            return
        master = os.getpid()
        try:
            pid = os.fork()
        except OSError as err:
            ours.close()
            theirs.close()
            self._on_unstarted(err, now)
            return
        if pid == 0:
            try:
                self._become(theirs, master)
            except BaseException:  # the process ends here, whatever it was
                log.exception("helper.crashed name=%s", self._name)
                os._exit(70)
            finally:
                os._exit(0)
        theirs.close()
        self._pid, self._channel = pid, ours
        self._started_at = now
        self._vigil = Vigil(now)
        self._is_killed = False
        try:
            self._selector.register(ours, selectors.EVENT_READ, self._hear)
        except OSError as err:  # ENOMEM, ENOSPC: epoll_ctl(2)
            log.error("helper.failed name=%s: cannot watch it: %s", self._name, err.strerror)
            self._hang_up()
            self._kill()
            return
        self._job.on_started()

    def _become(self, channel: Channel, master: int) -> None:
        """In the child: give up everything of the master, then do the job."""
        keep_only([channel.fileno()])
        # TERM, too, which may be sent to all: a helper ends with its master, and not before it.
        leave_to_the_master(but=(signal.SIGCHLD,))
        setproctitle.setproctitle(f"forwarder: {self._name}")
        self._drop()
        # Also when it is stopped (SIGSTOP) and cannot see that the channel closes; prctl(2).
        with suppress(AttributeError, OSError):  # not Linux
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == master:
            self._job.run(channel, partial(self._heartbeats.beat, self._cell))

    def _on_unstarted(self, err: OSError, now: float) -> None:
        delay = self._backoff.on_death(now, now)
        log.error(
            "helper.failed name=%s: cannot fork: %s; next try in %.1f s",
            self._name,
            err.strerror,
            delay,
        )

    def _kill(self) -> None:
        if self._pid is not None and not self._is_killed:
            self._is_killed = True
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    # -- messages

    def _hear(self) -> None:
        """Read its messages, and send what waited for it."""
        if self._channel is None:
            return
        try:
            self._channel.flush()
            for received in self._channel.receive():
                try:
                    self._job.on_message(received)
                finally:
                    received.close()
        except ChannelClosed:
            self._hang_up()  # its death is reported by SIGCHLD
            self._kill()
            return
        except (KeyError, TypeError, ValueError, RecursionError):
            log.exception("helper.nonsense name=%s", self._name)
            self._kill()
        self._watch()

    def _watch(self) -> None:
        """Ask for writability exactly while something waits for it."""
        if self._channel is None:
            return
        events = selectors.EVENT_READ
        if self._channel.has_outbox:
            events |= selectors.EVENT_WRITE
        if self._selector.get_key(self._channel).events != events:
            self._selector.modify(self._channel, events, self._hear)

    def _hang_up(self) -> None:
        if self._channel is not None:
            with suppress(KeyError, ValueError, RuntimeError):  # the selector may be closed by now
                self._selector.unregister(self._channel)
            self._channel.close()
            self._channel = None
