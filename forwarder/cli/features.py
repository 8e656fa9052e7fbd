"""The features of this system that the forwarder uses, for ``forwarder --version``.

Each feature is tried on sockets and pipes of our own, which are closed at once. Only a feature that
shows by its speed alone is judged by the version of the kernel.
"""

from __future__ import annotations

import os
import platform
import resource
import socket
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Final

from forwarder import DISTRIBUTION, __version__
from forwarder.net import datagrams, pipes, udp
from forwarder.system import kernel

if TYPE_CHECKING:
    from collections.abc import Callable


def report() -> list[str]:
    """Versions, features and limits, one a line."""
    uname = os.uname()
    lines = [
        f"forwarder {__version__} (distribution {DISTRIBUTION})",
        f"Python {platform.python_version()}",
        f"uvloop {_version_of('uvloop')}",
        f"{uname.sysname} {uname.release} {uname.machine}",
    ]
    lines += [f"{name}: {'yes' if has_it() else 'no'}" for name, has_it in FEATURES]
    return lines + _limits()


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def has_splice() -> bool:
    """Whether a byte can be spliced from a socket into a pipe."""
    if not hasattr(os, "splice"):
        return False
    near, far = socket.socketpair()
    with near, far:
        read_fd, write_fd = os.pipe()
        try:
            near.send(b"x")
            return os.splice(far.fileno(), write_fd, 1) == 1
        except OSError:
            return False
        finally:
            os.close(read_fd)
            os.close(write_fd)


def has_reuseport() -> bool:
    """Whether two sockets can listen on one port."""
    with ExitStack() as stack:
        try:
            port = 0
            for _ in range(2):
                sock = stack.enter_context(socket.socket())
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                sock.bind(("127.0.0.1", port))
                port = sock.getsockname()[1]
        except (OSError, AttributeError):
            return False
    return True


def _takes_udp_option(option: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.setsockopt(datagrams.SOL_UDP, option, 1)
        except OSError:
            return False
    return True


def has_segment() -> bool:
    """Whether several datagrams can be sent as one."""
    return _takes_udp_option(datagrams.UDP_SEGMENT)


def has_gro() -> bool:
    """Whether several datagrams can be received as one."""
    return _takes_udp_option(datagrams.UDP_GRO)


FEATURES: Final[tuple[tuple[str, Callable[[], bool]], ...]] = (
    ("splice", has_splice),
    ("SO_REUSEPORT", has_reuseport),
    ("recvmmsg", datagrams.is_supported),
    ("UDP_SEGMENT", has_segment),
    ("UDP_GRO", has_gro),
    ("UDP flow hash", udp.finds_flows_by_hash),
)


def _limits() -> list[str]:
    soft, hard = (_number(limit) for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    lines = [f"open files: {soft}, at most {hard}"]
    for name, path, unit in (
        ("pipe budget", "fs/pipe-user-pages-soft", f" pages of {pipes.PAGE_BYTES} bytes per user"),
        ("listen queue", "net/core/somaxconn", ""),
        ("UDP buffer", "net/core/rmem_max", " bytes"),
    ):
        value = kernel.setting(path)
        lines.append(f"{name}: {value}{unit}" if value.isdigit() else f"{name}: not known")
    return lines


def _number(limit: int) -> str:
    return "no limit" if limit == resource.RLIM_INFINITY else str(limit)
