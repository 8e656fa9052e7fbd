"""Private network namespaces: devices, addresses and routes that only a test has. Needs root."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import pytest

from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")
_CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
_OWN: Final = "/proc/thread-self/ns/net"

needs_network = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can make a network namespace"
)


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


class Namespace:
    """A network namespace, with loopback up. It lives as long as a process of ours in it."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(["unshare", "--net", "sleep", "600"])
        self.pid = self._holder.pid
        ours = Path("/proc/self/ns/net").readlink()
        eventually(lambda: Path(f"/proc/{self.pid}/ns/net").readlink() != ours, "no namespace")
        self.sysctl("ipv6/conf/default/accept_dad", 0)  # addresses are good at once
        self.ip("link set lo up")

    @property
    def prefix(self) -> list[str]:
        """A command line that executes the one given to it in this namespace."""
        return ["nsenter", "--net", "--target", str(self.pid)]

    def run(self, *command: str) -> None:
        """Run a command in it."""
        subprocess.run([*self.prefix, *command], check=True, capture_output=True)

    def ip(self, *lines: str) -> None:
        """Run ``ip`` with each of these arguments."""
        for line in lines:
            self.run("ip", *line.split())

    def sysctl(self, name: str, value: object) -> None:
        """Set a kernel setting of this namespace; ``name`` is a path below /proc/sys/net."""
        self.run("sh", "-c", f"echo {value} > /proc/sys/net/{name}")

    def call(self, function: Callable[[], T]) -> T:
        """Call something in it: sockets that it makes stay there, wherever they are used."""
        found: list[T] = []
        failed: list[BaseException] = []

        def enter() -> None:  # a namespace is of a thread, setns(2)
            try:
                fd = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY)
                try:
                    _call("setns", fd, _CLONE_NEWNET)
                finally:
                    os.close(fd)
                found.append(function())
            except BaseException as err:  # noqa: BLE001 - raised below
                failed.append(err)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return found[0]

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.kill()
        self._holder.wait()


def join(left: Namespace, right: Namespace, names: tuple[str, str]) -> None:
    """Lay a cable: a device of ``names`` in each of them, up."""
    left.ip(f"link add {names[0]} type veth peer name {names[1]} netns {right.pid}")
    left.ip(f"link set {names[0]} up")
    right.ip(f"link set {names[1]} up")


def enter_network() -> None:
    """Be in a new namespace for good, with loopback up: this thread, and those that it starts."""
    _call("unshare", _CLONE_NEWNET)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


@contextmanager
def network(*addresses: str) -> Iterator[None]:
    """Be in a new namespace, whose loopback interface has these addresses, too.

    This thread, and the processes it starts. Sockets that it makes stay there.
    """
    before = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter_network()
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
