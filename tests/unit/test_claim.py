"""Exactly one of all that have the token of a consignment gets its sessions."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from forwarder.ipc import claim
from forwarder.ipc.claim import Claimant

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def token() -> Iterator[int]:
    """A new one."""
    fd = claim.make()
    yield fd
    os.close(fd)


def test_the_first_gets_it_also_with_a_descriptor_of_its_own(token: int) -> None:
    with ExitStack() as stack:
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        stack.enter_context(theirs)
        socket.send_fds(ours, [b"x"], [token])
        _, (other,), _, _ = socket.recv_fds(theirs, 1, 1)
        stack.callback(os.close, other)
        assert claim.claim(other)
        assert not claim.claim(token)
        assert not claim.claim(other)


@pytest.mark.parametrize("times", [1, 2])
def test_given_up_it_is_for_one_again(token: int, times: int) -> None:
    assert claim.claim(token)
    for _ in range(times):
        claim.give_up(token)
    assert claim.claim(token)
    assert not claim.claim(token)


def test_who_had_claimed_is_known_and_what_the_giver_has_claimed_stays_so(token: int) -> None:
    assert claim.give_up(token) is Claimant.NOBODY
    assert claim.claim(token)
    assert claim.give_up(token) is Claimant.OTHER
    assert claim.claim(token, Claimant.GIVER)
    for _ in range(2):
        assert claim.give_up(token) is Claimant.GIVER
        assert not claim.claim(token)
        assert not claim.claim(token, Claimant.GIVER)


def test_what_is_no_token_gives_nobody_anything() -> None:
    left, right = os.pipe2(os.O_CLOEXEC)
    ours, theirs = socket.socketpair()
    file = os.memfd_create("no-token")
    for fd in (left, right, ours.fileno(), file):
        assert not claim.claim(fd)
    assert os.fstat(file).st_size == 0, "it was written to"
    ours.close()
    theirs.close()
    for fd in (left, right, file):
        os.close(fd)
    assert not claim.claim(left)
