"""Guards around every test, and fixtures that run the real command."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest
from hypothesis import HealthCheck, settings
from support import procfs
from support.ends import Link, listen, listen_unix, open_link, written
from support.forwarder import Forwarder, Leaks, reserve_port
from support.namespaces import enter_network
from support.waiting import eventually

if TYPE_CHECKING:
    import socket
    from collections.abc import Generator, Iterator

    from _pytest.reports import CollectReport, TestReport

# A machine that is busy with something else is no reason for a test to fail.
settings.register_profile("forwarder", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("forwarder")

MOST_DESCRIPTORS = 20_000
ON_LINUX = sys.platform.startswith("linux")


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers that the fixtures below understand."""
    config.addinivalue_line(
        "markers",
        "expects_log(*patterns): the command may log warnings and errors that match, "
        "and must log each of them; without patterns any are fine",
    )
    _hear_what_is_ignored()
    _raise_descriptor_limit()
    if hasattr(config, "workerinput") and ON_LINUX and os.geteuid() == 0:
        enter_network()


def _raise_descriptor_limit() -> None:
    """Thousands of sessions have two ends here; a user begins with 1,024 descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _hear_what_is_ignored() -> None:
    """In the background, or under nohup, some signals are ignored, in every child, too.

    With a handler that does nothing they still are here, and a program that is executed has them
    as they are by default: signal(7).
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


# -- FORWARDER_NO_SKIP=1: a skipped test is a failed one; =user: but for what only root can do

_NEEDS_ROOT = re.compile(r"\broot\b")


def _forbid_skip(report: TestReport | CollectReport) -> None:
    forbids = os.environ.get("FORWARDER_NO_SKIP", "")
    if forbids and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        if forbids == "user" and _NEEDS_ROOT.search(str(reason)):
            return
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: FORWARDER_NO_SKIP={forbids} forbids: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, TestReport, TestReport]:
    """Turn a skip into a failure if asked to."""
    report = yield
    _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, CollectReport, CollectReport]:
    """Turn the skip of a whole module into a failure if asked to."""
    report = yield
    _forbid_skip(report)
    return report


# -- guards


@pytest.fixture(autouse=True, scope="session")
def runtime_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No instance makes its control socket in the directory of the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNTIME_DIRECTORY", str(tmp_path_factory.mktemp("run")))
        yield


@pytest.fixture(autouse=True)
def no_leaks_here() -> Iterator[None]:
    """No test leaves a descriptor or a child process behind."""
    if not ON_LINUX:
        yield
        return
    me = os.getpid()
    fds_before = procfs.descriptors(me)
    children_before = set(procfs.children(me))
    yield
    eventually(
        lambda: len(procfs.descriptors(me)) <= len(fds_before),
        lambda: f"descriptors left open: {set(procfs.descriptors(me)) - set(fds_before)}",
    )
    eventually(
        lambda: set(procfs.children(me)) <= children_before,
        lambda: f"child processes left: {set(procfs.children(me)) - children_before}",
    )


# -- the command


class StartForwarder(Protocol):
    """See :func:`start_forwarder`."""

    def __call__(self, *arguments: str, expect_ready: bool = True) -> Forwarder:
        """Start the command with these arguments."""


@pytest.fixture
def start_forwarder(request: pytest.FixtureRequest) -> Iterator[StartForwarder]:
    """Start the command, any number of times.

    At the end each one that still runs must end with status 0 on SIGTERM, and none may have logged
    a warning or an error that the test does not expect by its marker ``expects_log``.
    """
    started: list[Forwarder] = []

    def start(*arguments: str, expect_ready: bool = True) -> Forwarder:
        forwarder = Forwarder(arguments, expect_ready=expect_ready)
        started.append(forwarder)
        return forwarder

    yield start
    codes = [(f, f.stop()) for f in started if f.process.returncode is None]
    for forwarder, code in codes:
        assert code == 0, (code, forwarder.lines)
    marker = request.node.get_closest_marker("expects_log")
    _check_log([line for f in started for line in f.trouble()], marker)


def _check_log(trouble: list[str], marker: pytest.Mark | None) -> None:
    if marker is None:
        assert not trouble, trouble
        return
    for pattern in marker.args:
        assert any(re.search(pattern, line) for line in trouble), (pattern, trouble)
    if marker.args:
        unexpected = [t for t in trouble if not any(re.search(p, t) for p in marker.args)]
        assert not unexpected, unexpected


@dataclass
class Tunnel:
    """A running forwarder and the listener that it forwards to.

    ``address`` is where clients connect, ``listener`` where their sessions arrive.
    """

    forwarder: Forwarder
    address: tuple[str, int] | str
    listener: socket.socket
    leaks: Leaks
    links: list[Link] = field(default_factory=list)

    def link(self, receive_buffer: int = 0) -> Link:
        """Open a session. ``receive_buffer`` is the client's."""
        link = open_link(self.address, self.listener, receive_buffer)
        self.links.append(link)
        return link

    def close_links(self) -> None:
        """Close the sessions that are open."""
        while self.links:
            self.links.pop().close()


