"""Network namespaces, in which every port is free and any address is ours."""

from __future__ import annotations

import ctypes
import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_CLONE_NEWNET: Final = 0x40000000
_OWN: Final = "/proc/thread-self/ns/net"

needs_network = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can make a network namespace"
)


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


@contextmanager
def network(*addresses: str) -> Iterator[None]:
    """Be in a new namespace, whose loopback interface has these addresses, too.

    This thread, and the processes it starts. Sockets that it makes stay there.
    """
    before = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("unshare", _CLONE_NEWNET)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        for address in addresses:
            bits = 128 if ":" in address else 32
            # nodad: an IPv6 address could not be bound at once otherwise.
            nodad = ["nodad"] if ":" in address else []
            command = ["ip", "address", "add", f"{address}/{bits}", "dev", "lo", *nodad]
            subprocess.run(command, check=True)
        yield
    finally:
        _call("setns", before, _CLONE_NEWNET)
        os.close(before)
