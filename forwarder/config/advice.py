"""Likely mistakes: what is valid but probably unintended. For other commands than ``run``.

Pure. Everything here is a warning with a place and a hint. It names what is certain from the text
alone: a rule that may make sense is left alone.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from forwarder.config import advice_access, advice_groups
from forwarder.config.address import Address, UnixAddress
from forwarder.config.address_checks import WILDCARDS, listens_for, spelling, transport
from forwarder.config.model import Dialect
from forwarder.errors import Issue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forwarder.config.address import Endpoint
    from forwarder.config.model import Config, Rule


def advise(config: Config, dialect: Dialect) -> tuple[Issue, ...]:
    """Everything that its author should look at again, by place."""
    found = [
        *advice_access.advise(config),
        *advice_groups.advise(config),
        *_own_listeners(config),
        *_taken_clients(config),
        *(_of_rinetd(config) if dialect is Dialect.RINETD else ()),
    ]
    return tuple(sorted(found, key=lambda issue: (issue.place.line, issue.place.column)))


# -- rules among one another


class _Listeners:
    """Where the rules listen, to be looked up by address."""

    def __init__(self, config: Config) -> None:
        self.by_port: dict[tuple[str, int], list[Rule]] = {}
        self._by_host: dict[tuple[str, int, str], Rule] = {}
        for rule in config.rules:
            kind, host = transport(rule.protocol), spelling(rule.listen)
            for port in _ports(rule.listen):
                self.by_port.setdefault((kind, port), []).append(rule)
                self._by_host[kind, port, host] = rule

    def taking(self, kind: str, there: Endpoint) -> Rule | None:
        """The rule that takes connections to an address, or to some port of a range."""
        for port in _ports(there):
            for host in (spelling(there), *WILDCARDS):
                rule = self._by_host.get((kind, port, host))
                if rule is not None and listens_for(rule.listen, there):
                    return rule
        return None


def _ports(endpoint: Endpoint) -> range:
    """The ports of an address; a unix socket has the port 0."""
    if isinstance(endpoint, UnixAddress):
        return range(1)
    return range(endpoint.port, endpoint.last_port + 1)


def _own_listeners(config: Config) -> Iterator[Issue]:
    """Upstreams that are other rules of this configuration."""
    listeners = _Listeners(config)
    leads: dict[str, set[str]] = {}
    found = []
    for rule in config.rules:
        kind = "udp" if rule.protocol.connects_by_udp else "tcp"
        for upstream in rule.upstream_ends:
            other = listeners.taking(kind, upstream)
            if other is not None and other is not rule:
                leads.setdefault(rule.name, set()).add(other.name)
                found.append((rule, upstream, other))
    circles = _circles(leads)
    for rule, upstream, other in found:
        if circles[rule.name] == circles[other.name]:
            what = "a session would go round until nothing is left"
            hint = "change the upstream of one of them"
        else:
            what = "sessions pass the forwarder twice"
            hint = "lead to the upstream of that rule, unless it is meant"
        where = f"where the rule {other.name!r} at {other.place} listens"
        yield _warning(rule, f"upstream {upstream} is {where}: {what}", hint)


def _circles(leads: dict[str, set[str]]) -> dict[str, str]:
    """Names of rules to one for each circle: those that lead to one another have the same.

    Kosaraju's way: an order in which what is led to comes first, then backwards from its end.
    """
    back: dict[str, set[str]] = {}
    for name, others in leads.items():
        for other in others:
            back.setdefault(other, set()).add(name)
    circle: dict[str, str] = {}
    for name in reversed(_finished(leads)):
        ahead = [name]
        while ahead:
            found = ahead.pop()
            if found not in circle:
                circle[found] = name
                ahead += back.get(found, ())
    return circle


def _finished(leads: dict[str, set[str]]) -> list[str]:
    """All names, each when everything that it leads to has been walked. Not recursive."""
    seen: set[str] = set()
    done: list[str] = []
    for start in leads:
        ahead = [(start, False)]
        while ahead:
            name, is_walked = ahead.pop()
            if is_walked:
                done.append(name)
            elif name not in seen:
                seen.add(name)
                ahead.append((name, True))
                ahead += [(other, False) for other in leads.get(name, ())]
    return done


def _taken_clients(config: Config) -> Iterator[Issue]:
    """Rules for every address of which another rule takes the clients of one address."""
    told: set[tuple[str, str]] = set()
    for (kind, _), rules in _Listeners(config).by_port.items():
        wide = [rule for rule in rules if spelling(rule.listen) in WILDCARDS]
        for rule, other in product(rules, wide):
            if (rule.name, other.name) in told or not _is_part(rule.listen, other.listen):
                continue
            told.add((rule.name, other.name))
            yield _warning(
                other,
                f"{kind} {other.listen} does not get all clients: those of {rule.listen} go to the"
                f" rule {rule.name!r} at {rule.place}, which has access rules of its own",
                "let each rule listen on addresses of its own, unless it is meant",
            )


def _is_part(listen: Endpoint, wide: Endpoint) -> bool:
    """Whether one listens on one of the addresses that the other's wildcard stands for."""
    if not isinstance(listen, Address) or not listen.is_literal or listen.host in WILDCARDS:
        return False
    return ":" not in listen.host or spelling(wide) == "::"


def _warning(rule: Rule, what: str, hint: str) -> Issue:
    return Issue(rule.place, what, hint=hint, is_warning=True)


# -- what rinetd 0.73 makes of it


def _of_rinetd(config: Config) -> Iterator[Issue]:
    """Where rinetd 0.73 does something else than its manual says, and we do not."""
    first = next((rule for rule in config.rules if rule.access), None)
    if first is not None and not config.access and len(first.access) > 1:
        entry = first.access[0]
        yield Issue(
            entry.place,
            f"rinetd 0.73 ignores this {entry.verdict.value} rule (its issue 23); here it counts",
            hint="if clients depend on that, take it out",
            is_warning=True,
        )
    has_access = bool(config.access) or first is not None
    for log in config.settings.logs if has_access else ():
        yield Issue(
            log.place,
            "refused clients are logged as not-allowed (no allow rule matches) or denied (a deny"
            " rule does); rinetd 0.73 writes denied for the first and anything for the second",
            hint="what reads the log should know both words",
            is_warning=True,
        )
