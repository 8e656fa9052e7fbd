"""Addresses: what is read, what is refused, and that writing undoes reading."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.config.address import (
    MAX_UNIX_BYTES,
    Address,
    AddressError,
    Endpoint,
    UnixAddress,
    canonical_host,
    format_ports,
    is_ip,
    parse_address,
    parse_host,
    parse_listen,
    parse_port,
    parse_ports,
    parse_upstream,
    split_transport,
)

LABELS = st.from_regex(r"[a-z_](?:[a-z0-9_-]{0,20}[a-z0-9_])?", fullmatch=True)
NAMES = st.lists(LABELS, min_size=1, max_size=4).map(".".join)
SCOPED = st.builds(
    lambda ip, scope: f"{ip}%{scope}",
    st.ip_addresses(network="fe80::/10"),
    st.from_regex(r"[A-Za-z0-9_.-]{1,15}", fullmatch=True),
)
HOSTS = st.one_of(st.ip_addresses().map(str).map(parse_host), SCOPED, NAMES)
RANGES = st.tuples(st.integers(1, 65535), st.integers(1, 65535)).map(
    lambda ends: (min(ends), max(ends) - min(ends) + 1)
)
ADDRESSES = st.builds(lambda host, ports: Address(host, *ports), HOSTS, RANGES)
PRINTABLE = st.text(max_size=120).filter(
    lambda text: text.isprintable() and len(text.encode()) < MAX_UNIX_BYTES
)
UNIX = st.builds(
    lambda kind, name: UnixAddress(f"{kind}{name}"), st.sampled_from("/@"), PRINTABLE
).filter(lambda it: it.path != "@" and not f"{it.path}/".endswith(("//", "/./", "/../")))
ENDPOINTS: st.SearchStrategy[Endpoint] = st.one_of(ADDRESSES, UNIX)


@given(ENDPOINTS)
def test_writing_and_reading_an_address_gives_the_same(address: Endpoint) -> None:
    assert parse_listen(str(address)) == address
    assert parse_upstream(str(address)) == address


@given(st.text(alphabet="0123456789.:[]%*abcdefx-_/@ \n\0é\udce9", max_size=60))
@pytest.mark.parametrize("prefix", ["", "unix:", "10.0.0.1:", "[::1]:80-"])
def test_any_text_is_an_address_or_an_address_error(prefix: str, text: str) -> None:
    try:
        address = parse_listen(prefix + text)
    except AddressError:
        return
    assert parse_listen(str(address)) == address


@given(RANGES)
def test_writing_and_reading_ports_gives_the_same(ports: tuple[int, int]) -> None:
    first, count = ports
    assert parse_ports(format_ports(first, count)) == ports
    assert parse_ports(f"{first}-{first + count - 1}") == ports
    assert Address("::", first, count).last_port == first + count - 1


@given(st.integers(-2, 70000), st.integers(-2, 70000))
def test_a_range_is_read_exactly_if_it_is_one(first: int, last: int) -> None:
    if 1 <= first <= last <= 65535:
        assert parse_ports(f"{first}-{last}") == (first, last - first + 1)
    else:
        with pytest.raises(AddressError):
            parse_ports(f"{first}-{last}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a:-", "'' is not a port"),
        ("a:80-", "'' is not a port"),
        ("a:-80", "'' is not a port"),
        ("a:80-79", "ends before it begins"),
        ("a:80-65536", "'65536' is not a port"),
        ("a:0-80", "'0' is not a port"),
        ("a:80-81-82", "'81-82' is not a port"),
        ("a:80 -81", "'80 ' is not a port"),
        ("[::1]80-81", "needs brackets before its port"),
        ("::1:80-81", "needs brackets before its port"),
        ("unix:", "neither an absolute path nor an @NAME"),
        ("unix:a", "neither an absolute path nor an @NAME"),
        ("unix:@", "has no name"),
        ("unix:/", "names a directory"),
        ("unix:/a/..", "names a directory"),
        ("unix:/a\n", "no path should have"),
        ("unix:/a\udce9", "no path should have"),
        ("unix:/" + "a" * MAX_UNIX_BYTES, "has more than the 107 bytes"),
        ("unix:/" + "é" * 54, "has more than the 107 bytes"),
        ("unix:@" + "a" * (MAX_UNIX_BYTES + 1), "has more than the 107 bytes"),
    ],
)
def test_what_is_no_range_and_no_unix_socket_says_why(text: str, said: str) -> None:
    with pytest.raises(AddressError, match=said):
        parse_listen(text)


def test_the_longest_unix_sockets() -> None:
    for text in ("/" + "a" * (MAX_UNIX_BYTES - 1), "@" + "a" * MAX_UNIX_BYTES):
        assert parse_listen(f"unix:{text}") == UnixAddress(text)


def test_a_host_may_be_called_unix() -> None:
    assert parse_listen("unix:80-81") == Address("unix", 80, 2)


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
        ("[FE80:0::1%Eth0]:1", "fe80::1%Eth0", 1),
        ("[0:0::1]:80", "::1", 80),
        ("[::0]:80", "::", 80),
        ("[0:0:0:0:0:0:0:0]:80", "::", 80),
        ("[::0.0.0.0]:80", "::", 80),
        ("[::ffff:0.0.0.0]:80", "0.0.0.0", 80),
        ("[::ffff:127.0.0.1]:80", "127.0.0.1", 80),
        ("[0::FFFF:7f00:1]:80", "127.0.0.1", 80),
        ("Example.com.:80", "Example.com.", 80),
    ],
)
def test_forms_of_an_address(text: str, host: str, port: int) -> None:
    assert parse_address(text) == Address(host, port)
    assert parse_address(f"{text}-65535") == Address(host, port, 65536 - port)


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
        "[::%eth0]:80",
        "[::ffff:10.0.0.1%eth0]:80",
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
    [("0:0::1", "::1"), ("::ffff:1.2.3.4", "1.2.3.4"), ("Example.com.", "example.COM")],
)
def test_spellings_of_one_host_are_the_same(one: str, other: str) -> None:
    assert canonical_host(parse_host(one)) == canonical_host(parse_host(other))


@given(st.ip_addresses(v=6), st.booleans())
def test_every_spelling_of_an_address_is_read_as_the_same(
    ip: ipaddress.IPv6Address, is_upper: bool
) -> None:
    spellings = {str(ip), ip.exploded, "[" + ip.exploded + "]"}
    spellings |= {text.upper() for text in spellings if is_upper}
    assert len({parse_host(text) for text in spellings}) == 1
    assert parse_host(parse_host(str(ip))) == parse_host(str(ip))


def test_a_literal_is_told_from_a_name() -> None:
    assert Address("::1", 80).is_literal
    assert not Address("localhost", 80).is_literal
    assert parse_host("localhost") == "localhost"


# -- what people write


@pytest.mark.parametrize(
    ("text", "address"),
    [("8080", Address("::", 8080)), ("8000-8010", Address("::", 8000, 11))],
)
def test_ports_alone_are_listened_on_at_every_address(text: str, address: Address) -> None:
    assert parse_listen(text) == address


@pytest.mark.parametrize(
    ("text", "transport", "address"),
    [
        ("udp:10.0.0.1:53", "udp", "10.0.0.1:53"),
        ("UDP:53", "udp", "53"),
        ("tcp://[::1]:80/", "tcp", "[::1]:80"),
        ("10.0.0.1:53/udp", "udp", "10.0.0.1:53"),
        ("udp:a:53/udp", "udp", "a:53"),
        ("udp::53", "udp", ":53"),
        ("tcp:unix:/run/udp", "tcp", "unix:/run/udp"),
        ("unix:/run/udp", "", "unix:/run/udp"),
        ("a:80", "", "a:80"),
        ("http://a:80", "", "http://a:80"),
        ("udpish:80", "", "udpish:80"),
    ],
)
def test_a_transport_is_taken_off_an_address(text: str, transport: str, address: str) -> None:
    assert split_transport(text) == (transport, address)


def test_two_transports_on_one_address_are_refused() -> None:
    with pytest.raises(AddressError, match="says both udp and tcp"):
        split_transport("udp:a:53/tcp")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("1.2.3.4", "write 1.2.3.4:PORT"),
        ("web.example", "write web.example:PORT"),
        ("::1", "write [::1]:PORT"),
        ("::1:80", "write [::1]:80"),
        ("http://web.example:80/x", "write web.example:80"),
        ("https://web.example", "write web.example:PORT"),
        ("udp:10.0.0.1:53", 'write 10.0.0.1:53, and protocol = "udp"'),
        ("10.0.0.1:53/udp", 'write 10.0.0.1:53, and protocol = "udp"'),
    ],
)
def test_what_is_wrong_says_what_to_write(text: str, hint: str) -> None:
    for parse in (parse_listen, parse_upstream):
        with pytest.raises(AddressError) as caught:
            parse(text)
        assert caught.value.hint == hint


@pytest.mark.parametrize("text", ["80", ":80", "*:80"])
def test_an_upstream_without_a_host_is_told_how_this_host_is_called(text: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse_upstream(text)
    assert caught.value.hint == "write 127.0.0.1:80 for this host"


def test_a_host_may_be_called_udp_in_a_file() -> None:
    assert parse_listen("udp:53") == Address("udp", 53)
