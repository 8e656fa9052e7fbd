"""Likely mistakes in groups and their checks. Pure, as ``advice`` is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from forwarder.config.model import CheckKind
from forwarder.errors import Issue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forwarder.config.model import Check, Config, Rule

_BY_TCP: Final = (CheckKind.TCP, CheckKind.TLS, CheckKind.HTTP)


def advise(config: Config) -> Iterator[Issue]:
    """What the author of a group should look at again, at the first rule that leads to it."""
    rules_of: dict[str, list[Rule]] = {}
    for rule in config.rules:
        rules_of.setdefault(rule.group_name, []).append(rule)
    for rules in rules_of.values():
        first = rules[0]
        name = f"the group {first.group.name!r}" if first.group.name else "this rule"
        if first.group.check:
            yield from _of_check(rules, first.group.check, name)
        elif first.is_balanced and not first.group.fails_open:
            yield _warning(
                first,
                f"fail_open = false of {name} without a check: the last server is never ejected, so"
                " it has an effect only when all are drained",
                "add a check",
            )


def _of_check(rules: list[Rule], check: Check, name: str) -> Iterator[Issue]:
    first = rules[0]
    if check.kind is CheckKind.UDP and not check.expect:
        yield _warning(
            first,
            f"the check of {name} is by UDP and expects no answer, so it proves little: only an"
            " ICMP error is bad, and silence is good",
            "send a question and expect its answer",
        )
    is_own_port = not check.port
    by_udp = {rule.protocol.connects_by_udp for rule in rules}
    if is_own_port and by_udp == {True} and check.kind in _BY_TCP:
        yield _warning(
            first,
            f"the check of {name} is by TCP, and its sessions go to the same ports by UDP",
            'write kind = "udp" with send and expect, or the port that is to be checked',
        )
    if is_own_port and by_udp == {False} and check.kind is CheckKind.UDP:
        yield _warning(
            first,
            f"the check of {name} is by UDP, and its sessions go to the same ports by TCP",
            'write kind = "tcp", or the port that is to be checked',
        )


def _warning(rule: Rule, what: str, hint: str) -> Issue:
    return Issue(rule.place, what, hint=hint, is_warning=True)
