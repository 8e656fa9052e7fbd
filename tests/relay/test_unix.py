"""Unix sockets: what a reset becomes, full queues, descriptors sent along, peers that die."""

from __future__ import annotations

import array
import contextlib
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeAlias

import pytest
from support import procfs, sockdiag
from support.ends import (
    Link,
    accept,
    carry,
    connect,
    fill,
    listen,
    listen_unix,
    receive_exactly,
    receive_to_end,
    receive_to_reset,
    reset,
    seeded,
    send_to_reset,
)
from support.forwarder import reserve_port
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import StartForwarder
    from support.forwarder import Forwarder

    Ends: TypeAlias = tuple[socket.socket, socket.socket]


class Site:
    """A forwarder with one way in by TCP and one by a unix socket, to one upstream of each kind."""

    def __init__(self, start: StartForwarder, directory: Path, stack: ExitStack) -> None:
        self._start = start
        self._stack = stack
        self.tcp: tuple[str, int] = stack.enter_context(reserve_port()).getsockname()
        self.path = str(directory / "in.sock")
        self.tcp_upstream = stack.enter_context(listen())
        self.unix_upstream = stack.enter_context(listen_unix(str(directory / "out.sock")))
        self.forwarder: Forwarder

    def start(self, relay: str) -> None:
        """TCP leads to the unix socket, the unix socket to TCP."""
        self.forwarder = self._start(
            *("-l", "{}:{}".format(*self.tcp), "-r", f"unix:{self.unix_upstream.getsockname()}"),
            *("-l", f"unix:{self.path}", "-r", "{}:{}".format(*self.tcp_upstream.getsockname())),
            *("--workers", "1", "--relay", relay),
        )

    def link(self, unix: str) -> Ends:
        """A session: its end on the unix socket, which is the client's or the upstream's."""
        if unix == "client":
            client = self._stack.enter_context(connect(self.path))
            return client, self._stack.enter_context(accept(self.tcp_upstream))
        client = self._stack.enter_context(connect(self.tcp))
        return self._stack.enter_context(accept(self.unix_upstream)), client


@pytest.fixture
def site(start_forwarder: StartForwarder, tmp_path: Path) -> Iterator[Site]:
    """See :class:`Site`."""
    with ExitStack() as stack:
        yield Site(start_forwarder, tmp_path, stack)


@pytest.fixture(params=["splice", "copy"])
def relay(request: pytest.FixtureRequest) -> str:
    """How the forwarder moves bytes."""
    mode: str = request.param
    return mode


@pytest.fixture(params=["client", "upstream"])
def ends(site: Site, relay: str, request: pytest.FixtureRequest) -> Ends:
    """A session's end on the unix socket, which is the client's or the upstream's; the other."""
    site.start(relay)
    return site.link(request.param)


def test_a_reset_reaches_a_unix_peer_as_an_end_and_a_broken_pipe(ends: Ends) -> None:
    """There is no reset that could be sent: unix(7)."""
    near, far = ends
    far.sendall(b"part")
    assert receive_exactly(near, 4) == b"part"
    reset(far)
    assert receive_to_end(near) == b""
    with pytest.raises(BrokenPipeError):
        near.sendall(b"more")


def test_a_unix_peer_that_sent_what_was_not_read_gets_a_reset(ends: Ends) -> None:
    """The far end reads nothing and resets while our receive queue is full."""
    near, far = ends
    fill(near, seeded(32 << 20, 1))
    reset(far)
    assert receive_to_reset(near) == b""


def test_a_unix_peer_that_closes_with_unread_input_resets(ends: Ends) -> None:
    """As a server does that answers and goes without having read all. Result: answer, then RST."""
    near, far = ends
    far.sendall(b"never read")
    eventually(lambda: bool(near.recv(1, socket.MSG_PEEK)))
    near.sendall(b"answer")
    near.close()
    assert receive_to_reset(far) == b"answer"


def test_a_clogged_unix_peer_that_goes_away_stops_the_sender(ends: Ends) -> None:
    near, far = ends
    fill(far, seeded(32 << 20, 2))
    near.close()
    send_to_reset(far)


def test_what_follows_a_descriptor_arrives_at_once(site: Site, ends: Ends) -> None:
    """A read stops behind what was sent with a descriptor, short, though more is there (unix(7)).

    Result: all of it arrives although nothing follows; the descriptor does not, and is not kept.
    """
    near, far = ends
    (worker,) = site.forwarder.workers()
    carry(near, far, b"begin")
    before = len(procfs.descriptors(worker))
    with socket.socket() as some:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [some.fileno()]))
        for number in range(20):
            data = bytes([number]) * 100
            near.sendmsg([data[:10]], [rights])
            near.sendall(data[10:])
            assert receive_exactly(far, 100) == data
    eventually(lambda: len(procfs.descriptors(worker)) == before)


# -- full queues


