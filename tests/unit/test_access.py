"""Access rules against a slow matcher that is plainly right, and rinetd's order of decision."""

from __future__ import annotations

import ipaddress
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.config.model import AccessRule, Verdict
from forwarder.config.patterns import PatternError, parse_pattern
from forwarder.errors import Place
from forwarder.relay.access import AccessList, Decision

NOWHERE = Place("test")


def rules(*lines: str) -> tuple[AccessRule, ...]:
    """Make rules of texts such as "allow 10.*"."""
    return tuple(
        AccessRule(verdict=Verdict(line.split()[0]), pattern=line.split()[1], place=NOWHERE)
        for line in lines
    )


def glob_matches(pattern: str, text: str) -> bool:
    """Compare the rinetd way, by trying everything."""
    if not pattern:
        return not text
    if pattern[0] == "*":
        return any(glob_matches(pattern[1:], text[start:]) for start in range(len(text) + 1))
    return bool(text) and pattern[0] in ("?", text[0]) and glob_matches(pattern[1:], text[1:])


def naive_matches(pattern: str, host: str) -> bool:
    forms = {host, host.partition("%")[0]}
    mapped = getattr(ipaddress.ip_address(host), "ipv4_mapped", None)
    if mapped:
        forms.add(str(mapped))
    if "*" in pattern or "?" in pattern:
        return any(glob_matches(pattern.lower(), form.lower()) for form in forms)
    if "%" in pattern:
        return ipaddress.ip_address(pattern) == ipaddress.ip_address(host)
    network = ipaddress.ip_network(pattern)
    return any(
        ipaddress.ip_address(form.partition("%")[0]) in network
        for form in forms
        if ipaddress.ip_address(form).version == network.version
    )


def naive_decide(
    global_rules: tuple[AccessRule, ...], own: tuple[AccessRule, ...], host: str
) -> str:
    for group in (global_rules, own):
        allows = [rule.pattern for rule in group if rule.verdict is Verdict.ALLOW]
        denies = [rule.pattern for rule in group if rule.verdict is Verdict.DENY]
        if allows and not any(naive_matches(pattern, host) for pattern in allows):
            return "not-allowed"
        if any(naive_matches(pattern, host) for pattern in denies):
            return "denied"
    return "allowed"


# Few values, so that patterns and hosts meet.
OCTET = st.sampled_from(["0", "1", "10", "12", "255"])
IPV4 = st.tuples(OCTET, OCTET, OCTET, OCTET).map(".".join)
IPV6 = st.sampled_from(["::1", "fe80::1", "fe80::12", "2001:db8::10", "::ffff:0:0", "ff02::1:2"])
MAPPED = IPV4.map(lambda text: f"::ffff:{text}")
SCOPED = st.builds("{}%{}".format, IPV6, st.sampled_from(["eth0", "1"]))
HOSTS = st.one_of(IPV4, IPV6, MAPPED, SCOPED)


@st.composite
def networks(draw: st.DrawFn) -> str:
    host = draw(st.one_of(IPV4, IPV6))
    prefix = draw(st.integers(0, ipaddress.ip_address(host).max_prefixlen))
    return str(ipaddress.ip_network(f"{host}/{prefix}", strict=False))


@st.composite
def wildcards(draw: st.DrawFn) -> str:
    text = list(draw(HOSTS).partition("%")[0])
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 4)))
        text[start:end] = draw(st.sampled_from(["*", "?", "**", "*?"]))
    return "".join(text)


def is_sound(pattern: str) -> bool:
    try:
        parse_pattern(pattern)
    except PatternError:
        return False
    return True


PATTERNS = st.one_of(HOSTS, networks(), wildcards().filter(is_sound))
RULES = st.lists(
    st.builds(
        AccessRule, verdict=st.sampled_from(Verdict), pattern=PATTERNS, place=st.just(NOWHERE)
    ),
    max_size=4,
).map(tuple)


@given(RULES, RULES, HOSTS)
def test_decisions_agree_with_the_naive_matcher(
    global_rules: tuple[AccessRule, ...], own: tuple[AccessRule, ...], host: str
) -> None:
    decision = AccessList.compile(global_rules, own).decide(host)
    assert decision.value == naive_decide(global_rules, own, host)


@given(wildcards(), HOSTS)
def test_a_refused_wildcard_matches_nobody(pattern: str, host: str) -> None:
    if not is_sound(pattern):
        assert not naive_matches(pattern, host)


