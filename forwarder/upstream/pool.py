"""The upstreams of one rule as socket addresses, and which cannot be used just now.

Reads the table of names; looks nothing up and connects to nothing.
"""

from __future__ import annotations

import errno
import os
import socket
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final, TypeAlias

from forwarder.config.address import UnixAddress
from forwarder.net.options import to_connect, to_listen
from forwarder.net.sockets import Target, unix_target
from forwarder.net.zones import Zoned, index_of, literal
from forwarder.upstream.failures import Failures
from forwarder.upstream.wanted import hosts_of_origins

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from forwarder.balancing.balancer import Balancer
    from forwarder.config.address import Endpoint
    from forwarder.config.model import Rule
    from forwarder.net.options import How
    from forwarder.net.sockets import SockAddr
    from forwarder.stats.rows import Row
    from forwarder.upstream.names import Names

# A name that has to be looked up, and the port to connect to.
_Named: TypeAlias = tuple[str, int]


# What logs that know one upstream only say where there are several, and none was tried.
NOBODY: Final = ("-", 0)


class Pool:
    """Where the sessions of a rule go: to its one upstream, or to one that a balancer chooses.

    ``counts`` is the row of the rule, shared with its earlier pools; ``row`` is its number.
    ``origin`` is the pool of the whole rule, which this one is itself unless :meth:`at` has made
    it, for the port that is ``offset`` behind the first. ``has_unix``: one end of the sessions is a
    unix socket, or may be. ``listen_host`` and ``upstream_text`` (host and port; NOBODY where there
    are several) are as written. ``local`` is the address that all clients connect to, or None if
    only their sockets know it. ``how`` says how upstream sockets are made, by family;
    ``opens_fast``: connect with data in the first segment, where there is some. ``failures``: the
    addresses that failed just now, of all ports of the rule. ``takes_ports``: each upstream socket
    takes a local port that others need, too: for UDP, unless it is a client's. ``race_after_s``:
    how long an address may not answer until the next one is tried beside it; 0: none is.
    ``balancer`` chooses among the upstreams, by their index; None: there is nothing to choose.

    As of when :meth:`targets` was last asked: ``addresses`` are those of each upstream, None while
    its name has no answer; ``has_unanswered``: some name had none yet; ``without_address``: the
    upstreams that had no address, as a set of bits.
    """

    __slots__ = (
        "__weakref__",
        "_all",
        "_hosts",
        "_names",
        "_origin",
        "_origins",
        "_revision",
        "_source",
        "_upstreams",
        "_zoned",
        "_zoned_source",
        "_zones",
        "addresses",
        "balancer",
        "counts",
        "failures",
        "has_unanswered",
        "has_unix",
        "how",
        "listen_host",
        "local",
        "offset",
        "opens_fast",
        "race_after_s",
        "row",
        "rule",
        "takes_ports",
        "upstream_text",
        "without_address",
    )

    def __init__(
        self,
        rule: Rule,
        names: Names,
        row: int,
        counts: Row,
        balancer: Balancer | None = None,
        port_of: tuple[Pool, int] | None = None,
    ) -> None:
        """The pool of a whole rule; the last argument is for :meth:`at`: another one's offset."""
        origin, offset = port_of or (None, 0)
        self.rule = rule
        self.row = row
        self.counts = counts
        self.balancer = balancer
        self.offset = offset
        self.race_after_s = rule.group.attempt_delay_s
        self.has_unanswered = False
        ends = rule.upstream_ends
        self.has_unix = any(isinstance(end, UnixAddress) for end in (rule.listen, *ends))
        self.listen_host, _ = _as_written(rule.listen, 0)
        self.opens_fast = rule.options.fast_open.on_connect
        self.how = to_connect(rule.options, is_udp=rule.protocol.connects_by_udp)
        self.takes_ports = rule.protocol.connects_by_udp and not rule.options.transparent
        self.local = None if rule.options.transparent else _only_local(rule.listen)
        self.upstream_text = _as_written(ends[0], offset) if len(ends) == 1 else NOBODY
        self._origin = origin
        self.failures: Failures = origin.failures if origin is not None else Failures()
        self._names = names
        self._revision = -1
        source = literal(rule.source, 0) if rule.source else None
        self._source = source if isinstance(source, Target) else None
        self._zoned_source = source if isinstance(source, Zoned) else None
        upstreams = self._upstreams = tuple(_moved(end, offset) for end in ends)
        self._hosts = tuple(dict.fromkeys(up[0] for up in upstreams if isinstance(up, tuple)))
        # Names that its upstreams were found by, and that may lead to others by now.
        self._origins = hosts_of_origins(rule)
        self._zoned = tuple(up for up in upstreams if isinstance(up, Zoned))
        self._zones: tuple[Target | None, ...] = ()  # as they were last used
        self.addresses: Sequence[tuple[Target, ...] | None] = (None,) * len(upstreams)
        self._all: tuple[Target, ...] | None = None
        self.without_address = 0
        if not self._hosts:
            self._look_up()

    @property
    def origin(self) -> Pool:
        """The pool of the whole rule."""
        return self._origin or self

    def at(self, offset: int) -> Pool:
        """The pool for sessions of the port that is ``offset`` behind the first one of the rule.

        Upstreams that are ranges move by as much; self when that changes nothing. Made each time;
        it has the counts and the balancer of the rule.
        """
        if not offset or all(
            isinstance(end, UnixAddress) or end.ports == 1 for end in self.rule.upstream_ends
        ):
            return self
        whole = self.origin
        return Pool(self.rule, self._names, self.row, self.counts, self.balancer, (whole, offset))

    def at_port(self, port: int) -> Pool:
        """The same for a port that the rule listens on."""
        return self.at(port - self.rule.first_port)

    def targets(self) -> tuple[Target, ...] | None:
        """All addresses, in order; those of names as far as they are known. Never blocks.

        None while there is no address at all and some name has no answer yet; empty if there is
        none though all names have one, see :meth:`why_no_target`.
        """
        if self._zoned and self._zones != tuple(one.target() for one in self._zoned):
            self._look_up()
        if self._hosts and self._revision != self._names.revision:
            self._revision = self._names.revision
            self._look_up()
        return self._all

    def choosable(self) -> tuple[Target, ...]:
        """The addresses that a session may be sent to now, in order."""
        targets = self.targets() or ()
        if self.balancer is None:
            return targets
        choosable = self.balancer.choosable
        found: list[Target] = []
        for index in range(len(self.rule.upstreams)):
            if choosable >> index & 1:
                found += self.addresses[index] or ()
        return tuple(found)

    def avoided(self, now: float) -> int:
        """The upstreams all of whose addresses have failed just now, as a set of bits."""
        failures, found = self.failures, 0
        if not failures.known:
            return 0
        for index, addresses in enumerate(self.addresses):
            if addresses and all(failures.is_avoided(one, now) for one in addresses):
                found |= 1 << index
        return found

    def wait_for_targets(self, callback: Callable[[tuple[Target, ...]], None]) -> None:
        """Call back as soon as there is an address, or all names turn out to have none."""
        for host in self._hosts:
            self._names.refresh(host)

        def attempt() -> bool:
            targets = self.targets()
            if targets is None:
                return False
            callback(targets)
            return True

        self._names.wait(self._hosts, attempt)

    def leads_to(self, target: Target) -> bool:
        """Whether ``target`` is still one of the upstreams; True also if nothing is known now."""
        targets = self.targets()
        return not targets or target in targets

    def why_no_target(self) -> str:
        """Why :meth:`targets` is empty, by name and interface."""
        names = [f"{host}: {self._names.why(host)}" for host in self._hosts]
        return "; ".join([*names, *(f"{what}: {why}" for what, why in self.interfaces() if why)])

    @property
    def needs_interfaces(self) -> bool:
        """Whether the rule names interfaces that it needs to reach the upstreams."""
        return bool(self._zoned or self._zoned_source or self.rule.options.upstream_device)

    def interfaces(self) -> Iterator[tuple[Zoned | str, str]]:
        """What names an interface towards the upstreams, and why that cannot be used now, or ""."""
        for zoned in self._zoned:
            yield zoned, _why_absent(zoned.zone)
        yield from self._own_interfaces()

    @property
    def has_own_interfaces(self) -> bool:
        """Whether the interfaces exist that its sockets are bound to, whatever the upstream."""
        return not any(why for _, why in self._own_interfaces())

    def _own_interfaces(self) -> Iterator[tuple[str, str]]:
        """The part of :meth:`interfaces` that does not depend on the upstream."""
        if self._zoned_source is not None:
            source = self._zoned_source
            yield f"source_address {source.host}", _why_absent(source.zone)
        device = self.rule.options.upstream_device
        if device:
            yield f"upstream_device {device}", _why_absent(device)

    def _look_up(self) -> None:
        """Work out what to try, from the addresses that the names have now."""
        before, self._zones = self._zones, tuple(one.target() for one in self._zoned)
        for target in before:
            if target is not None and target not in self._zones:
                self.failures.forget(target)  # no session will try it again
        zones = dict(zip(self._zoned, self._zones, strict=True))
        found: list[tuple[Target, ...] | None] = []
        for upstream in self._upstreams:
            if isinstance(upstream, Target):
                found.append((upstream,))
            elif isinstance(upstream, Zoned):
                target = zones[upstream]
                found.append(() if target is None else (target,))
            else:
                found.append(self._names.at(*upstream))
        self.addresses = tuple(found)
        self.has_unanswered = None in found
        self.without_address = sum(1 << index for index, one in enumerate(found) if not one)
        self._all = None
        if any(found) or not self.has_unanswered:
            self._all = tuple(target for one in found for target in one or ())

    def client_how(self, family: int) -> How:
        """How further sockets for UDP clients are made."""
        return to_listen(self.rule.options, family, is_udp=True)

    def source(self, family: int, client: SockAddr) -> SockAddr | None:
        """The local address for connections to ``family``, or None to leave it to the kernel.

        Raises OSError if it has to be the client's, which is of another family, and while the
        interface that it names is missing.
        """
        if self.rule.options.transparent and family != socket.AF_UNIX:
            return _own_address(client, family)
        source = self._source
        if self._zoned_source is not None and family == socket.AF_INET6:
            source = self._zoned_source.target()
            if source is None:
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return source.sockaddr if source is not None and source.family == family else None

    def on_failure(self) -> None:
        """No address could be connected to: names may have moved, look them up again."""
        for host in (*self._hosts, *self._origins):
            self._names.refresh(host)


