"""Checks of servers, begun by hand on a loop that the test turns."""

from __future__ import annotations

import socket
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from forwarder.checker.loop import Loop
from forwarder.checker.outcome import Aim
from forwarder.checker.probes import agent, command, http, tcp, tls, udp
from forwarder.checker.probes.child import Child
from forwarder.config.model import Check, CheckKind
from forwarder.net.options import PLAIN
from forwarder.net.sockets import Target
from support.ends import family_of
from support.waiting import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from forwarder.checker.outcome import Begin, Outcome
    from forwarder.net.options import How
    from forwarder.net.sockets import SockAddr

BEGIN: Final[dict[CheckKind, Begin]] = {
    CheckKind.TCP: tcp.begin,
    CheckKind.TLS: tls.begin,
    CheckKind.HTTP: http.begin,
    CheckKind.UDP: udp.begin,
    CheckKind.COMMAND: command.begin,
    CheckKind.AGENT: agent.begin,
}
# Of a check that is to fail by it; that of others is PATIENCE_S.
SHORT_S: Final = 0.2


def check(kind: str = "tcp", **fields: object) -> Check:
    """A check that does not end by its timeout unless a test says so."""
    given = {"timeout_s": PATIENCE_S, **fields}
    return Check(kind=CheckKind(kind), **given)  # type: ignore[arg-type]


def target_of(sock: socket.socket) -> Target:
    """Where a listening socket can be reached."""
    address = sock.getsockname()
    return Target(sock.family, address.decode() if isinstance(address, bytes) else address)


def target(address: tuple[str, int] | str) -> Target:
    """Where a server would be."""
    return Target(family_of(address), address)


class Asking:
    """One check under way, on a loop of its own. ``outcomes``: what it has reported."""

    def __init__(
        self,
        check: Check,
        target: Target,
        *,
        server: str = "",
        how: How = PLAIN,
        source: SockAddr | None = None,
    ) -> None:
        self.loop = Loop()
        self.outcomes: list[Outcome] = []
        self._aim = Aim(target, how, source, server or str(target))
        self._check = check
        self.begin()

    def begin(self) -> None:
        """Begin it, for the first time or again."""
        self.outcomes.clear()
        begin = BEGIN[self._check.kind]
        self.probe = begin(self._check, self._aim, self.loop, self.outcomes.append)
        assert self.outcomes == [], "reported before its caller has the probe"

    def turn(self) -> None:
        """Let it do what there is to do now."""
        self.loop.turn(0.001)

    def until(self, predicate: Callable[[], object]) -> None:
        """Turn the loop until something is true."""
        until = time.monotonic() + PATIENCE_S
        while not predicate():
            assert time.monotonic() < until, self.outcomes
            self.turn()

    def outcome(self) -> Outcome:
        """How it ends."""
        self.until(lambda: self.outcomes)
        assert len(self.outcomes) == 1
        return self.outcomes[0]


@contextmanager
def asking(
    check: Check,
    target: Target,
    *,
    server: str = "",
    how: How = PLAIN,
    source: SockAddr | None = None,
) -> Iterator[Asking]:
    """A check under way; at the end it reports nothing more, and has left nothing behind."""
    it = Asking(check, target, server=server, how=how, source=source)
    try:
        yield it
        known = list(it.outcomes)
        it.probe.cancel()
        it.probe.cancel()
        it.until(lambda: not (it.loop._watches or Child._stuck))
        assert it.outcomes == known
    finally:
        it.probe.cancel()
        it.loop.close()


def ask(
    check: Check,
    target: Target,
    *,
    server: str = "",
    how: How = PLAIN,
    source: SockAddr | None = None,
) -> Outcome:
    """How a check ends that needs nothing more from the test."""
    with asking(check, target, server=server, how=how, source=source) as it:
        return it.outcome()


def accept(it: Asking, listener: socket.socket) -> socket.socket:
    """The server's end of the check."""
    found: list[socket.socket] = []

    def try_it() -> bool:
        listener.setblocking(False)
        try:
            found.append(listener.accept()[0])
        except BlockingIOError:
            return False
        return True

    it.until(try_it)
    found[0].settimeout(PATIENCE_S)
    if listener.family != socket.AF_UNIX:
        found[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found[0]
