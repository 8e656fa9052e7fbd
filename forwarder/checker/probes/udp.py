"""Checks of kind ``udp``: a datagram, and one that comes back.

If none is expected, silence is no failure, as most programs do not answer what they do not know.
Only the word that nobody is there is one: ICMP, which may be lost or held back on the way.
"""

from __future__ import annotations

import errno
import os
import select
from typing import TYPE_CHECKING, Final

from forwarder.checker.probes import why
from forwarder.checker.probes.attempt import SocketAttempt
from forwarder.checker.probes.expecting import Expecting
from forwarder.net.sockets import NO_PORT, OUT_OF_RESOURCES, PEER_GONE, has_met_itself
from forwarder.net.udp import set_error_queue, upstream_socket

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.checker.loop import Loop
    from forwarder.checker.outcome import Aim, Outcome, Probe
    from forwarder.config.model import Check

_MOST_BYTES: Final = 65536  # more than any datagram has
# That are not what is expected, before no more is waited for. Arbitrary; bounds what a server that
# does not stop costs the checker.
_MOST_DATAGRAMS: Final = 64


def begin(check: Check, aim: Aim, loop: Loop, done: Callable[[Outcome], None]) -> Probe:
    """See :class:`~forwarder.checker.outcome.Begin`."""
    return _Asking(check, aim, loop, done)


class _Asking(SocketAttempt):
    """The datagram is on its way; any number may come back."""

    __slots__ = ("_check", "_count", "_heard")

    def __init__(self, check: Check, aim: Aim, loop: Loop, done: Callable[[Outcome], None]) -> None:
        """See :class:`~forwarder.checker.outcome.Begin`."""
        super().__init__(check, loop, done)
        self._check = check
        self._count = 0
        self._heard: bytes | None = None  # the last datagram, which was none that is expected
        try:
            sock = upstream_socket(aim.target, aim.source, aim.how)
        except OSError as err:
            self._end_soon(err.errno or 0, is_made=False)
            return
        if has_met_itself(sock, aim.target):
            sock.close()
            self._end_soon(errno.ECONNREFUSED, is_made=True)
            return
        self.own(sock, select.EPOLLIN)
        try:
            # Also that a host is not there, which the kernel says to no other socket: ip(7).
            set_error_queue(sock, is_on=True)
            sock.send(check.send)
        except OSError as err:
            self._end_soon(err.errno or 0, is_made=True)

    def _end_soon(self, code: int, *, is_made: bool) -> None:
        if code == NO_PORT:
            self.end_soon("no local port is free", is_ours=True)
        elif is_made or code in PEER_GONE:
            self.end_soon(why.of_error(os.strerror(code)), is_ours=code in OUT_OF_RESOURCES)
        else:
            self.end_soon(f"cannot make a socket: {why.of_error(os.strerror(code))}", is_ours=True)

    def on_events(self, events: int) -> None:
        """See :class:`SocketAttempt`."""
        del events
        if self._sock is None:
            return
        try:
            data = self._sock.recv(_MOST_BYTES)
        except BlockingIOError:  # its checksum was wrong, say: select(2), BUGS
            return
        except OSError as err:
            self.end(why.of_error(err.strerror))
            return
        verdict = Expecting(self._check).read(data)
        if verdict is not None and (verdict.is_good or verdict.is_ours):
            self.end(verdict.why, is_good=verdict.is_good, is_ours=verdict.is_ours)
            return
        self._heard = data
        self._count += 1
        if self._count >= _MOST_DATAGRAMS:
            self.end(why.got(data))

    def on_silence(self) -> None:
        """See :class:`Attempt`."""
        if not self._check.expect:
            self.end("no answer, and none is expected", is_good=True)
        elif self._heard is None:
            self.end(f"no answer {why.within(self._timeout_s)}")
        else:
            self.end(why.got(self._heard))