class MakeTunnel(Protocol):
    """See :func:`make_tunnel`."""

    def __call__(
        self,
        *arguments: str,
        rule: str = "",
        listener: socket.socket | None = None,
        upstream: str = "",
    ) -> Tunnel:
        """Start a forwarder."""


@pytest.fixture
def make_tunnel(start_forwarder: StartForwarder, tmp_path: Path) -> Iterator[MakeTunnel]:
    """Start a forwarder with one rule that leads to ``listener``, a new one by default.

    ``rule`` is more TOML for that rule, ``upstream`` a TOML value in place of the listener's
    address, ``arguments`` are added to the command line. Leaks are checked at the end.
    """
    tunnels: list[Tunnel] = []
    with ExitStack() as stack:

        def make(
            *arguments: str,
            rule: str = "",
            listener: socket.socket | None = None,
            upstream: str = "",
        ) -> Tunnel:
            holder = stack.enter_context(reserve_port())
            listener = stack.enter_context(listen() if listener is None else listener)
            host, port = holder.getsockname()
            target = upstream or '"{}:{}"'.format(*listener.getsockname()[:2])
            path = tmp_path / f"{len(tunnels)}.toml"
            path.write_text(
                f'[[forwarding_rules]]\nlisten = "{host}:{port}"\nupstream = {target}\n{rule}\n'
            )
            forwarder = start_forwarder("-c", str(path), *arguments)
            tunnel = Tunnel(forwarder, (host, port), listener, Leaks(forwarder))
            tunnels.append(tunnel)
            return tunnel

        yield make
        for tunnel in tunnels:
            tunnel.close_links()
            if tunnel.forwarder.process.poll() is None:
                tunnel.leaks.check()


# -- one forwarder for all tests of a module, in every variant


Variant = tuple[str, int, str, str]
VARIANTS: list[Variant] = [
    (relay, workers, "tcp", "tcp") for relay in ("splice", "copy") for workers in (1, 3)
]
"""FlowDirection of relaying, number of workers, and what the two sides of the forwarder are."""
UNIX_VARIANTS: list[Variant] = [
    ("splice", 2, "path", "tcp"),
    ("copy", 1, "path", "tcp"),
    ("splice", 1, "tcp", "path"),
    ("copy", 2, "tcp", "abstract"),
    ("splice", 2, "abstract", "path"),
]
"""The same with unix sockets; a module that wants them says so by ``EVERY_VARIANT``."""


def variant_id(variant: Variant) -> str:
    """The variant in the name of a test."""
    return "-".join(map(str, variant[: 2 if variant[2:] == ("tcp", "tcp") else 4]))


EVERY_VARIANT = pytest.mark.parametrize(
    "shared_tunnel", VARIANTS + UNIX_VARIANTS, ids=variant_id, indirect=True, scope="module"
)


def _side(kind: str, directory: Path, name: str, stack: ExitStack) -> tuple[str, int] | str:
    """An address of that kind that nobody else has."""
    if kind == "path":
        return str(directory / name)
    if kind == "abstract":
        return f"\0{directory}/{name}"
    host, port = stack.enter_context(reserve_port()).getsockname()
    return host, port


@pytest.fixture(scope="module", params=VARIANTS, ids=variant_id)
def shared_tunnel(request: pytest.FixtureRequest) -> Iterator[Tunnel]:
    """A tunnel for a whole module, per variant; at its end, look for leaks."""
    relay, workers, *sides = request.param
    with ExitStack() as stack, tempfile.TemporaryDirectory() as name:
        address = _side(sides[0], Path(name), "listen", stack)
        if sides[1] == "tcp":
            listener = stack.enter_context(listen())
        else:
            there = _side(sides[1], Path(name), "upstream", stack)
            assert isinstance(there, str)
            listener = stack.enter_context(listen_unix(there))
        forwarder = Forwarder(
            [
                *("-l", written(address), "-r", written(name_of(listener))),
                *("--workers", str(workers), "--relay", relay),
            ]
        )
        try:
            tunnel = Tunnel(forwarder, address, listener, Leaks(forwarder))
            yield tunnel
            tunnel.leaks.check()
            code = forwarder.stop()
            assert code == 0, (code, forwarder.lines)
            assert not forwarder.trouble(), forwarder.trouble()
        finally:
            if forwarder.process.returncode is None:
                forwarder.kill()


def name_of(sock: socket.socket) -> tuple[str, int] | str:
    """Where a socket is bound."""
    found = sock.getsockname()
    if isinstance(found, bytes):  # Python gives abstract names so
        return found.decode()
    return found if isinstance(found, str) else (found[0], found[1])


@pytest.fixture
def tunnel(shared_tunnel: Tunnel) -> Iterator[Tunnel]:
    """The module's tunnel; the sessions of the test end with it."""
    yield shared_tunnel
    shared_tunnel.close_links()
