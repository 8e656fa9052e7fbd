"""Descriptors by their number in a variable of the environment, and over a socket."""

from __future__ import annotations

import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import procfs

from forwarder.ipc.channel import channel_kind
from forwarder.succession.inherit import numbers_as_text, numbers_in
from forwarder.succession.orphans import _receive_all


@given(st.lists(st.integers(0, 30)))
def test_numbers_come_back_in_their_order(numbers: list[int]) -> None:
    assert numbers_in(numbers_as_text(numbers)) == numbers


def test_what_a_version_without_runs_has_written_is_read() -> None:
    assert numbers_in("") == []
    assert numbers_in("3,4,9") == [3, 4, 9]


def test_a_hundred_thousand_descriptors_fit_into_a_variable() -> None:
    """One has at most 128 KiB on Linux (execve(2), MAX_ARG_STRLEN)."""
    assert len(numbers_as_text(range(5, 100_005))) < 128 * 1024


def test_an_orphan_that_stops_amid_its_sockets_gives_none() -> None:
    """What came before that would be a socket that clients get to and nobody accepts on."""
    near, far = socket.socketpair(socket.AF_UNIX, channel_kind())
    with near, far:
        before = procfs.descriptors(os.getpid())
        near.settimeout(0.1)
        socket.send_fds(far, [b"some"], [0, 0])
        with pytest.raises(TimeoutError):
            _receive_all(near)
        assert procfs.descriptors(os.getpid()) == before