def _own_address(client: SockAddr, family: int) -> SockAddr:
    """The address of a client, with any port, to connect from."""
    if isinstance(client, tuple):
        # IPv4 clients of an IPv6 listener (RFC 4291 2.5.5.2).
        host = client[0].removeprefix("::ffff:") if "." in client[0] else client[0]
        if ":" not in host and family == socket.AF_INET:
            return host, 0
        if ":" in host and family == socket.AF_INET6:
            return host, 0, 0, client[3] if len(client) == 4 else 0
    raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))


def _only_local(listen: Endpoint) -> Target | None:
    """Where clients connect to, if it is the same for all of them."""
    if isinstance(listen, UnixAddress) or listen.ports > 1:
        return None
    if not listen.is_literal or ip_address(listen.host).is_unspecified:
        return None
    local = literal(listen.host, listen.port)
    return local if isinstance(local, Target) else None  # a zone: its index may change


def _why_absent(interface: str) -> str:
    return "" if index_of(interface) else f"there is no interface {interface}"


def _as_written(end: Endpoint, offset: int) -> tuple[str, int]:
    """Host and port as in the configuration, the port being the one at ``offset``."""
    if isinstance(end, UnixAddress):
        return str(end), 0
    return end.host, end.port + (offset if end.ports > 1 else 0)


def _moved(upstream: Endpoint, offset: int) -> Target | Zoned | _Named:
    if isinstance(upstream, UnixAddress):
        return unix_target(upstream.path)
    port = upstream.port + offset if upstream.ports > 1 else upstream.port
    if upstream.is_literal:
        return literal(upstream.host, port)
    return upstream.host, port
