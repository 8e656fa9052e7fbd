"""Running the command in a session of its own, so that whatever it leaves is found."""

from __future__ import annotations

import os
import signal
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import pytest
from support.configured import Configured, rule
from support.datagrams import free_udp_address, udp
from support.ends import Link, carry, listen, open_link
from support.forwarder import Forwarder, reserve_port
from support.limited import Limited
from support.logged import Logged
from support.named import Named
from support.names import FakeNames
from support.namespaces import Namespace, join
from support.processes import members, run_command
from support.upgraded import keep_sessions
from support.waiting import eventually

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Sequence

_BUGS = ("Traceback", "relay.bug", "never retrieved", "internal error", "Exception")


class Launch(Protocol):
    """See :func:`launch`."""

    def __call__(
        self, *arguments: str, prefix: Sequence[str] = (), expect_ready: bool = True
    ) -> Forwarder:
        """Start the command with these arguments."""


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Start the command, any number of times, as the leader of a session.

    At the end what still runs is killed; no instance may have printed a traceback.
    """
    started: list[Forwarder] = []

    def start(*arguments: str, prefix: Sequence[str] = (), expect_ready: bool = True) -> Forwarder:
        forwarder = Forwarder(arguments, expect_ready=expect_ready, prefix=["setsid", *prefix])
        started.append(forwarder)
        return forwarder

    yield start
    for forwarder in started:
        kill_session(forwarder.pid)
    for forwarder in started:
        forwarder.wait()
    for forwarder in started:
        bugs = [line for line in forwarder.lines if any(word in line for word in _BUGS)]
        assert not bugs, "\n".join(forwarder.lines)


@dataclass
class Service:
    """One rule of a forwarder: where clients connect, and the upstream that they get to."""

    forwarder: Forwarder
    address: tuple[str, int]
    upstream: socket.socket
    links: list[Link] = field(default_factory=list)

    @property
    def pairs(self) -> list[str]:
        """The rule as arguments."""
        return as_pairs(self.address, self.upstream)

    def link(self) -> Link:
        """Open a session; it is closed at the end of the test if not before."""
        link = open_link(self.address, self.upstream)
        self.links.append(link)
        return link

    def assert_serves(self) -> None:
        """A new client gets through, both ways."""
        link = self.link()
        carry(link.client, link.upstream, b"there" * 1000)
        carry(link.upstream, link.client, b"back" * 1000)
        link.close()

    def assert_nothing_left(self) -> None:
        """No process of the instance is left, nor is its port taken."""
        pid = self.forwarder.pid
        eventually(lambda: not members(pid), lambda: f"processes left: {members(pid)}")
        listen(*self.address).close()

    def stop(self, *numbers: signal.Signals) -> int:
        """Send signals to the master, SIGTERM by default; returns its exit code.

        An instance that fails leaves workers behind; they would keep its stderr open.
        """
        return stop(self.forwarder, *(numbers or (signal.SIGTERM,)))

    def kill_worker(self, pid: int) -> None:
        """Kill a worker; wait until it is gone and another one has taken its place and is ready."""
        ready = self.ready_lines()
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: self.ready_lines() > ready, lambda: "\n".join(self.forwarder.lines))
        assert pid not in self.forwarder.workers()

    def ready_lines(self) -> int:
        """How often a worker got ready."""
        return sum("worker.ready" in line for line in self.forwarder.lines)


def stop(forwarder: Forwarder, *numbers: signal.Signals) -> int:
    """Send signals to a master and wait for its end; what a failed one leaves is killed."""
    for number in numbers:
        forwarder.signal(number)
    eventually(
        lambda: forwarder.process.poll() is not None,
        lambda: "\n".join(forwarder.lines),
        within_s=60,
    )
    if forwarder.process.returncode:
        kill_session(forwarder.pid)
    return forwarder.wait()


def kill_session(session: int) -> None:
    """Kill what is left of a session that we started; returns when nothing is.

    Pids start over at kernel.pid_max, so a worker may come before its master, which replaces it.
    """

    def is_empty() -> bool:
        for pid in (left := members(session)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    eventually(is_empty, lambda: f"left: {members(session)}")


def as_pairs(listen_at: tuple[str, int], upstream: socket.socket) -> list[str]:
    """A rule as arguments."""
    host, port = upstream.getsockname()
    return ["-l", f"{listen_at[0]}:{listen_at[1]}", "-r", f"{host}:{port}"]


class Serve(Protocol):
    """See :func:`serve`."""

    def __call__(self, *arguments: str, workers: int = 1, prefix: Sequence[str] = ()) -> Service:
        """Start it."""


@pytest.fixture
def links() -> Iterator[list[Link]]:
    """Sessions, which are closed at the end."""
    found: list[Link] = []
    yield found
    for link in found:
        link.close()


@pytest.fixture
def keeping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old instances keep their sessions, so they stay until these have ended."""
    keep_sessions(tmp_path / "others", monkeypatch)


