"""Addresses: what is read, what is refused, and that writing undoes reading."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.addr import (
    Address,
    AddressError,
    canonical_host,
    is_ip,
    parse_address,
    parse_host,
    parse_port,
    parse_upstream,
)

LABELS = st.from_regex(r"[a-z_](?:[a-z0-9_-]{0,20}[a-z0-9_])?", fullmatch=True)
NAMES = st.lists(LABELS, min_size=1, max_size=4).map(".".join)
SCOPED = st.builds(
    lambda ip, scope: f"{ip}%{scope}",
    st.ip_addresses(v=6),
    st.from_regex(r"[A-Za-z0-9_.-]{1,15}", fullmatch=True),
)
HOSTS = st.one_of(st.ip_addresses().map(str), SCOPED, NAMES)
ADDRESSES = st.builds(Address, HOSTS, st.integers(1, 65535))


@given(ADDRESSES)
def test_writing_and_reading_an_address_gives_the_same(address: Address) -> None:
    assert parse_address(str(address)) == address
    assert parse_upstream(str(address)) == address


@given(st.text(alphabet="0123456789.:[]%*abcdefx-_/ \n\0é", max_size=60))
def test_any_text_is_an_address_or_an_address_error(text: str) -> None:
    try:
        address = parse_address(text)
    except AddressError:
        return
    assert parse_address(str(address)) == address


@given(st.text(alphabet="0123456789.:abcdef", max_size=40))
def test_is_ip_agrees_with_the_standard_library(text: str) -> None:
    try:
        ipaddress.ip_address(text)
        expected = True
    except ValueError:
        expected = False
    assert is_ip(text) is expected


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("*:80", "::", 80),
        (":80", "::", 80),
        ("0:80", "0.0.0.0", 80),
        ("[::1]:65535", "::1", 65535),
        ("[fe80::1%eth0]:1", "fe80::1%eth0", 1),
        ("Example.com.:80", "Example.com.", 80),
    ],
)
def test_forms_of_an_address(text: str, host: str, port: int) -> None:
    assert parse_address(text) == Address(host, port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "80",
        "a:0",
        "a:65536",
        "a:+1",
        "a:٣",
        "a:" + "9" * 5000,
        "::1:80",
        "[1.2.3.4]:80",
        "1.2.3.256:80",
        "1.2.3.04:80",
        "[fe80::1%a b]:80",
        "a b:80",
        "a\n:80",
        "-a:80",
        "a/b:80",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(AddressError):
        parse_address(text)


@pytest.mark.parametrize("text", ["*:80", ":80"])
def test_an_upstream_needs_a_host(text: str) -> None:
    with pytest.raises(AddressError, match="which host"):
        parse_upstream(text)


def test_port_zero_is_allowed_only_where_asked_for() -> None:
    assert parse_port("0", lowest=0) == 0
    with pytest.raises(AddressError):
        parse_port("0")


@pytest.mark.parametrize(
    ("one", "other"),
    [("0:0::1", "::1"), ("FE80::1%Eth0", "fe80::1%Eth0"), ("Example.com.", "example.COM")],
)
def test_spellings_of_one_host_are_the_same(one: str, other: str) -> None:
    assert canonical_host(one) == canonical_host(other)


def test_a_literal_is_told_from_a_name() -> None:
    assert Address("::1", 80).is_literal
    assert not Address("localhost", 80).is_literal
    assert parse_host("localhost") == "localhost"
