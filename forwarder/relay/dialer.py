"""The search for an upstream that answers: one address after the other, the next beside a slow one.

Lives only while a session or a flow connects: so its memory is not in every open session.

Theory of operation
-------------------
An *attempt* is one address that is being tried. It ends when it is connected, fails, or has taken
``connect_timeout``; then the next address has its turn, at once. One that has not been answered
within ``attempt_delay`` goes on, but the next one is tried beside it (RFC 8305, section 5): the
first that is connected wins, and the others are closed. Each attempt has all of its time.

An attempt that the kernel has not begun *waits*, and is tried again at every tick: when descriptors
run out, or while the queue of a unix socket is full, of which no event reports the end
(connect(2)).

A name without an answer yet may still bring addresses, for ``connect_timeout`` at most. They are
looked for when all others are tried: at every tick if nothing is under way any more.

There is no race if the client's first bytes went with the SYN, since two upstreams would do what
they ask; nor when descriptors run out: a race takes neither the last one nor waits for one.

An address that fails or does not answer is remembered (``upstream.failures``), so that it costs
only one session its wait.
"""

from __future__ import annotations

import errno
import math
import os
import socket
from typing import TYPE_CHECKING, Final, Protocol

from forwarder.net import sockets
from forwarder.relay.poller import BROKEN, WRITABLE
from forwarder.relay.ports import SETTING
from forwarder.relay.wheel import TICK_S
from forwarder.stats.reasons import Who

if TYPE_CHECKING:
    from forwarder.balancing.server import Server
    from forwarder.net.sockets import SockAddr, Target
    from forwarder.relay.outages import Outages
    from forwarder.relay.poller import Poller
    from forwarder.upstream.pool import Pool

# Attempts that are under way at once; each has a descriptor. Arbitrary.
MAX_ATTEMPTS: Final = 4
_UNDER_WAY: Final = frozenset({0, errno.EINPROGRESS})
# These can only follow a handshake that succeeded: the upstream accepted and reset at once.
_RESET_AFTER_CONNECT: Final = frozenset({errno.ECONNRESET, errno.EPIPE})


class Caller(Protocol):
    """The session or the flow that is connected.

    ``target`` is set to what was tried last. ``takes_resets``: an upstream that has accepted and
    reset at once is as good as any. ``is_answered``: there is a handshake to wait for.
    """

    pool: Pool
    client_address: SockAddr
    target: Target | None
    takes_resets: bool
    is_answered: bool

    def make_socket(
        self, target: Target, source: SockAddr | None, *, is_rival: bool
    ) -> socket.SocketType:
        """Make a non-blocking socket for ``target``, which becomes the dialer's. Raises OSError.

        ``is_rival``: it is one more, and must not be made of the last descriptor.
        """

    def connect(self, upstream: socket.SocketType, target: Target) -> int:
        """Begin to connect; returns an errno as ``connect_ex``. Raises OSError as well."""

    def on_dialing(self) -> None:
        """The first attempt begins. Raises OSError: it waits, and this is called again."""

    def on_starved(self) -> None:
        """Descriptors have run out: call :meth:`Dialer.on_timer` when there may be one."""

    def on_portless(self, target: Target) -> bool:
        """Local ports towards ``target`` have run out. Whether one was made free.

        If so, call :meth:`Dialer.on_turn` when it is.
        """

    def on_connected(self, upstream: socket.SocketType, mask: int) -> None:
        """``upstream`` is connected, to ``target``, and is the caller's from here on.

        ``mask`` has the events that were seen. Further ones still go to the attempt.
        """

    def on_no_upstream(self, why: str, who: Who) -> None:
        """All have failed."""

    def arm(self, limit_s: float) -> None:
        """Call :meth:`Dialer.on_timer` within ``limit_s``, 0 is never."""

    def on_bug(self) -> None:
        """There was a bug: end."""


class Attempt:
    """One address that is tried. Owns ``sock``, which is None while it waits for one.

    ``server``: whose address it is, where the dialer chooses.
    """

    __slots__ = ("deadline", "dialer", "error", "is_noted", "server", "sock", "target")

    def __init__(self, dialer: Dialer, target: Target, deadline: float) -> None:
        self.dialer = dialer
        self.target = target
        self.server = dialer.server
        self.deadline = deadline
        self.error = errno.ETIMEDOUT  # why it fails, if it ends by time
        self.is_noted = False  # as failed
        self.sock: socket.SocketType | None = None

    def on_events(self, mask: int) -> None:
        """Handle the outcome of the connect."""
        if mask & BROKEN:
            self.dialer.on_broken(self, mask)
        elif mask & WRITABLE and self.sock is not None:
            self.dialer.win(self, self.sock, mask)

    def on_bug(self) -> None:
        """End the session whose event handler failed."""
        self.dialer.caller.on_bug()


