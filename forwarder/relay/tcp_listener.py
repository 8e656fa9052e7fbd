"""Accepting clients from one bound socket. A listener never dies of an error.

Does not bind and does not own the socket: the worker does.
"""

from __future__ import annotations

import select
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

from forwarder.limits.gate import STUCK_S
from forwarder.net import sockets
from forwarder.relay import pauses
from forwarder.relay.access import Decision
from forwarder.relay.udp_listener import UdpListener

if TYPE_CHECKING:
    import socket

    from forwarder.config.model import Rule
    from forwarder.limits.admission import Admission
    from forwarder.relay.access import AccessList
    from forwarder.relay.relay import Relay
    from forwarder.system.loop import Clock, Timer
    from forwarder.upstream.pool import Pool

# Accepts per event. The poll is level-triggered, so the rest is reported by the next one.
ACCEPT_BATCH: Final = 8
_ALLOWED: Final = Decision.ALLOWED
# The outcome of an accept: a client was handed over, one was not, there is none (for now).
_TAKEN, _PASSED_OVER, _STOP = range(3)


class Listener:
    """Hands the clients of one listening socket to the relay.

    ``pool`` is that of the whole rule until the first client comes: most ports of a long range may
    never see one, and a pool for each would cost more than the sockets.
    """

    __slots__ = (
        "_family",
        "_is_paused",
        "_is_stopped",
        "_loop",
        "_own",
        "_relay",
        "_timer",
        "_waits_for",
        "access",
        "pool",
        "sock",
    )

    def __init__(
        self,
        loop: Clock,
        relay: Relay,
        sock: socket.socket,
        pool: Pool,
        access: AccessList,
    ) -> None:
        """``sock`` listens, non-blocking; clients that ``access`` allows go to ``pool``."""
        self.pool = pool
        self.access = access
        self.sock = sock
        self._loop = loop
        self._own: Pool | None = None  # of this port, once it was needed
        self._relay = relay
        self._family = sock.family
        self._is_paused = False
        self._is_stopped = False
        self._timer: Timer | None = None  # ends the pause
        self._waits_for: Admission | None = None  # wakes us earlier

    def start(self) -> None:
        """Begin to accept, as soon as the poller takes it."""
        self._is_paused = True
        self._resume()

    def stop(self) -> None:
        """Accept what is queued, then no more. The socket stays open."""
        is_registered = not (self._is_stopped or self._is_paused)
        self._is_stopped = True  # from here on it rests no more, it is over
        for _ in range(self.pool.rule.options.backlog // ACCEPT_BATCH + 1):
            if not self._accept_some():
                break
        if is_registered:
            self._relay.poller.unregister(self.sock.fileno())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wait_no_more()

    def on_events(self, mask: int) -> None:  # noqa: ARG002 - only one kind of event is asked for
        """Accept what is queued, at most ACCEPT_BATCH."""
        self._accept_some()

    def _accept_some(self) -> int:
        """Accept what is queued; returns how many clients that were, ACCEPT_BATCH at most."""
        if self.pool is not self._own:
            self.pool = self._own = self.pool.at_port(sockets.bound_to(self.sock).port)
        admissions = self._relay.admissions
        admission = admissions.get(self.pool.row) if admissions else None
        if admission is not None:
            if not (admission.is_settled or self._is_stopped):  # a stop decides later
                self._rest(STUCK_S)
                return 0
            if admission.queues:
                return self._accept_reserved(admission)
        for nth in range(ACCEPT_BATCH):
            if self._accept(nth) is _STOP:
                return nth
        return ACCEPT_BATCH

    def _accept_reserved(self, admission: Admission) -> int:
        """The same, for clients that wait in the queue at a limit: a place first, then a client."""
        for nth in range(ACCEPT_BATCH):
            wait_s = admission.reserve()
            if wait_s:
                if nth == 0:  # only the first one was announced by an event: a client waits
                    self._wait_for_room(admission, wait_s)
                return nth
            outcome = self._accept(nth)
            if outcome is not _TAKEN:
                admission.give_back()
            if outcome is _STOP:
                return nth
        return ACCEPT_BATCH

    def _wait_for_room(self, admission: Admission, wait_s: float) -> None:
        """Rest until it is time to look again, or until a session of this worker has ended."""
        if self._is_paused or self._is_stopped:
            return
        if admission.met:
            self._relay.books.on_limit(self.pool, f"{admission.met}; clients wait in the queue")
        self._rest(wait_s)
        admission.wait(self._wake)
        self._waits_for = admission

    def _accept(self, nth: int) -> int:
        """Accept a client, the ``nth`` of this event."""
        relay = self._relay
        descriptors = relay.descriptors
        if not descriptors.has_spare and not descriptors.recover_spare():
            self._pause(descriptors.shortage)
            return _STOP
        try:
            # The public accept() wraps this one in 3 us of Python.
            fd, address = self.sock._accept()  # type: ignore[attr-defined]  # noqa: SLF001
        except BlockingIOError:
            return _STOP
        except OSError as err:
            return _PASSED_OVER if self._can_go_on(err, is_announced=nth == 0) else _STOP
        client = sockets.accepted_socket(fd, self._family)
        decision = _ALLOWED if self.access.is_empty else self.access.decide(address[0])
        if decision is _ALLOWED:
            relay.open_session(self.pool, client, address)
            return _TAKEN
        relay.books.on_refused(self.pool, address, partial(sockets.bound_to, client), decision)
        client.close()
        return _PASSED_OVER

    def _can_go_on(self, err: OSError, *, is_announced: bool) -> bool:
        """Whether to accept on after an error."""
        if err.errno in sockets.ACCEPT_IGNORE:
            self._relay.books.on_accept_failed(self.pool, self.sock, err)
            return True
        if err.errno in sockets.OUT_OF_RESOURCES:
            if self._relay.bench.close_idle_pipes():
                return True
            if self._relay.descriptors.make_room():
                return False  # a flow is closed after this batch; the next event comes then
        # accept(2) wants a descriptor before it looks whether there is a client. Only the first one
        # was announced by an event; the next event reports more.
        if is_announced:
            self._pause(err.errno or pauses.BUG)
        return False

    def on_bug(self) -> None:
        """Accepting met a bug: go on after a rest."""
        self._pause(pauses.BUG)

    def _pause(self, number: int) -> None:
        """Rest because of this errno."""
        if self._is_paused or self._is_stopped:
            return
        self._relay.pauses.note(number)
        self._rest(pauses.PAUSE_S)

    def _rest(self, seconds: float) -> None:
        """Accept no client for a while."""
        if self._is_paused or self._is_stopped:
            return
        self._is_paused = True
        self._relay.poller.unregister(self.sock.fileno())
        self._timer = self._loop.call_later(seconds, self._resume)

    def _wake(self) -> None:
        """There may be room for clients in the queue; called while something else is handled."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = self._loop.call_later(0, self._resume)

    def _wait_no_more(self) -> None:
        if self._waits_for is not None:
            self._waits_for.stop_waiting(self._wake)
            self._waits_for = None

    def _resume(self) -> None:
        """The rest is over."""
        self._timer = None
        self._wait_no_more()
        descriptors = self._relay.descriptors
        number = 0 if descriptors.recover_spare() else descriptors.shortage
        try:
            if not number:
                self._relay.poller.register(self.sock.fileno(), self, select.EPOLLIN)
        except OSError as err:  # ENOSPC, ENOMEM: the set takes no more for now, epoll_ctl(2)
            number = err.errno or pauses.BUG
        if number:
            self._relay.pauses.note(number)
            self._timer = self._loop.call_later(pauses.PAUSE_S, self._resume)
        else:
            self._is_paused = False


def listener_class(rule: Rule) -> type[Listener] | type[UdpListener]:
    """What takes the clients of a rule."""
    return UdpListener if rule.protocol.listens_on_udp else Listener


AnyListener: TypeAlias = Listener | UdpListener