@given(st.text(alphabet="0123456789abcdefg.:*?/[]%\n", max_size=30), HOSTS)
def test_any_text_is_a_pattern_or_a_pattern_error(pattern: str, host: str) -> None:
    if is_sound(pattern):
        AccessList.compile(
            rules(), (AccessRule(verdict=Verdict.DENY, pattern=pattern, place=NOWHERE),)
        )
    assert AccessList.compile((), ()).decide(host) is Decision.ALLOWED


@pytest.mark.parametrize(
    ("global_rules", "own", "expected"),
    [
        ((), (), Decision.ALLOWED),
        (("deny 10.0.0.1",), ("allow 10.0.0.1",), Decision.DENIED),
        (("deny 10.0.0.1", "allow 11.*"), (), Decision.NOT_ALLOWED),
        (("allow 10.*",), ("allow 11.*", "deny 10.*"), Decision.NOT_ALLOWED),
        (("allow 10.*",), ("deny 10.0.0.0/8",), Decision.DENIED),
        (("allow 10.*",), ("allow 10.0.0.?", "deny 10.0.0.2"), Decision.ALLOWED),
        (("allow *",), ("deny 1?.0.0.2",), Decision.ALLOWED),
    ],
)
def test_order_of_decision(
    global_rules: tuple[str, ...], own: tuple[str, ...], expected: Decision
) -> None:
    access = AccessList.compile(rules(*global_rules), rules(*own))
    assert access.decide("10.0.0.1") is expected
    assert access.is_empty is (not global_rules and not own)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("[::1]", "write ::1"),
        ("300.1.1.1", "0 to 255"),
        ("10.1", "write 10.1.*"),
        ("10.0.0.1/8", "write 10.0.0.0/8"),
        ("fe80::1/64", "write fe80::/64"),
        ("10.0.0.0/255.0.0.0", "write 10.0.0.0/8"),
        ("example.com", "never by name"),
        ("*.example.com", "never by name"),
        ("300.1.*", "0 to 255"),
        ("01.1.*", "leading zeros"),
        ("1.2.3.4.*", ""),
        ("10.*/8", "one of the two"),
        ("10.0.0.0/33", ""),
        ("10.0.0.0/", ""),
        ("", ""),
        ("*" + "1" * 62, ""),
    ],
)
def test_patterns_that_match_nobody_are_refused_with_a_hint(pattern: str, hint: str) -> None:
    with pytest.raises(PatternError) as caught:
        parse_pattern(pattern)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("pattern", "host", "matches"),
    [
        ("10.0.0.0/24", "10.0.0.255", True),
        ("10.0.0.0/24", "10.0.1.0", False),
        ("10.0.0.0/24", "::ffff:10.0.0.9", True),
        ("0.0.0.0/0", "::1", False),
        ("::/0", "10.0.0.1", False),
        ("::ffff:10.0.0.0/104", "::ffff:10.1.2.3", True),
        ("2001:DB8::0001", "2001:db8::1", True),
        ("FE80:*1", "fe80::1%eth0", True),
        ("fe80::*0", "fe80::1%eth0", True),
        ("fe80::1", "fe80::1%eth0", True),
        ("fe80::1%eth0", "fe80::1%eth0", True),
        ("fe80::1%eth0", "fe80::1%eth1", False),
        ("fe80::1%eth0", "fe80::1", False),
        ("fe80::/10", "fe80::1%eth0", True),
        ("10.?", "10.0.0.1", False),
        ("1?.0.0.1", "10.0.0.1", True),
        ("*.1", "10.0.0.1", True),
        ("0.0.0.*", "10.0.0.1", False),
    ],
)
def test_what_a_pattern_matches(pattern: str, host: str, *, matches: bool) -> None:
    decision = AccessList.compile((), rules(f"deny {pattern}")).decide(host)
    assert decision is (Decision.DENIED if matches else Decision.ALLOWED)


def test_a_host_that_is_no_address_meets_only_wildcards() -> None:
    assert AccessList.compile(rules("deny 0.0.0.0/0"), ()).decide("?") is Decision.ALLOWED
    assert AccessList.compile(rules("deny *"), ()).decide("?") is Decision.DENIED


def test_many_stars_do_not_multiply_the_work() -> None:
    """Trying every combination of 20 stars in 39 characters would take years."""
    access = AccessList.compile(rules("deny " + "*1" * 20 + "*2"), ())
    before = time.process_time()
    assert access.decide(":".join(["1111"] * 8)) is Decision.ALLOWED
    assert time.process_time() - before < 1