class Dialer:
    """Tries ``targets`` for ``caller``, within the batch of events that :meth:`start` is called in.

    ``early``: bytes of the client that went with the SYN of the attempt under way, and are still in
    the client's queue. ``server``: whose addresses are tried; None where there is no choice.
    ``adds_rivals``: there may be more to try beside what is under way than is known by now.
    """

    __slots__ = (
        "_attempts",
        "_error",
        "_has_begun",
        "_is_over",
        "_more_until",
        "_next",
        "_outages",
        "_poller",
        "_race_at",
        "_targets",
        "adds_rivals",
        "caller",
        "early",
        "server",
    )

    def __init__(
        self, caller: Caller, targets: tuple[Target, ...], poller: Poller, outages: Outages
    ) -> None:
        self.caller = caller
        self.early = 0
        self.server: Server | None = None
        self.adds_rivals = False
        self._poller = poller
        self._outages = outages
        self._targets = targets
        self._next = 0  # index of the target that is tried next
        self._attempts: list[Attempt] = []
        self._error = 0  # of the attempt that failed last
        self._race_at = math.inf
        self._has_begun = self._is_over = False
        self._more_until = 0.0  # when to wait no longer for names; 0: all have been answered
        if caller.pool.has_unanswered:
            limit_s = caller.pool.rule.connect_timeout_s
            self._more_until = self._poller.now + (limit_s or math.inf)

    @property
    def has_others(self) -> bool:
        """Whether there is more than one target, or may be."""
        return len(self._targets) > 1 or self._more_until > 0

    @property
    def is_racing(self) -> bool:
        """Whether an attempt is under way, beside which another one would be a rival."""
        if not self._attempts:  # as for nearly every session
            return False
        return any(attempt.sock is not None for attempt in self._attempts)

    @property
    def may_send_early(self) -> bool:
        """Whether data may go with the SYN: no other attempt can win without it.

        One that lacks a descriptor is not raced, and so is alone.
        """
        return all(
            attempt.sock is None and attempt.error in sockets.OUT_OF_RESOURCES
            for attempt in self._attempts
        )

    def start(self) -> None:
        """Try the next target; if it fails at once, the one after it, and so on."""
        while self._next < len(self._targets) or self._has_found_more():
            caller = self.caller
            now = self._poller.now
            limit_s = caller.pool.rule.connect_timeout_s
            attempt = Attempt(self, self._targets[self._next], now + (limit_s or math.inf))
            self._next += 1
            if not self._open(attempt):
                continue
            has_more = self._next < len(self._targets) or self._more_until or self.adds_rivals
            if has_more and (race_s := caller.pool.race_after_s):
                self._race_at = now + race_s
                limit_s = min(limit_s or race_s, race_s)
            else:
                self._race_at = math.inf
            if not self._is_over:
                caller.arm(limit_s)
            return
        if not self._attempts:
            self._wait_for_more()

    def on_broken(self, attempt: Attempt, mask: int) -> None:
        """An attempt has failed, unless it was reset only after it had connected."""
        sock = attempt.sock
        if sock is None:
            return
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error in _RESET_AFTER_CONNECT and self.caller.takes_resets:
            self.win(attempt, sock, mask)
        else:
            self._give_up(attempt, error)

    def on_timer(self, now: float) -> float:
        """Give up, try again, race; returns when to call this again, 0 for never."""
        for attempt in tuple(self._attempts):
            if now >= attempt.deadline:
                self._give_up(attempt, attempt.error)
            elif attempt.sock is None:
                self._try_again(attempt)
            if self._is_over:
                return 0.0
        if now >= self._race_at:
            self._race(now)
        return 0.0 if self._is_over else self._next_look(now)

    def on_turn(self) -> None:
        """There may be a descriptor again."""
        for attempt in tuple(self._attempts):
            if attempt.sock is None and not self._is_over:
                self._try_again(attempt)

    def close(self, *, is_abort: bool) -> None:
        """Give up everything. ``is_abort``: by RST, where something was sent with the SYN."""
        self._is_over = True
        attempts, self._attempts = self._attempts, []
        for attempt in attempts:
            if attempt.sock is not None:
                if is_abort:
                    sockets.set_abort_on_close(attempt.sock)
                self._poller.release(attempt.sock)

    # -- one attempt

    def _open(self, attempt: Attempt) -> bool:
        """Begin to connect. False if that has failed; else it is under way, waits, or has won."""
        caller, target = self.caller, attempt.target
        caller.target = target
        sock = None
        try:
            source = caller.pool.source(target.family, caller.client_address)
            sock = caller.make_socket(
                target, source, is_rival=bool(self._attempts) and self.is_racing
            )
            error = caller.connect(sock, target)
        except OSError as err:
            # Below 0: of getaddrinfo, for an interface that has gone just now.
            error = err.errno if err.errno and err.errno > 0 else errno.ENODEV
        if sock is not None:
            if error in _UNDER_WAY and caller.is_answered and sockets.has_met_itself(sock, target):
                self.early = 0
                sockets.set_abort_on_close(sock)
                error = errno.ECONNREFUSED
            if error in _UNDER_WAY:
                error = self._begin(attempt, sock)
                if not error:
                    return True
                self.early = 0
                # It may be connected: a FIN would look like an empty stream.
                sockets.set_abort_on_close(sock)
            if error == errno.EADDRNOTAVAIL:
                error = sockets.why_no_address(sock, target)
            sock.close()
        if error in sockets.OUT_OF_RESOURCES or (error == errno.EAGAIN and target.is_unix):
            self._wait(attempt, error)
            return True
        if error == sockets.NO_PORT and caller.on_portless(target):
            if attempt not in self._attempts:
                self._attempts.append(attempt)
            return True
        self._note_failed(attempt, error)
        return False

    def _begin(self, attempt: Attempt, sock: socket.SocketType) -> int:
        """Wait for the outcome of a connect, if there is one to wait for.

        Returns 0, or an errno if the poller takes no more for now.
        """
        caller = self.caller
        try:
            if caller.is_answered:
                if not self._has_begun:
                    caller.on_dialing()
                    self._has_begun = True
                self._poller.register(sock.fileno(), attempt)
        except OSError as err:
            return err.errno or errno.ENOMEM
        attempt.sock = sock
        attempt.error = errno.ETIMEDOUT
        if attempt not in self._attempts:
            self._attempts.append(attempt)
        if not caller.is_answered:
            self.win(attempt, sock, 0)
        return 0

    def _wait(self, attempt: Attempt, error: int) -> None:
        """Try it again at the next tick; a rival that lacks a descriptor not so soon."""
        is_starved = error in sockets.OUT_OF_RESOURCES
        if is_starved and self.is_racing and attempt not in self._attempts:
            self._next -= 1
            return
        if attempt not in self._attempts:
            self._attempts.append(attempt)
        if is_starved:
            attempt.error = error
            self.caller.on_starved()
        else:
            self.caller.arm(TICK_S)

    def _try_again(self, attempt: Attempt) -> None:
        if not self._open(attempt):
            self._attempts.remove(attempt)
            self.start()

    def _give_up(self, attempt: Attempt, error: int) -> None:
        """An attempt under way, or one that waits, has failed: go on with the next target."""
        self._attempts.remove(attempt)
        self.early = 0  # still in the queue of the client, for the next one
        if attempt.sock is not None:
            self._poller.release(attempt.sock)
        elif error in sockets.OUT_OF_RESOURCES:
            self._next = len(self._targets)  # there is none for the others, either
        self._note_failed(attempt, error)
        self.start()

    def _note_failed(self, attempt: Attempt, error: int) -> None:
        self._error = error
        if error not in sockets.OUT_OF_RESOURCES and error != sockets.NO_PORT:
            caller, has_others = self.caller, self.has_others
            self._outages.on_attempt_failed(
                caller.pool, attempt.target, os.strerror(error), has_others=has_others
            )

    def win(self, attempt: Attempt, sock: socket.SocketType, mask: int) -> None:
        """The first that is connected; the others are closed."""
        caller = self.caller
        self._is_over = True
        others, self._attempts = self._attempts, []
        if len(others) > 1:
            for other in others:
                if other is not attempt and other.sock is not None:
                    self._poller.release(other.sock)
        caller.target = attempt.target
        if caller.pool.failures.known and caller.is_answered:
            self._outages.on_attempt_worked(caller.pool, attempt.target)
        caller.on_connected(sock, mask)

    # -- all of them

    def _race(self, now: float) -> None:
        """Wait no longer for what was not answered by now, though it may still win."""
        self._race_at = now + (self.caller.pool.race_after_s or math.inf)
        is_starved = False
        for attempt in self._attempts:
            if attempt.error in sockets.OUT_OF_RESOURCES:
                is_starved = True
            elif not attempt.is_noted:
                attempt.is_noted = True
                self._outages.on_unanswered(self.caller.pool, attempt.target)
        if not (self.early or is_starved or len(self._attempts) >= MAX_ATTEMPTS):
            self.start()

    def _has_found_more(self) -> bool:
        """Whether a name has been answered since, with an address that was not tried yet."""
        if not self._more_until:  # as for nearly every session
            return False
        pool, known = self.caller.pool, self._targets
        self._targets += tuple(one for one in pool.targets() or () if one not in known)
        if not pool.has_unanswered:
            self._more_until = 0.0
        return len(self._targets) > len(known)

    def _wait_for_more(self) -> None:
        """Nothing is under way: look again a moment later if a name may still be answered."""
        now = self._poller.now
        if now < self._more_until:
            self._race_at = now + TICK_S
            self.caller.arm(TICK_S)
        else:
            self._fail()

    def _next_look(self, now: float) -> float:
        looks = [self._race_at, *(attempt.deadline for attempt in self._attempts)]
        if any(attempt.sock is None for attempt in self._attempts):
            looks.append(now + TICK_S)
        first = min(looks)
        return first if first < math.inf else 0.0

    def _fail(self) -> None:
        self._is_over = True
        if self._error in sockets.OUT_OF_RESOURCES:
            why = f"no descriptor or memory in time: {os.strerror(self._error)}"
            self.caller.on_no_upstream(why, Who.US)
        elif self._error == sockets.NO_PORT:
            self.caller.on_no_upstream(f"no local port is free ({SETTING})", Who.US)
        else:
            why = os.strerror(self._error)
            if self._more_until:
                why = f"{why}; no name server answered in time"
            self.caller.on_no_upstream(why, Who.UPSTREAM)
