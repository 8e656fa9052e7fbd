"""Access rules: may this client in?

Pure: knows texts and numbers, no sockets and no names. What a pattern may be is said in
``config.patterns``.

Theory of operation. A pattern is one of three things: an address, a network in CIDR form, or a
text with the wildcards ``*`` and ``?``. Addresses and networks are compared as numbers, in one set
per prefix length, so their count costs nothing. Wildcards are compared with the text of the client
address as rinetd does it: anchored at both ends, ``*`` spans dots and colons, upper and lower case
hexadecimal digits are the same. All wildcards of one verdict are one regular expression.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING

from forwarder.config.address import UnixAddress
from forwarder.config.patterns import Wildcard, parse_pattern

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from forwarder.config.model import AccessRule, Config, Rule

# Clients whose decision a list remembers, some 100 bytes each: most come again. Arbitrary.
MAX_KNOWN = 512

_Ip = ipaddress.IPv4Address | ipaddress.IPv6Address


class Decision(Enum):
    """What becomes of a client."""

    ALLOWED = "allowed"
    NOT_ALLOWED = "not-allowed"  # there are allow rules and none matches
    DENIED = "denied"


def _to_regex(glob: str) -> str:
    """Translate a wildcard text; the result needs ``fullmatch`` or a closing ``\\Z``."""
    first, *rest = (
        "".join("." if char == "?" else re.escape(char) for char in piece)
        for piece in re.split(r"\*+", glob)
    )
    if not rest:
        return first
    # What lies between two stars may be taken at its first occurrence for good: the atomic groups
    # keep a text with many stars from being tried in every combination.
    middle = "".join(f"(?>.*?{piece})" for piece in rest[:-1])
    return f"{first}{middle}.*{rest[-1]}"


@dataclass(frozen=True, slots=True)
class _Client:
    """A client address in every form it is compared in."""

    texts: tuple[str, ...]
    numbers: tuple[tuple[int, int, int], ...]  # version, width in bits, value
    scope: str

    @classmethod
    def of(cls, host: str) -> _Client:
        bare, _, scope = host.partition("%")
        texts = [host, bare] if scope else [host]
        try:
            ip: _Ip = ipaddress.ip_address(bare)
        except ValueError:
            return cls(tuple(texts), (), scope)
        numbers = [(ip.version, ip.max_prefixlen, int(ip))]
        mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
        if mapped is not None:
            texts.append(str(mapped))
            numbers.append((4, 32, int(mapped)))
        return cls(tuple(texts), tuple(numbers), scope)


class _Matcher:
    """All patterns of one verdict. Cost: one look-up per prefix length in use, one regex."""

    __slots__ = ("_networks", "_scoped", "_wildcards")

    def __init__(self, patterns: Iterable[str]) -> None:
        self._networks: dict[tuple[int, int], set[int]] = {}
        self._scoped: set[tuple[int, str]] = set()
        globs: dict[str, None] = {}
        for text in patterns:
            pattern = parse_pattern(text)
            if isinstance(pattern, Wildcard):
                globs[_to_regex(pattern.text)] = None
            elif pattern.scope:
                self._scoped.add((pattern.number, pattern.scope))
            else:
                width = 32 if pattern.version == 4 else 128
                key = (pattern.version, width - pattern.prefix)
                self._networks.setdefault(key, set()).add(pattern.number >> key[1])
        self._wildcards = (
            re.compile(f"(?:{'|'.join(globs)})\\Z", re.IGNORECASE | re.ASCII) if globs else None
        )

    def matches(self, client: _Client) -> bool:
        for version, _, number in client.numbers:
            for (network_version, shift), numbers in self._networks.items():
                if version == network_version and number >> shift in numbers:
                    return True
            if self._scoped and (number, client.scope) in self._scoped:
                return True
        wildcards = self._wildcards
        return wildcards is not None and any(wildcards.match(text) for text in client.texts)


def pattern_matcher(text: str) -> Callable[[str], bool]:
    """A function that says whether a client, by its numeric address, matches one pattern.

    Raises PatternError.
    """
    matcher = _Matcher([text])
    return lambda host: matcher.matches(_Client.of(host))


@lru_cache(maxsize=256)
def _matcher(patterns: tuple[str, ...]) -> _Matcher | None:
    """Compile once what many rules share, above all the global patterns. None matches nothing."""
    return _Matcher(patterns) if patterns else None


class AccessList:
    """The clients that may use one rule: the global access rules, then those of the rule itself."""

    __slots__ = ("_known", "_stages", "is_empty")

    def __init__(self, stages: tuple[tuple[_Matcher | None, _Matcher | None], ...]) -> None:
        self._stages = stages
        self._known: dict[str, Decision] = {}
        self.is_empty = not stages
        """Whether all clients are allowed; then ``decide`` need not be called."""

    @classmethod
    def compile(
        cls, global_rules: Sequence[AccessRule], rule_rules: Sequence[AccessRule]
    ) -> AccessList:
        """Prepare a list. Raises PatternError for a pattern that a loaded Config cannot hold."""
        stages = []
        for rules in (global_rules, rule_rules):
            allow = _matcher(tuple(rule.pattern for rule in rules if rule.is_allow))
            deny = _matcher(tuple(rule.pattern for rule in rules if not rule.is_allow))
            if allow or deny:
                stages.append((allow, deny))
        return cls(tuple(stages))

    def decide(self, host: str) -> Decision:
        """Judge a client by its numeric address, as the kernel gives it (with a scope or not).

        In rinetd's order: global allow, global deny, the rule's allow, the rule's deny; the order
        of lines plays no part. An IPv4-mapped client is compared as written and as IPv4.
        """
        if self.is_empty:
            return Decision.ALLOWED
        known = self._known
        decision = known.get(host)
        if decision is None:
            if len(known) >= MAX_KNOWN:
                known.clear()
            decision = known[host] = self._judge(host)
        return decision

    def _judge(self, host: str) -> Decision:
        client = _Client.of(host)
        for allow, deny in self._stages:
            if allow is not None and not allow.matches(client):
                return Decision.NOT_ALLOWED
            if deny is not None and deny.matches(client):
                return Decision.DENIED
        return Decision.ALLOWED


def access_of(config: Config, rule: Rule) -> AccessList:
    """The clients that may use a rule. Those of a unix socket have no address to judge them by."""
    if isinstance(rule.listen, UnixAddress):
        return AccessList(())
    return AccessList.compile(config.access, rule.access)
