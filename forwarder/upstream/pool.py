"""The upstreams of one rule as socket addresses, and which is tried first.

Asks the resolver for names; connects nothing.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from forwarder.net.sockets import Target

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.config.model import Rule
    from forwarder.net.sockets import SockAddr
    from forwarder.stats import Row
    from forwarder.upstream.resolver import Resolver


def literal_target(host: str, port: int) -> Target:
    """The socket address of an IP literal, scope included. Blocks never. Raises OSError."""
    found = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    )
    family, _, _, _, sockaddr = found[0]
    return Target(family, sockaddr)  # type: ignore[arg-type]  # an IP family gives an IP address


class Pool:
    """Where the sessions of a rule go. Each new session starts at the next upstream in turn."""

    def __init__(self, rule: Rule, resolver: Resolver, row: int, counts: Row) -> None:
        """``counts`` is the row of the rule, shared with its earlier pools; ``row`` its number."""
        self.rule = rule
        self.row = row
        self.counts = counts
        self._resolver = resolver
        self._turn = 0
        self._source = literal_target(rule.source, 0) if rule.source else None
        self._fixed: tuple[tuple[Target, ...], ...] | None = None
        if all(upstream.is_literal for upstream in rule.upstreams):
            every = tuple(literal_target(up.host, up.port) for up in rule.upstreams)
            self._fixed = tuple(every[i:] + every[:i] for i in range(len(every)))

    def targets(self) -> tuple[Target, ...] | None:
        """Addresses to try, in order; None if a name has to be resolved first. Never blocks."""
        turn = self._turn
        count = len(self.rule.upstreams)
        self._turn = turn + 1 if turn + 1 < count else 0
        if self._fixed is not None:
            return self._fixed[turn]
        found: list[Target] = []
        for i in range(count):
            upstream = self.rule.upstreams[(turn + i) % count]
            resolved = self._resolver.lookup(upstream.host, upstream.port)
            if resolved is None:
                return None
            found += resolved
        return tuple(found)

    def wait_for_targets(self, callback: Callable[[tuple[Target, ...]], None]) -> None:
        """Call back with the addresses once all names are resolved, or with those that could be."""
        self._resolver.when_resolved(
            tuple((up.host, up.port) for up in self.rule.upstreams),
            lambda: callback(self.targets() or ()),
        )

    def source(self, family: int) -> SockAddr | None:
        """The local address for connections to ``family``, or None to leave it to the kernel."""
        source = self._source
        return source.sockaddr if source is not None and source.family == family else None

    def on_failure(self) -> None:
        """No address could be connected to: names may have moved, look them up again."""
        if self._fixed is None:
            for upstream in self.rule.upstreams:
                self._resolver.refresh(upstream.host, upstream.port)