class FullUpstream:
    """A unix listener whose queue is full until :meth:`open`."""

    def __init__(self, path: str) -> None:
        self.target = f"unix:{path}"
        self.listener = listen_unix(path, backlog=0)
        self._fillers: list[socket.socket] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                filler = socket.socket(socket.AF_UNIX)
                self._fillers.append(filler)
                filler.setblocking(False)
                filler.connect(path)

    def open(self) -> None:
        """Empty the queue."""
        for _ in self._fillers[1:]:
            accept(self.listener).close()

    def close(self) -> None:
        """Close everything."""
        for sock in (*self._fillers, self.listener):
            sock.close()


@pytest.fixture
def full(tmp_path: Path) -> Iterator[FullUpstream]:
    """See :class:`FullUpstream`."""
    upstream = FullUpstream(str(tmp_path / "up.sock"))
    yield upstream
    upstream.close()


def one_rule(listen_at: tuple[str, int], upstreams: list[str], path: Path, more: str) -> list[str]:
    path.write_text(
        '[[forwarding_rules]]\nlisten = "{}:{}"\n'.format(*listen_at)
        + f"upstream = {upstreams}\n{more}\n"
    )
    return ["-c", str(path), "--workers", "1"]


def assert_reset(address: tuple[str, int]) -> None:
    """A client that is reset without a byte; connect() itself may see it already."""
    with contextlib.suppress(ConnectionResetError), connect(address) as client:
        assert receive_to_reset(client) == b""


def test_a_full_queue_is_tried_again_until_it_has_room(
    start_forwarder: StartForwarder, full: FullUpstream, tmp_path: Path
) -> None:
    """A connect to it fails at once, and no event tells when it would not (connect(2))."""
    with ExitStack() as stack:
        address = stack.enter_context(reserve_port()).getsockname()
        it = start_forwarder(*one_rule(address, [full.target], tmp_path / "a.toml", ""))
        client = stack.enter_context(connect(address))
        client.sendall(b"early")
        (worker,) = it.workers()
        eventually(
            lambda: sockdiag.states(worker).count(sockdiag.ESTABLISHED) == 1, "it is accepted"
        )
        full.open()
        far = stack.enter_context(accept(full.listener))
        assert receive_exactly(far, 5) == b"early"
        carry(far, client, b"answer")


@pytest.mark.expects_log("connect.failed .* Connection timed out")
def test_a_queue_that_stays_full_is_given_up_in_time(
    start_forwarder: StartForwarder, full: FullUpstream, tmp_path: Path
) -> None:
    more = 'connect_timeout = "300ms"'
    with ExitStack() as stack:
        address = stack.enter_context(reserve_port()).getsockname()
        start_forwarder(*one_rule(address, [full.target], tmp_path / "a.toml", more))
        assert_reset(address)


@pytest.mark.expects_log("upstream.failed .*unix:")
def test_another_upstream_is_tried_when_a_queue_stays_full(
    start_forwarder: StartForwarder, full: FullUpstream, tmp_path: Path
) -> None:
    more = 'connect_timeout = "300ms"'
    with ExitStack() as stack:
        other = stack.enter_context(listen())
        address = stack.enter_context(reserve_port()).getsockname()
        upstreams = [full.target, "{}:{}".format(*other.getsockname())]
        start_forwarder(*one_rule(address, upstreams, tmp_path / "a.toml", more))
        client = stack.enter_context(connect(address))
        far = stack.enter_context(accept(other))
        carry(client, far, b"there")


@pytest.mark.expects_log("connect.failed .*unix:.*No such file", "connect.failed .*refused")
def test_an_upstream_that_is_not_there_resets_the_client_and_is_found_when_it_is(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    """First without a file, then with one that nobody serves, then served."""
    path = str(tmp_path / "up.sock")
    with ExitStack() as stack:
        one = stack.enter_context(reserve_port()).getsockname()
        two = stack.enter_context(reserve_port()).getsockname()
        start_forwarder(
            *("-l", "{}:{}".format(*one), "-r", f"unix:{path}"),
            *("-l", "{}:{}".format(*two), "-r", f"unix:{path}", "--workers", "1"),
        )
        assert_reset(one)
        listen_unix(path).close()
        assert_reset(two)
        (tmp_path / "up.sock").unlink()
        upstream = stack.enter_context(listen_unix(path))
        for address in (one, two):
            client = stack.enter_context(connect(address))
            link = Link(client, stack.enter_context(accept(upstream)))
            carry(link.client, link.upstream, b"there")


def test_a_client_of_a_unix_socket_is_called_so_in_the_log(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    """One that has bound a name of its own, too, which nobody checks."""
    path = str(tmp_path / "in.sock")
    with listen() as upstream, socket.socket(socket.AF_UNIX) as named:
        target = "{}:{}".format(*upstream.getsockname())
        it = start_forwarder("-v", "-l", f"unix:{path}", "-r", target, "--workers", "1")
        named.bind(str(tmp_path / "client.sock"))
        named.connect(path)
        accept(upstream).close()
        named.close()
        it.wait_logged(rf"session.closed .* client=unix upstream={target} ")
