"""What the kernel tells of interfaces and addresses."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.net.netlink import (
    DELETED_ADDRESS,
    DELETED_LINK,
    NEW_ADDRESS,
    NEW_LINK,
    is_change,
)


def message(kind: int, body: bytes = b"") -> bytes:
    """A message as in linux/netlink.h, padded to four bytes."""
    length = 16 + len(body)
    return struct.pack("=IHHII", length, kind, 0, 0, 0) + body + b"\0" * (-length % 4)


@pytest.mark.parametrize("kind", [NEW_LINK, DELETED_LINK, NEW_ADDRESS, DELETED_ADDRESS])
def test_a_change_is_found_behind_other_messages(kind: int) -> None:
    assert is_change(message(kind))
    assert is_change(message(3) + message(24, b"route") + message(kind, b"x" * 30))


def test_other_messages_are_no_change() -> None:
    assert not is_change(message(3) + message(24, b"route") + message(28))


@given(st.binary(max_size=200))
def test_nothing_that_is_read_is_an_error_or_has_no_end(datagram: bytes) -> None:
    is_change(datagram)
