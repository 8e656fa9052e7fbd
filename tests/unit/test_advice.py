"""What is said of access rules holds for every client; thousands of rules are no matter."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.config import Dialect, parse
from forwarder.config.address import Address
from forwarder.config.advice import advise
from forwarder.config.advice_access import addresses, family
from forwarder.config.model import AccessRule, Config, Rule, Upstream, Verdict
from forwarder.errors import Place
from forwarder.relay.access import AccessList

if TYPE_CHECKING:
    from collections.abc import Sequence

CLIENTS = [
    *("10.0.0.1", "10.0.0.2", "10.1.0.1", "10.10.0.1", "192.0.2.1", "255.255.255.255"),
    *("::1", "fe80::1%eth0", "fe80::2", "2001:db8::1", "::ffff:10.0.0.1", "::ffff:192.0.2.1"),
]
PATTERNS = [
    *("10.0.0.1", "10.0.0.0/8", "10.0.0.0/24", "10.*", "10.0.*", "10.?.0.1", "10.0.0.?", "1*"),
    *("0.0.0.0/0", "::/0", "::1", "fe80::/10", "fe80:*", "fe80::1%eth0", "2001:db8::/32", "*:*"),
    *("*", "**", "?*", "*.1", "::ffff:10.0.0.1", "::ffff:0:0/96", "192.0.2.1", "f*", "2*"),
]


def numbered(entries: Sequence[tuple[Verdict, str]], source: str) -> tuple[AccessRule, ...]:
    return tuple(
        AccessRule(verdict=verdict, pattern=pattern, place=Place(source, line))
        for line, (verdict, pattern) in enumerate(entries, 1)
    )


ENTRIES = st.lists(st.tuples(st.sampled_from(Verdict), st.sampled_from(PATTERNS)), max_size=5)
HOSTS = st.sampled_from(["0.0.0.0", "127.0.0.1", "::1", "::", "a.example"])


def clients_of(host: str) -> list[str]:
    """Those that may come to a listener of that address."""
    if host in {"0.0.0.0", "127.0.0.1"}:
        return [client for client in CLIENTS if ":" not in client]
    if host == "::1":
        return [c for c in CLIENTS if ":" in c and not c.startswith("::ffff:")]
    return CLIENTS


@given(ENTRIES, ENTRIES, HOSTS)
def test_what_is_said_of_an_access_rule_is_so(
    everywhere: list[tuple[Verdict, str]], own: list[tuple[Verdict, str]], host: str
) -> None:
    """Nobody that a named allow rule matches is let in; a named deny rule can go without effect."""
    rule = Rule(
        name="a",
        listen=Address(host, 1),
        upstreams=(Upstream(Address("192.0.2.9", 1)),),
        access=numbered(own, "own"),
        place=Place("x"),
    )
    config = Config(rules=(rule,), access=numbered(everywhere, "global"))
    clients = clients_of(host)
    for issue in advise(config, Dialect.TOML):
        assert issue.is_warning
        assert issue.hint
        (named,) = [e for e in (*config.access, *rule.access) if e.place is issue.place]
        if "lets no client in" in issue.what or "matches no client" in issue.what:
            mine = AccessList.compile((dataclasses.replace(named, verdict=Verdict.ALLOW),), ())
            matched = [c for c in clients if mine.decide(c).value == "allowed"]
            assert "matches no client" not in issue.what or not matched
            assert not any(is_allowed(config, rule, client) for client in matched), issue
        else:
            less = dataclasses.replace(config, access=without(config.access, named))
            rest = dataclasses.replace(rule, access=without(rule.access, named))
            for client in clients:
                assert is_allowed(config, rule, client) == is_allowed(less, rest, client), issue


def without(rules: tuple[AccessRule, ...], named: AccessRule) -> tuple[AccessRule, ...]:
    return tuple(rule for rule in rules if rule is not named)


def is_allowed(config: Config, rule: Rule, client: str) -> bool:
    return AccessList.compile(config.access, rule.access).decide(client).value == "allowed"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_addresses_of_a_pattern_are_those_that_it_matches(pattern: str) -> None:
    import ipaddress

    entry = AccessRule(verdict=Verdict.ALLOW, pattern=pattern, place=Place("x"))
    listed = AccessList.compile((entry,), ())
    for client in CLIENTS:
        is_matched = listed.decide(client).value == "allowed"
        ip = ipaddress.ip_address(client.partition("%")[0])
        mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
        version = 4 if mapped else ip.version
        if is_matched and family(pattern):
            assert family(pattern) == version
        nets = addresses(pattern)
        if nets is not None:
            numbers = [ip, mapped] if mapped else [ip]
            assert is_matched == any(
                number in net for number in numbers for net in nets if number.version == net.version
            )


def test_ten_thousand_rules_with_access_rules_are_looked_at_in_a_moment() -> None:
    lines = [f"deny 10.{n >> 8}.{n & 255}.0/24\n" for n in range(5000)]
    lines += [f"127.0.0.1 {n} 127.0.0.1 {n + 1}\nallow 10.*\n" for n in range(20_000, 30_000)]
    config = parse("".join(lines), "x.conf", Dialect.RINETD).config
    start = time.process_time()
    found = advise(config, Dialect.RINETD)
    assert time.process_time() - start < 20
    assert len(found) == 9999
