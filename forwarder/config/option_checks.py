"""The socket options of a rule: which sockets they are for, what goes together. Pure.

What this system can do, and this process may, is tried in ``probing``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from forwarder.config.address import Address, UnixAddress
from forwarder.config.keys import OF_A_RULE, Sockets
from forwarder.config.model import Protocol, Sides

if TYPE_CHECKING:
    from forwarder.config.address import Endpoint
    from forwarder.config.model import SocketOptions
    from forwarder.config.raw import Issues, RawRule

_IP: Final = {"TCP", "UDP"}


def check_options(rule: RawRule, options: SocketOptions, issues: Issues) -> None:
    """Report options written in a rule itself that are impossible or do nothing.

    ``options`` are those that the rule has in the end.
    """
    check = _Check(rule, options, issues)
    check.sockets()
    check.together()
    check.transparent()


class Kinds:
    """The kinds of sockets that a rule has: TCP, UDP or unix."""

    def __init__(self, rule: RawRule) -> None:
        protocol = rule.protocol
        self.listens = _kind(rule.listen.value, is_udp=protocol.listens_on_udp)
        self.connects = {
            _kind(upstream.value, is_udp=protocol.connects_by_udp)
            for upstream in rule.upstream_ends
        }
        self.either = {self.listens, *self.connects}

    def have(self, sockets: Sockets | None) -> bool:
        """Whether there are such sockets; always for None."""
        match sockets:
            case Sockets.TCP:
                return "TCP" in self.either
            case Sockets.IP:
                return bool(self.either & _IP)
            case Sockets.UPSTREAM_IP:
                return bool(self.connects & _IP)
            case Sockets.LISTENING_IP:
                return self.listens != "unix"
            case Sockets.LISTENING_STREAM:
                return self.listens != "UDP"
        return True


class _Check:
    """The checks of one rule."""

    def __init__(self, rule: RawRule, options: SocketOptions, issues: Issues) -> None:
        self._rule = rule
        self._options = options
        self._issues = issues
        self._kinds = Kinds(rule)

    def sockets(self) -> None:
        """Each option has a socket that it is for."""
        kinds = self._kinds
        for key in self._rule.keys:
            sockets = OF_A_RULE[key].sockets
            if sockets is not None and not kinds.have(sockets):
                self._misplaced(key, sockets.kind, sockets.lack)
        for key, sides in (("fast_open", self._options.fast_open), ("mptcp", self._options.mptcp)):
            if sides.on_listen and kinds.listens != "TCP":
                self._misplaced(key, "TCP", Sockets.LISTENING_IP.lack)
            if sides.on_connect and "TCP" not in kinds.connects:
                self._misplaced(key, "TCP", Sockets.UPSTREAM_IP.lack)

    def _misplaced(self, key: str, kind: str, lack: str) -> None:
        self._error(key, f"{key} is an option of {kind} sockets, and {lack}")

    def _error(self, key: str, what: str, hint: str = "leave it out") -> None:
        self._issues.error(self._rule.keys[key].place, what, hint=hint)

    def together(self) -> None:
        """Options that exclude each other, or do nothing without another one."""
        own, options = self._rule.keys, self._options
        for key in ("keepalive_idle", "keepalive_interval", "keepalive_count"):
            if key in own and not options.keepalive:
                what = f"{key} has no effect with keepalive = false"
                self._issues.warn(own[key].place, what, hint="leave one of the two out")
        if "fast_open_queue" in own and not options.fast_open.on_listen:
            self._issues.warn(
                own["fast_open_queue"].place,
                'fast_open_queue has no effect without fast_open = "listen" or "both"',
                hint="leave it out",
            )
        is_udp_to_tcp = self._rule.protocol is Protocol.UDP_TO_TCP
        if "fast_open" in own and options.fast_open.on_connect and is_udp_to_tcp:
            self._error("fast_open", "fast_open towards the upstreams of a udptotcp rule")
        for key in ("user_timeout", "dscp"):
            # mptcp_setsockopt() has no TCP_USER_TIMEOUT and no IPV6_TCLASS, up to Linux 6.18.
            if key in own and options.mptcp is not Sides.OFF:
                self._error(key, f"{key} with mptcp: Linux has no such option of MPTCP sockets")

    def transparent(self) -> None:
        """The address of a client can only be used where it has one of the upstream's family."""
        rule = self._rule
        if not self._options.transparent or "transparent" not in rule.keys:
            return
        if self._kinds.listens == "unix":
            self._error("transparent", "transparent: clients of a unix socket have no address")
        if "source_address" in rule.keys:
            self._error("transparent", "transparent and source_address exclude each other")
        listens = _family(rule.listen.value)
        for upstream in rule.upstream_ends:
            family = _family(upstream.value)
            if listens and family and listens != family:
                self._error(
                    "transparent",
                    f"transparent: clients have {listens} addresses, and the upstream "
                    f"{upstream.value} is {family}",
                    "use an upstream of the same family",
                )


def _kind(end: Endpoint, *, is_udp: bool) -> str:
    if isinstance(end, UnixAddress):
        return "unix"
    return "UDP" if is_udp else "TCP"


def _family(end: Endpoint) -> str:
    """The family of an address if there can be no other, else nothing."""
    if not isinstance(end, Address) or not end.is_literal or end.host == "::":
        return ""
    return "IPv6" if ":" in end.host else "IPv4"
