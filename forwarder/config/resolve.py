"""RawConfig to Config: defaults, names, and the checks that hold for every dialect.

Pure. Resolves no host names: two listen addresses are the same when they are written alike, or
are spellings of one IP address.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from forwarder.access import PATTERN_FORMS, PatternError, parse_pattern
from forwarder.addr import canonical_host
from forwarder.config.model import UDP_TIMEOUT_S, AccessRule, Config, Protocol, Rule
from forwarder.errors import Place

if TYPE_CHECKING:
    from forwarder.config.raw import Issues, Placed, RawConfig, RawRule

MAX_NAME_LENGTH = 100


def resolve(raw: RawConfig, source: str, issues: Issues) -> Config:
    """Return the finished configuration; it is good only if ``issues`` holds no error."""
    if not raw.rules_seen:
        issues.error(
            Place(source),
            "there is no forwarding rule",
            allowed="one or more",
            hint="add one; a configuration without rules would do nothing",
        )
    _check_access(raw.access, issues)
    _check_access(raw.dropped_access, issues)
    _check_listeners(raw.rules, issues)
    names = _Names(issues)
    for rule in raw.rules:
        names.claim(rule)
    rules = tuple(_finish(rule, names.name_of(rule), raw, issues) for rule in raw.rules)
    return Config(rules=rules, access=tuple(raw.access), settings=raw.settings)


def _finish(rule: RawRule, name: str, raw: RawConfig, issues: Issues) -> Rule:
    _check_access(rule.access, issues)
    _check_loop(rule, issues)
    _check_source(rule, issues)
    _check_udp_timeout(rule, issues)
    return Rule(
        name=name,
        listen=rule.listen.value,
        upstreams=tuple(upstream.value for upstream in rule.upstreams),
        protocol=rule.protocol,
        source=rule.source.value if rule.source else None,
        access=tuple(rule.access),
        connect_timeout_s=_first(rule.connect_timeout_s, raw.connect_timeout_s),
        half_close_timeout_s=_first(rule.half_close_timeout_s, raw.half_close_timeout_s),
        idle_timeout_s=_first(rule.idle_timeout_s, raw.idle_timeout_s),
        udp_timeout_s=rule.udp_timeout_s.value if rule.udp_timeout_s else UDP_TIMEOUT_S,
        place=rule.place,
    )


def _first(value: float | None, default: float) -> float:
    return default if value is None else value


class _Names:
    """Gives each rule a name of its own; names that were written come first."""

    def __init__(self, issues: Issues) -> None:
        self._issues = issues
        self._taken: dict[str, Place] = {}

    def claim(self, rule: RawRule) -> None:
        """Note a written name; a second rule of that name is an error."""
        if rule.name is None:
            return
        name, place = rule.name.value, rule.name.place
        if len(name) > MAX_NAME_LENGTH:
            self._issues.error(
                place,
                f"name has {len(name)} characters",
                allowed=f"1 to {MAX_NAME_LENGTH} characters",
            )
        first = self._taken.setdefault(name, place)
        if first is not place:
            self._issues.error(
                place,
                f"the name {name[:MAX_NAME_LENGTH]!r} is taken by the rule at {first}",
                hint="give each rule a name of its own, or none",
            )

    def name_of(self, rule: RawRule) -> str:
        """Return the written name, or one made from the listen address.

        It depends on nothing else, so that a rule keeps its name when other rules come and go.
        """
        if rule.name is not None:
            return rule.name.value
        name = f"{_transport(by_udp=rule.protocol.listens_on_udp)} {rule.listen.value}"
        while name in self._taken:
            name += "'"
        self._taken[name] = rule.place
        return name


def _transport(*, by_udp: bool) -> str:
    return "udp" if by_udp else "tcp"


def _check_listeners(rules: list[RawRule], issues: Issues) -> None:
    """Two rules cannot take the same clients; SO_REUSEPORT would silently let them share."""
    seen: dict[tuple[bool, str, int], Place] = {}
    for rule in rules:
        by_udp = rule.protocol.listens_on_udp
        listen = rule.listen.value
        endpoint = (by_udp, canonical_host(listen.host), listen.port)
        first = seen.setdefault(endpoint, rule.listen.place)
        if first is not rule.listen.place:
            issues.error(
                rule.listen.place,
                f"{_transport(by_udp=by_udp)} {listen} is already listened on by the"
                f" rule at {first}",
                hint="remove one of the two rules or change its port",
            )


def _check_access(rules: list[AccessRule], issues: Issues) -> None:
    for rule in rules:
        try:
            parse_pattern(rule.pattern)
        except PatternError as error:
            what = f"{rule.verdict.value} pattern {error}"
            issues.error(rule.place, what, allowed=PATTERN_FORMS, hint=error.hint)


def _check_loop(rule: RawRule, issues: Issues) -> None:
    if rule.protocol.listens_on_udp is not rule.protocol.connects_by_udp:
        return
    listen_host = canonical_host(rule.listen.value.host)
    for upstream in rule.upstreams:
        if upstream.value.port != rule.listen.value.port:
            continue
        host = canonical_host(upstream.value.host)
        if host == listen_host or _takes(listen_host, host):
            issues.warn(
                upstream.place,
                f"upstream {upstream.value} is where this rule listens ({rule.listen.value}):"
                " a session would connect to itself until nothing is left",
                hint="change the port or the address of one of them",
            )


def _takes(listen_host: str, host: str) -> bool:
    """Whether a wildcard listener takes connections to the loopback host."""
    if listen_host not in {"0.0.0.0", "::"}:
        return False
    ip = _literal(host)
    is_ours = host == "localhost" or (ip is not None and (ip.is_loopback or ip.is_unspecified))
    return is_ours and (listen_host == "::" or ip is None or ip.version == 4)


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _check_source(rule: RawRule, issues: Issues) -> None:
    """Refuse names, and an address of a family that cannot connect to the upstream."""
    if rule.source is None:
        return
    source = _literal(rule.source.value)
    if source is None:
        issues.error(
            rule.source.place,
            f"the source {rule.source.value!r} is a name",
            allowed="an address of this host",
            hint="write the address that the name stands for",
        )
        return
    for upstream in rule.upstreams:
        ip = _literal(upstream.value.host)
        if ip is not None and ip.version != source.version:
            issues.error(
                rule.source.place,
                f"the source address {rule.source.value} is IPv{source.version} and the upstream"
                f" {upstream.value} is IPv{ip.version}",
                hint=f"give a local IPv{ip.version} address as the source",
            )


def _check_udp_timeout(rule: RawRule, issues: Issues) -> None:
    timeout: Placed[float] | None = rule.udp_timeout_s
    if timeout is None:
        return
    if rule.protocol is Protocol.TCP:
        issues.warn(
            timeout.place,
            "timeout has no effect on a TCP rule: it ends silent UDP flows",
            hint="the TOML format has idle_timeout for TCP",
        )
    elif timeout.value == 0:
        issues.warn(
            timeout.place,
            "timeout 0 keeps UDP flows for ever, and with them two sockets each",
            hint=f"leave it out for {UDP_TIMEOUT_S:g} s",
        )
