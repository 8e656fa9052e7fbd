"""Trying the socket options of a configuration on sockets that are never connected.

So what this system cannot do, or this process may not, is reported when the configuration is read,
with its place, and not found by the first client. Binds and connects nothing.

Options that workers set themselves are tried with their rights, in a forked process that drops the
others.
"""

from __future__ import annotations

import errno
import os
import pickle
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from forwarder.config.address import UnixAddress
from forwarder.config.model import BACKLOG, SocketOptions
from forwarder.errors import ConfigError, ExitCode, Issue, RightsError, StartupError
from forwarder.net import options as socket_options
from forwarder.system import kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from forwarder.config.address import Endpoint
    from forwarder.config.model import Config, Rule
    from forwarder.net.options import Setting

_DENIED: Final = (errno.EPERM, errno.EACCES)
_LIMITS: Final = {socket.SO_RCVBUF: "core/rmem_max", socket.SO_SNDBUF: "core/wmem_max"}
_CLIENT_BIT, _SERVER_BIT = 1, 2  # of net.ipv4.tcp_fastopen, ip-sysctl
_RIGHTS_HINT: Final = (
    "start as root, or with AmbientCapabilities=CAP_NET_RAW in the unit (before Linux 5.17 "
    "CAP_NET_ADMIN); workers that run as another user need a restart when the first rule needs it"
)


@dataclass(frozen=True, slots=True)
class _Problem:
    """What is wrong with an option, without the rule and its place."""

    key: str
    what: str
    allowed: str = ""
    hint: str = ""
    is_denied: bool = False
    is_missing_device: bool = False


@dataclass(frozen=True, slots=True)
class _Case:
    """Sockets of one kind, of the side of the clients or of the upstreams."""

    options: SocketOptions
    family: int
    is_udp: bool
    listens: bool

    @property
    def is_for_workers(self) -> bool:
        """Whether workers make such sockets."""
        return self.is_udp or not self.listens

    @property
    def is_mptcp(self) -> bool:
        """Whether they are to be MPTCP."""
        sides = self.options.mptcp
        return not self.is_udp and (sides.on_listen if self.listens else sides.on_connect)


def check(
    config: Config, drop: Callable[[], None] | None = None, waiting: Collection[str] = ()
) -> None:
    """Try all options that are not the default.

    ``drop`` gives up the rights that workers do not have. None: rights are not looked at.
    ``waiting`` are rules that wait already, perhaps for a device.
    Raises ConfigError, or RightsError when nothing but privileges is missing; StartupError when
    there is no process to try with.
    """
    cases = {rule.name: _cases(rule) for rule in config.rules if rule.options != SocketOptions()}
    every = list(dict.fromkeys(case for found in cases.values() for case in found))
    if not every:
        return
    ours = [case for case in every if case.listens or drop is None]
    problems = {case: list(_try(case)) for case in ours}
    if drop is not None:
        theirs = _try_as_worker([case for case in every if case.is_for_workers], drop)
        for case, found in theirs.items():
            problems.setdefault(case, []).extend(found)
    issues: dict[Issue, bool] = {}
    for rule in config.rules:
        for problem in dict.fromkeys(p for c in cases.get(rule.name, ()) for p in problems[c]):
            is_waited_for = problem.is_missing_device and (
                rule.retries_bind or rule.name in waiting
            )
            if not is_waited_for and not (problem.is_denied and drop is None):
                issues[_issue(rule, problem)] = problem.is_denied
    if issues:
        ordered = sorted(issues, key=lambda issue: (issue.place.line, issue.place.column))
        raise (RightsError if all(issues.values()) else ConfigError)(ordered)


def _issue(rule: Rule, problem: _Problem) -> Issue:
    place = dict(rule.options.places).get(problem.key, rule.place)
    return Issue(place, problem.what, problem.allowed, problem.hint)


def _cases(rule: Rule) -> list[_Case]:
    found = [
        _Case(rule.options, family, rule.protocol.listens_on_udp, listens=True)
        for family in _families([rule.listen])
    ]
    return found + [
        _Case(rule.options, family, rule.protocol.connects_by_udp, listens=False)
        for family in _families(rule.upstream_ends)
    ]


def _families(ends: Iterable[Endpoint]) -> set[int]:
    """Those of the addresses; a name may stand for either, so the one that all systems have."""
    return {
        socket.AF_UNIX
        if isinstance(end, UnixAddress)
        else socket.AF_INET6
        if ":" in end.host
        else socket.AF_INET
        for end in ends
    }


def _try_as_worker(cases: list[_Case], drop: Callable[[], None]) -> dict[_Case, list[_Problem]]:
    """Try in a forked process that has dropped its rights. Blocks until it has ended."""
    if not cases:
        return {}
    read_fd, write_fd = os.pipe()
    try:
        pid = os.fork()
    except OSError as err:
        os.close(read_fd)
        os.close(write_fd)
        raise StartupError(f"cannot start a process to try socket options: {err}") from err
    if pid == 0:
        try:
            drop()
            with os.fdopen(write_fd, "wb") as file:
                file.write(pickle.dumps([list(_try(case)) for case in cases]))
        finally:
            os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as file:
        answer = file.read()
    os.waitpid(pid, 0)
    try:
        found: list[list[_Problem]] = pickle.loads(answer)  # noqa: S301 - our own forked child
    except (EOFError, pickle.UnpicklingError, ValueError) as err:
        what = "the process that tries socket options died"
        raise StartupError(what, ExitCode.INTERNAL) from err
    return dict(zip(cases, found, strict=True))


