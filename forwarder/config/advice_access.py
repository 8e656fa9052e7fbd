"""Access rules that match no client or never matter: part of ``advice``. Pure.

Theory of operation. A pattern stands for a set of addresses: a network, all of one family, or
everything. A pattern that cannot be described so (most wildcards) is a set of its own, of which
nothing is known. A client has to pass the global rules and then those of the rule; of both, first
the allow rules, if there are any, then the deny rules. So an allow rule does nothing if all that it
matches is refused elsewhere, and a deny rule if none that it matches would come so far.
"""

from __future__ import annotations

import ipaddress
import re
from bisect import bisect_left, bisect_right
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

from forwarder.config.address import Address, is_ip
from forwarder.config.patterns import PatternError, Wildcard, parse_pattern
from forwarder.errors import Issue

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from forwarder.config.model import AccessRule, Config, Rule

_Net: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
_Nets: TypeAlias = tuple[_Net, ...]
_Key: TypeAlias = tuple[int, int, int]  # version, prefix, the bits in it

_EVERYBODY: _Nets = (ipaddress.IPv4Network("0.0.0.0/0"), ipaddress.IPv6Network("::/0"))
# "10.1.*": whole parts, then one star. A "*" spans dots.
_PREFIX = re.compile(r"((?:[0-9]{1,3}\.){1,3})\*+")
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")


@lru_cache(maxsize=4096)
def addresses(pattern: str) -> _Nets | None:
    """Which addresses a pattern matches, exactly; None if that is unknown."""
    try:
        parsed = parse_pattern(pattern)
    except PatternError:
        return None
    if isinstance(parsed, Wildcard):
        if not parsed.text.strip("*"):
            return _EVERYBODY
        match = _PREFIX.fullmatch(parsed.text)
        if match is None:
            return None
        parts = match[1].rstrip(".").split(".")
        base = ".".join(parts + ["0"] * (4 - len(parts)))
        return (ipaddress.IPv4Network(f"{base}/{8 * len(parts)}"),)
    if parsed.scope:
        return None
    kind = ipaddress.IPv4Network if parsed.version == 4 else ipaddress.IPv6Network
    net = kind((parsed.number, parsed.prefix))
    # Clients of IPv4 are also compared as ::ffff:1.2.3.4.
    return None if isinstance(net, ipaddress.IPv6Network) and net.overlaps(_MAPPED) else (net,)


@lru_cache(maxsize=4096)
def family(pattern: str) -> int:
    """4 or 6 if only clients of that family can match, else 0."""
    found = addresses(pattern)
    if found is not None:
        return found[0].version if len(found) == 1 else 0
    if "/" in pattern or "*" not in pattern.replace("?", "*"):
        return 0
    if ":" in pattern and "." not in pattern and not pattern.startswith((":", "*", "?")):
        return 6
    return 4 if re.match(r"[0-9]{1,3}\.", pattern) else 0


class _Patterns:
    """Access rules to be asked whether one of them matches all, or none, of what another does."""

    def __init__(self, rules: Iterable[AccessRule]) -> None:
        self._everybody: AccessRule | None = None
        self._texts: dict[str, AccessRule] = {}
        self._nets: dict[_Key, AccessRule] = {}
        self._families: set[int] = set()  # of those of which no more is known
        self._starts: dict[int, list[int]] = {4: [], 6: []}
        for rule in rules:
            self._texts.setdefault(rule.pattern, rule)
            found = addresses(rule.pattern)
            if found is None:
                self._families.add(family(rule.pattern))
            elif len(found) > 1:
                self._everybody = self._everybody or rule
            else:
                self._nets.setdefault(next(_wider(found[0])), rule)
                self._starts[found[0].version].append(int(found[0].network_address))
        for starts in self._starts.values():
            starts.sort()

    def __bool__(self) -> bool:
        return bool(self._texts)

    def covering(self, rule: AccessRule) -> AccessRule | None:
        """Another rule that matches all that this one does; of equals it is the first."""
        found = addresses(rule.pattern)
        nets = _wider(found[0]) if found is not None and len(found) == 1 else ()
        candidates = (self._everybody, self._texts.get(rule.pattern), *map(self._nets.get, nets))
        if self._everybody is rule:
            return None
        return next((other for other in candidates if other and other is not rule), None)

    def is_apart(self, pattern: str) -> bool:
        """Whether it is certain that no client matches both the pattern and one of these."""
        found = addresses(pattern)
        if self._everybody or (found is not None and len(found) > 1):
            return False
        wanted = family(pattern)
        if any(0 in (wanted, known) or known == wanted for known in self._families):
            return False
        if found is None:
            return wanted != 0 and not self._starts[wanted]
        first, last = int(found[0].network_address), int(found[0].broadcast_address)
        starts = self._starts[found[0].version]
        holds_one = bisect_left(starts, first) != bisect_right(starts, last)
        return not holds_one and not any(net in self._nets for net in _wider(found[0]))


