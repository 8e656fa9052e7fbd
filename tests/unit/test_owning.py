"""A socket that is being set up is closed by a failure, and by nothing else."""

from __future__ import annotations

import socket

import pytest

from forwarder.net.owning import ClosedOnFailure


def test_a_socket_stays_open_if_all_goes_well() -> None:
    with socket.socket() as sock:
        with ClosedOnFailure(sock):
            pass
        assert sock.fileno() >= 0


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_a_failure_closes_the_socket_and_goes_on(failure: type[BaseException]) -> None:
    with socket.socket() as sock:
        with pytest.raises(failure), ClosedOnFailure(sock):
            raise failure
        assert sock.fileno() == -1
