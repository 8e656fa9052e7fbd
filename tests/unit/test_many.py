"""Addresses for many: what is told from the text, and what the configuration says of them."""

from __future__ import annotations

import socket

import pytest

from forwarder.config.loading import parse
from forwarder.config.model import Dialect
from forwarder.errors import ConfigError
from forwarder.net import many, peers


@pytest.mark.parametrize(
    ("address", "is_answerable"),
    [
        (("10.0.0.1", 1), True),
        (("10.0.0.1", 0), False),
        (("0.0.0.0", 68), False),
        (("224.0.0.1", 5), False),
        (("239.255.255.255", 5), False),
        (("240.0.0.1", 5), True),
        (("255.255.255.255", 5), False),
        (("::1", 5), True),
        (("fe80::1", 5), True),
        (("::1", 0), False),
        (("::", 5), False),
        (("ff02::1", 5), False),
        (("::ffff:10.0.0.1", 5), True),
        (("::ffff:10.0.0.1", 0), False),
        (("::ffff:0.0.0.0", 5), False),
        (("::ffff:224.0.0.1", 5), False),
        (("::ffff:255.255.255.255", 5), False),
    ],
)
def test_who_can_be_answered(address: tuple[str, int], is_answerable: bool) -> None:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    local = b"\x0a\0\0\1" if family == socket.AF_INET else bytes(16)
    assert peers.is_answerable(peers.pack(family, address, local)) is is_answerable


@pytest.mark.parametrize(
    ("host", "is_for_many", "is_copied"),
    [
        ("127.0.0.1", False, True),
        ("127.255.255.255", True, True),
        ("224.0.0.1", True, False),
        ("::ffff:224.0.0.1", True, False),
        ("::ffff:127.255.255.255", True, True),
        ("::1", False, True),
        ("ff02::1", True, True),
    ],
)
def test_what_is_for_many(host: str, is_for_many: bool, is_copied: bool) -> None:
    packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    assert many.is_for_many(packed) is is_for_many
    assert many.is_copied(packed) is is_copied


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ('listen = "239.1.2.3:53"\nupstream = "10.0.0.1:53"', "listen 239.1.2.3:53 is a multicast"),
        (
            'listen = "10.0.0.1:53"\nupstream = "[ff02::1]:53"',
            "upstream .* which TCP does not have",
        ),
        ('listen = "10.0.0.1:53"\nupstream = "255.255.255.255:53"', "broadcast address"),
        (
            'listen = "[ff02::1]:53"\nupstream = "10.0.0.1:53"\nprotocol = "udp"',
            r"does not say of which; hint: write \[ff02::1%INTERFACE\]:53, or device",
        ),
        (
            'listen = "10.0.0.1:53"\nupstream = "224.0.0.1:53"\nprotocol = "udptotcp"',
            "upstream 224.0.0.1:53 is a multicast",
        ),
    ],
)
def test_a_group_where_it_cannot_be_is_an_error(keys: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(f"[[forwarding_rules]]\n{keys}\n", "x.toml", Dialect.TOML)


@pytest.mark.parametrize(
    "keys",
    [
        'listen = "239.1.2.3:53"\nupstream = "255.255.255.255:53"',
        'listen = "[ff02::1%eth0]:53"\nupstream = "10.0.0.1:53"',
        'listen = "[ff02::1]:53"\nupstream = "10.0.0.1:53"\ndevice = "lo"',
        'listen = "[ff15::1]:53"\nupstream = "[ff15::2]:53"',
    ],
)
def test_groups_of_udp_rules_are_fine(keys: str) -> None:
    parse(f'[[forwarding_rules]]\nprotocol = "udp"\n{keys}\n', "x.toml", Dialect.TOML)
