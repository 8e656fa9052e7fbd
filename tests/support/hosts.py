"""Loopback addresses of this process alone, among all that run tests on this machine.

Without a network namespace of its own a process shares 127.0.0.0/8 with everybody else's.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Final

_FIRST: Final = 64  # 127.64.0.0/24 and so on; tests that reserve their ports have what is below
_NETWORKS: Final = 63 * 256
# Above the ports that a user may not bind and below those that the kernel gives away by itself.
_CLAIM_PORT: Final = 1999


def _claim() -> tuple[str, socket.socket]:
    """The first 24 bits of our addresses, and the socket whose being bound says that they are."""
    for number in range(os.getpid(), os.getpid() + _NETWORKS):
        upper, lower = divmod(number % _NETWORKS, 256)
        network = f"127.{_FIRST + upper}.{lower}"
        claim = socket.socket()
        try:
            claim.bind((f"{network}.254", _CLAIM_PORT))
        except OSError as err:
            claim.close()
            if err.errno != errno.EADDRINUSE:
                raise
        else:
            return network, claim
    raise AssertionError("all loopback networks are taken")


# For as long as this process lives.
_NETWORK, _CLAIM = _claim()


def own_host(number: int) -> str:
    """One of 250 hosts that no other process of tests uses, the 1st to the 250th."""
    assert 1 <= number <= 250
    return f"{_NETWORK}.{number}"
