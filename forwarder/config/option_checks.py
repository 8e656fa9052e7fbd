"""The socket options of a rule: defaults, which sockets they are for, what goes together. Pure.

What this system can do, and this process may, is tried in ``probing``.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import TYPE_CHECKING, Final

from forwarder.config.address import Address, UnixAddress
from forwarder.config.model import Protocol, Sides, SocketOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from forwarder.config.address import Endpoint
    from forwarder.config.raw import Issues, OptionValue, RawOptions, RawRule

_UNIT: Final = re.compile("_(s|ms|bytes)$")


def without_unit(field: str) -> str:
    """The key of a field: units are in the names of the model, and not in those of a file."""
    return _UNIT.sub("", field)


FIELD_OF: Final = {
    without_unit(field.name): field.name
    for field in fields(SocketOptions)
    if field.name != "places"
}
_TCP_KEYS: Final = (
    "keepalive",
    "keepalive_idle",
    "keepalive_interval",
    "keepalive_count",
    "nodelay",
    "user_timeout",
    "congestion",
)
_IP_KEYS: Final = ("rcvbuf", "sndbuf", "mark", "dscp")
_UPSTREAM_KEYS: Final = ("upstream_mark", "upstream_device", "transparent")


def finish_options(rule: RawRule, defaults: RawOptions, issues: Issues) -> SocketOptions:
    """The options of a rule, with ``defaults`` where it has none itself.

    Not with those that do nothing there: a change of one would be a change of the rule.
    """
    kinds = _Kinds(rule)
    given = {key: placed for key, placed in defaults.items() if kinds.have(key)} | rule.options
    values: dict[str, OptionValue] = {FIELD_OF[key]: it.value for key, it in given.items()}
    options = SocketOptions(
        **values,  # type: ignore[arg-type]  # each reader gives what its field holds
        places=tuple((key, placed.place) for key, placed in given.items()),
    )
    check = _Check(rule, kinds, options, issues)
    check.sockets()
    check.together()
    check.transparent()
    return options


class _Kinds:
    """The kinds of sockets that a rule has: TCP, UDP or unix."""

    def __init__(self, rule: RawRule) -> None:
        protocol = rule.protocol
        self.listens = _kind(rule.listen.value, is_udp=protocol.listens_on_udp)
        self.connects = {
            _kind(upstream.value, is_udp=protocol.connects_by_udp) for upstream in rule.upstreams
        }
        self.either = {self.listens, *self.connects}

    def have(self, key: str) -> bool:
        """Whether one of them has this option, which may stand at the top of a file."""
        return self.listens != "UDP" if key == "backlog" else "TCP" in self.either


class _Check:
    """Tells what cannot be, or does nothing, of the options that stand in the rule itself."""

    def __init__(
        self, rule: RawRule, kinds: _Kinds, options: SocketOptions, issues: Issues
    ) -> None:
        self._rule = rule
        self._options = options
        self._issues = issues
        self._listens = kinds.listens
        self._connects = kinds.connects
        self._either = kinds.either

    def sockets(self) -> None:
        """Each option has a socket that it is for."""
        either = self._either
        no_side = "no side of this rule is one"
        for key in _TCP_KEYS:
            self._need(key, "TCP" in either, "TCP", no_side)
        for key in _IP_KEYS:
            self._need(key, bool(either & {"TCP", "UDP"}), "IP", no_side)
        for key in _UPSTREAM_KEYS:
            is_ip = bool(self._connects & {"TCP", "UDP"})
            self._need(key, is_ip, "IP", "no upstream of this rule is one")
        no_listener = "this rule does not listen on one"
        self._need("device", self._listens != "unix", "IP", no_listener)
        self._need("backlog", self._listens != "UDP", "TCP and unix", no_listener)
        for key in ("fast_open", "mptcp"):
            sides = getattr(self._options, key)
            if sides.on_listen:
                self._need(key, self._listens == "TCP", "TCP", no_listener)
            if sides.on_connect:
                self._need(key, "TCP" in self._connects, "TCP", "no upstream of this rule is one")

    def _need(self, key: str, is_there: bool, kind: str, where: str) -> None:  # noqa: FBT001 - the condition
        if key in self._rule.options and not is_there:
            self._error(key, f"{key} is an option of {kind} sockets, and {where}")

    def _error(self, key: str, what: str, hint: str = "leave it out") -> None:
        self._issues.error(self._rule.options[key].place, what, hint=hint)

    def together(self) -> None:
        """Options that exclude each other, or do nothing without another one."""
        own, options = self._rule.options, self._options
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
        if not self._options.transparent or "transparent" not in rule.options:
            return
        if self._listens == "unix":
            self._error("transparent", "transparent: clients of a unix socket have no address")
        if rule.source is not None:
            self._error("transparent", "transparent and source_address exclude each other")
        listens = _family(rule.listen.value)
        for upstream in rule.upstreams:
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


def describe_options(options: SocketOptions) -> str:
    """The options that are not the defaults, for people: ``key value, key value``."""
    found: Mapping[str, object] = {key: getattr(options, name) for key, name in FIELD_OF.items()}
    default = SocketOptions()
    return ", ".join(
        f"{key} {_text(value)}"
        for key, value in found.items()
        if value != getattr(default, FIELD_OF[key])
    )


def _text(value: object) -> object:
    if isinstance(value, bool):
        return "on" if value else "off"
    return value.value if isinstance(value, Sides) else value