@pytest.fixture
def serve(launch: Launch) -> Iterator[Serve]:
    """Start a forwarder of one rule on a port of its own, with an upstream behind it."""
    services: list[Service] = []
    with ExitStack() as stack:

        def start(*arguments: str, workers: int = 1, prefix: Sequence[str] = ()) -> Service:
            address = stack.enter_context(reserve_port()).getsockname()
            upstream = stack.enter_context(listen())
            pairs = as_pairs(address, upstream)
            forwarder = launch(*pairs, "--workers", str(workers), *arguments, prefix=prefix)
            service = Service(forwarder, address, upstream)
            services.append(service)
            return service

        yield start
        for service in services:
            for link in service.links:
                link.close()


class Logging(Protocol):
    """See :func:`logged`."""

    def __call__(
        self,
        logs: str,
        *,
        top: str = "",
        rule: str = "",
        upstream: str = "",
        workers: int = 2,
        prefix: Sequence[str] = (),
    ) -> Logged:
        """Start it."""


@pytest.fixture
def logged(launch: Launch, tmp_path: Path) -> Iterator[Logging]:
    """Start a forwarder of one rule, with these places of the connection log, as TOML.

    ``top`` and ``rule`` are more TOML at the top and in the rule, ``upstream`` a TOML value in
    place of the listener's address.
    """
    with ExitStack() as stack:

        def start(
            logs: str,
            *,
            top: str = "",
            rule: str = "",
            upstream: str = "",
            workers: int = 2,
            prefix: Sequence[str] = (),
        ) -> Logged:
            address = stack.enter_context(reserve_port()).getsockname()
            listener = stack.enter_context(listen())
            target = upstream or '"{}:{}"'.format(*listener.getsockname())
            control, config = tmp_path / "c.sock", tmp_path / "c.toml"
            config.write_text(
                f'control = "{control}"\nworkers = {workers}\n{top}\n[[forwarding_rules]]\n'
                f'name = "one"\nlisten = "{address[0]}:{address[1]}"\nupstream = {target}\n'
                f"{rule}\n{logs}"
            )
            forwarder = launch("-c", str(config), prefix=prefix)
            return Logged(forwarder, config, control, address, listener)

        yield start


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    """An address of ours whose port nobody else gets."""
    with reserve_port() as holder:
        yield holder.getsockname()


@pytest.fixture
def upstream() -> Iterator[socket.socket]:
    """A listener to forward to."""
    with listen() as listener:
        yield listener


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A directory that every user may look into, unlike ``tmp_path``."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def any_address() -> Iterator[tuple[str, int]]:
    """The wildcard, with a port that nobody else gets on any IPv4 address of this host."""
    with reserve_port("0.0.0.0") as holder:
        yield holder.getsockname()


class Limit(Protocol):
    """See :func:`limit`."""

    def __call__(self, more: str, *, workers: int = 2, top: str = "") -> Limited:
        """Start it."""


@pytest.fixture
def limit(launch: Launch, tmp_path: Path) -> Iterator[Limit]:
    """Start a forwarder with one rule; ``more`` is more TOML of the rule, ``top`` of all."""
    started: list[Limited] = []
    with ExitStack() as stack:

        def start(more: str, *, workers: int = 2, top: str = "") -> Limited:
            address = stack.enter_context(reserve_port("0.0.0.0")).getsockname()
            upstream = stack.enter_context(listen())
            path = tmp_path / f"{len(started)}.toml"
            head = f'workers = {workers}\ncontrol = "{path}.sock"\n'
            found = Limited(None, ("127.0.0.1", address[1]), upstream, head)  # type: ignore[arg-type]
            path.write_text(found.text(more, top))
            found.it = Configured(launch("-c", str(path)), path)
            started.append(found)
            return found

        yield start
        for found in started:
            found.close_links()


