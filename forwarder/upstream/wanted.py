"""Which names a configuration has, and which rules have them. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forwarder.config.address import Address

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forwarder.config.model import Rule


def upstream_names(rules: Iterable[Rule]) -> dict[str, list[str]]:
    """The names that rules lead to, with the names of the rules."""
    found: dict[str, list[str]] = {}
    for rule in rules:
        for host in dict.fromkeys(
            end.host
            for end in rule.upstream_ends
            if isinstance(end, Address) and not end.is_literal
        ):
            found.setdefault(host, []).append(rule.name)
    return found


def listening_names(rules: Iterable[Rule]) -> dict[str, list[str]]:
    """The names that rules listen on, with the names of the rules."""
    found: dict[str, list[str]] = {}
    for rule in rules:
        if isinstance(rule.listen, Address) and not rule.listen.is_literal:
            found.setdefault(rule.listen.host, []).append(rule.name)
    return found


def sought_names(rules: Iterable[Rule]) -> dict[str, list[str]]:
    """All names of effective rules, and those that stand for their members; with the rules."""
    every = tuple(rules)
    found = all_names(every)
    for rule in every:
        for host in hosts_of_origins(rule):
            users = found.setdefault(host, [])
            if rule.name not in users:
                users.append(rule.name)
    return found


def hosts_of_origins(rule: Rule) -> tuple[str, ...]:
    """The names that stand for upstreams of an effective rule."""
    ends = [upstream.origin.end for upstream in rule.upstreams if upstream.origin is not None]
    return tuple(dict.fromkeys(end.host for end in ends if isinstance(end, Address)))


def all_names(rules: Iterable[Rule]) -> dict[str, list[str]]:
    """The names that rules lead to or listen on, with the names of the rules."""
    every = tuple(rules)
    found = upstream_names(every)
    for host, users in listening_names(every).items():
        found[host] = list(dict.fromkeys([*found.get(host, ()), *users]))
    return found