def _try(case: _Case) -> Iterator[_Problem]:
    options = case.options
    if case.listens and options.backlog != BACKLOG and not case.is_udp:
        yield from _too_many("backlog", options.backlog)
    if case.family == socket.AF_UNIX:
        return
    try:
        sock = _socket(case)
    except OSError as err:
        if case.is_mptcp and err.errno not in (errno.EMFILE, errno.ENFILE):
            hint = "`sysctl net.mptcp.enabled=1`; it takes Linux 5.6 with CONFIG_MPTCP"
            yield _Problem("mptcp", f"mptcp: this system has none: {err.strerror}", hint=hint)
        return
    with sock:
        make = socket_options.listening if case.listens else socket_options.connecting
        for setting in make(options, case.family, is_udp=case.is_udp):
            yield from _set(sock, setting)
        yield from _try_fast_open(sock, case)


def _socket(case: _Case) -> socket.socket:
    kind = socket.SOCK_DGRAM if case.is_udp else socket.SOCK_STREAM
    protocol = socket_options.IPPROTO_MPTCP if case.is_mptcp else 0
    return socket.socket(case.family, kind, protocol)


def _set(sock: socket.socket, setting: Setting) -> Iterator[_Problem]:
    """Set one option, and check whether it has the value wanted."""
    try:
        sock.setsockopt(setting.level, setting.name, setting.value)
    except OSError as err:
        # A missing device of upstreams is a state, which may change: see ``Pool.interfaces``.
        is_state = setting.key == "upstream_device" and err.errno == errno.ENODEV
        if setting.key and not is_state:
            yield _explain(setting, err)
        return
    if setting.key in ("rcvbuf", "sndbuf") and isinstance(setting.value, int):
        granted = sock.getsockopt(setting.level, setting.name) // 2  # it is doubled, socket(7)
        if granted < setting.value:
            sysctl = "net." + _LIMITS[setting.name].replace("/", ".")
            yield _Problem(
                setting.key,
                f"{setting.key} is {setting.value}, and this system grants {granted}",
                f"at most {sysctl}, {granted}",
                f"`sysctl {sysctl}={setting.value}`",
            )


def _try_fast_open(sock: socket.socket, case: _Case) -> Iterator[_Problem]:
    sides = case.options.fast_open
    if case.is_udp:
        return
    bit = 0
    if case.listens and sides.on_listen:
        bit = _SERVER_BIT
        yield from _too_many("fast_open_queue", case.options.fast_open_queue)
    if not case.listens and sides.on_connect:
        bit = _CLIENT_BIT
        with suppress(OSError):  # the bit then shows what is refused
            sock.setsockopt(socket.IPPROTO_TCP, socket_options.FAST_OPEN_CONNECT, 1)
    value = kernel.setting("net/ipv4/tcp_fastopen")
    if bit and value.isdigit() and not int(value) & bit:
        side = "accept" if case.listens else "begin"
        yield _Problem(
            "fast_open",
            f"fast_open: this system does not {side} such connections, "
            f"net.ipv4.tcp_fastopen is {value}",
            hint=f"`sysctl net.ipv4.tcp_fastopen={int(value) | bit}`",
        )


def _too_many(key: str, number: int) -> Iterator[_Problem]:
    """The kernel would cut the length of a queue without a word, listen(2)."""
    most = kernel.setting("net/core/somaxconn")
    if most.isdigit() and number > int(most):
        yield _Problem(
            key,
            f"{key} is {number}, and this system allows {most}",
            f"at most net.core.somaxconn, {most}",
            f"`sysctl net.core.somaxconn={number}`",
        )


def _explain(setting: Setting, err: OSError) -> _Problem:
    key, number = setting.key, err.errno or 0
    shown = _shown(setting)
    if key == "congestion" and number in (errno.ENOENT, errno.EPERM):
        allowed = "allowed" if number == errno.EPERM else "available"
        return _Problem(
            key,
            f"congestion {shown!r}: "
            + ("this process may not use it" if number == errno.EPERM else "there is none here"),
            ", ".join(kernel.setting(f"net/ipv4/tcp_{allowed}_congestion_control").split()),
            f"`sysctl net.ipv4.tcp_{allowed}_congestion_control`; "
            + ("add it there" if number == errno.EPERM else f"`modprobe tcp_{shown}`"),
            is_denied=number == errno.EPERM,
        )
    if key == "device" and number == errno.ENODEV:
        names = ", ".join(name for _, name in socket.if_nameindex())
        hint = 'bind = "retry" waits for one that comes later'
        what = f"there is no network device {shown!r}"
        return _Problem(key, what, names, hint, is_missing_device=True)
    if number in _DENIED:
        what = f"{key} needs a privilege: {os.strerror(number)}"
        return _Problem(key, what, hint=_RIGHTS_HINT, is_denied=True)
    return _Problem(key, f"{key}: not possible on this system: {os.strerror(number)}")


def _shown(setting: Setting) -> str:
    value = setting.value
    if not isinstance(value, bytes):
        return str(value)
    if setting.key.endswith("mark"):
        return str(struct.unpack("I", value)[0])
    return value.decode()