class LimitAny(Protocol):
    """See :func:`limit_any`."""

    def __call__(self, protocol: str, more: str, *, workers: int = 2) -> Limited:
        """Start it."""


@pytest.fixture
def limit_any(launch: Launch, tmp_path: Path) -> Iterator[LimitAny]:
    """As :func:`limit`, with one rule of any protocol."""
    with ExitStack() as stack:

        def start(protocol: str, more: str, *, workers: int = 2) -> Limited:
            upstream = stack.enter_context(listen() if protocol == "udptotcp" else udp())
            holder = stack.enter_context(reserve_port())
            address = holder.getsockname() if protocol == "tcptoudp" else free_udp_address()
            path = tmp_path / "forwarder.toml"
            path.write_text(
                f'workers = {workers}\ncontrol = "{path}.sock"\n'
                + rule(
                    address,
                    upstream.getsockname(),
                    f'name = "one"\nprotocol = "{protocol}"\n{more}',
                )
            )
            return Limited(Configured(launch("-c", str(path)), path), address, upstream, "")

        yield start


# -- a network of one's own


@dataclass
class Network:
    """Three namespaces: clients -- the forwarder -- upstreams, joined by two pairs of veth(4)."""

    clients: Namespace
    middle: Namespace
    upstreams: Namespace
    path: Path
    launch: Launch

    def start(self, text: str, workers: int = 2) -> Configured:
        """Start a forwarder; its notifications do not reach us from there."""
        self.path.write_text(f"workers = {workers}\n" + text)
        it = self.launch("-c", str(self.path), prefix=self.middle.prefix, expect_ready=False)
        it.wait_logged(r"master\.ready")
        return Configured(it, self.path)

    def lay_near(self) -> None:
        """Lay the cable between clients and the forwarder; a second time, once it was deleted."""
        join(self.clients, self.middle, ("c0", "near"))
        for client, near, _, _ in ADDRESSES.values():
            more = "/64 dev {} nodad" if ":" in near else "/24 dev {}"
            self.clients.ip(f"addr add {client}{more.format('c0')}")
            self.middle.ip(f"addr add {near}{more.format('near')}")

    def check(self, *command: str, text: str) -> tuple[int, str]:
        """Run a command with this configuration; how it ends, and what it says."""
        self.path.write_text(text)
        done = run_command(*command, "-c", str(self.path), prefix=self.middle.prefix)
        return done.returncode, done.stderr


# Of the client, the forwarder on either side, and the upstream.
ADDRESSES: Final = {
    "IPv4": ("10.1.0.2", "10.1.0.1", "10.2.0.1", "10.2.0.2"),
    "IPv6": ("fd01::2", "fd01::1", "fd02::1", "fd02::2"),
}


@pytest.fixture
def network(tmp_path: Path, launch: Launch) -> Iterator[Network]:
    """The three, with addresses and routes; answers of upstreams come to the forwarder itself."""
    with Namespace() as clients, Namespace() as middle, Namespace() as upstreams:
        made = Network(clients, middle, upstreams, tmp_path / "forwarder.toml", launch)
        made.lay_near()
        join(middle, upstreams, ("far", "u0"))
        for version, (_, _, far, upstream) in ADDRESSES.items():
            size, more = ("24", "") if version == "IPv4" else ("64", " nodad")
            middle.ip(f"addr add {far}/{size} dev far{more}")
            upstreams.ip(f"addr add {upstream}/{size} dev u0{more}")
            six, every = ("-6 ", "::/0") if version == "IPv6" else ("", "0.0.0.0/0")
            upstreams.ip(f"{six}route add default via {far}")
            middle.ip(
                f"{six}rule add iif far from {upstream} lookup 100",
                f"{six}route add local {every} dev lo table 100",
            )
        yield made


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What is closed at the end."""
    with ExitStack() as found:
        yield found


@pytest.fixture
def named(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Named]:
    """A forwarder whose rules have names that mean what the test says."""
    with ExitStack() as stack:
        yield Named(launch, tmp_path, stack, FakeNames(tmp_path / "names", monkeypatch))