def _wider(net: _Net) -> Iterator[_Key]:
    """A network and all those that it is in."""
    number, width = int(net.network_address), net.max_prefixlen
    for prefix in range(net.prefixlen, -1, -1):
        yield net.version, prefix, number >> width - prefix


def advise(config: Config) -> Iterator[Issue]:
    """What is wrong with the access rules of a configuration."""
    listening = {_family_of(rule) for rule in config.rules}
    everywhere, nothing = _Stage(config.access), _Stage(())
    yield from _check(config.access, nothing, listening, "any rule listens")
    for rule in config.rules:
        if rule.access:
            yield from _check(rule.access, everywhere, {_family_of(rule)}, "the rule listens")


def _check(
    rules: Sequence[AccessRule], passed: _Stage, listening: set[int], where: str
) -> Iterator[Issue]:
    """One list of rules; each is reported once. ``passed`` are the global ones before it."""
    unmatched = list(_unmatched(rules, listening, where))
    places = {issue.place for issue in unmatched}
    yield from unmatched
    yield from (issue for issue in _without_effect(rules, passed) if issue.place not in places)


def _family_of(rule: Rule) -> int:
    """4 or 6 if all clients are of that family, 0 if of both, -1 if they have no address."""
    listen = rule.listen
    if not isinstance(listen, Address):
        return -1
    if not is_ip(listen.host) or listen.host == "::":
        return 0
    return 6 if ":" in listen.host else 4


def _unmatched(rules: Iterable[AccessRule], listening: set[int], where: str) -> Iterator[Issue]:
    """Patterns of a family that no client has."""
    if 0 in listening or {4, 6} <= listening:
        return
    for rule in rules:
        wanted = family(rule.pattern)
        if listening == {-1}:
            yield _warning(rule, f"matches no client: {where} on unix sockets only", "take it out")
        elif wanted and wanted not in listening:
            other = 10 - wanted
            yield _warning(
                rule,
                f"matches no client: where {where} there are only IPv{other} clients",
                f"write an IPv{other} pattern, or take it out",
            )


def _without_effect(rules: Sequence[AccessRule], passed: _Stage) -> Iterator[Issue]:
    """Rules that decide nothing."""
    own = _Stage(rules)
    for rule in rules:
        twin = (own.allow if rule.is_allow else own.deny).covering(rule)
        if twin is not None:
            what = f"does nothing: {twin.pattern} at {twin.place} matches all of it already"
            yield _warning(rule, what, "take it out")
        elif rule.is_allow:
            yield from _check_allow(rule, own, passed)
        else:
            yield from _check_deny(rule, own, passed)


class _Stage:
    """The allow and the deny rules that are checked together."""

    def __init__(self, rules: Sequence[AccessRule]) -> None:
        self.allow = _Patterns(rule for rule in rules if rule.is_allow)
        self.deny = _Patterns(rule for rule in rules if not rule.is_allow)


def _check_allow(rule: AccessRule, own: _Stage, passed: _Stage) -> Iterator[Issue]:
    denied = passed.deny.covering(rule) or own.deny.covering(rule)
    if denied is not None:
        yield _warning(
            rule,
            f"lets no client in: deny {denied.pattern} at {denied.place} refuses all that it"
            " matches",
            "an allow rule is no exception to a deny rule: a client has to pass both",
        )
    elif passed.allow and passed.allow.is_apart(rule.pattern):
        yield _warning(
            rule,
            "lets no client in: no global allow rule matches any of it",
            "a client has to pass the global rules as well as those of the rule",
        )


def _check_deny(rule: AccessRule, own: _Stage, passed: _Stage) -> Iterator[Issue]:
    denied = passed.deny.covering(rule)
    if denied is not None:
        what = f"does nothing: the global deny {denied.pattern} refuses all of it already"
        yield _warning(rule, what, "take it out")
        return
    for stage, name in ((passed, "global allow rules"), (own, "allow rules")):
        if stage.allow and stage.allow.is_apart(rule.pattern):
            what = f"does nothing: none that it matches passes the {name}"
            yield _warning(
                rule, what, "take it out: clients that are not allowed are refused anyway"
            )
            return


def _warning(rule: AccessRule, what: str, hint: str) -> Issue:
    text = f"{rule.verdict.value} {rule.pattern} {what}"
    return Issue(rule.place, text, hint=hint, is_warning=True)
