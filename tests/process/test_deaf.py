"""Listeners that nobody can reach any more: their interface or their file has gone."""

from __future__ import annotations

import json
import selectors
import signal
import socket
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from support.configured import Configured
from support.datagrams import udp
from support.ends import accept, carry, connect, listen, listen_unix
from support.namespaces import Namespace, join, needs_network
from support.processes import run_command
from support.waiting import eventually

from forwarder.serving.retries import Retries
from forwarder.serving.surroundings import Surroundings
from process.conftest import stop

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from process.conftest import Launch

pytestmark = pytest.mark.process

RULE = '[[forwarding_rules]]\nname = "{}"\nlisten = "{}"\nupstream = "127.0.0.1:{}"\n{}\n'


class Sites:
    """Two hosts with a cable between them; on one of them runs a forwarder."""

    def __init__(self, launch: Launch, directory: Path, stack: ExitStack) -> None:
        self._launch = launch
        self.path = directory / "forwarder.toml"
        self.control = directory / "control.sock"
        self.here = stack.enter_context(Namespace())
        self.there = stack.enter_context(Namespace())
        self.lay_cable()
        self.upstream = stack.enter_context(self.here.call(lambda: listen("127.0.0.1", 9000)))
        self.datagrams = stack.enter_context(self.here.call(lambda: udp("127.0.0.1", 9000)))

    def lay_cable(self) -> None:
        """Interfaces va here and vb there, with addresses."""
        join(self.here, self.there, ("va", "vb"))
        for site, name, number in ((self.here, "va", 1), (self.there, "vb", 2)):
            site.ip(f"address add 10.9.0.{number}/24 dev {name}")
            site.ip(f"address add fe80::{number}/64 dev {name} nodad")

    def cut_cable(self) -> None:
        """Both interfaces are gone; the next ones have other indexes."""
        self.here.ip("link del va")
        self.here.ip("link add spare type veth peer name other", "link del spare")

    def text(self, *more: str) -> str:
        """Rules on the interface, and one that is not concerned."""
        return f'workers = 2\ncontrol = "{self.control}"\n' + "".join(
            (
                RULE.format("device", "0.0.0.0:5300", 9000, 'device = "va"'),
                RULE.format("local", "[fe80::1%va]:5301", 9000, ""),
                RULE.format("udp", "0.0.0.0:5302", 9000, 'device = "va"\nprotocol = "udp"'),
                RULE.format("other", "0.0.0.0:5303", 9000, ""),
                *more,
            )
        )

    def start(self) -> Configured:
        """Start."""
        self.path.write_text(self.text())
        it = self._launch("-c", str(self.path), prefix=self.here.prefix, expect_ready=False)
        it.wait_logged("master.ready")
        return Configured(it, self.path)

    def states(self) -> dict[str, str]:
        """Of each rule, as in ``forwarder status --json``."""
        done = run_command("status", "--json", "--control", str(self.control))
        rules: list[dict[str, Any]] = json.loads(done.stdout)["rules"]
        return {rule["name"]: rule["state"] for rule in rules}

    def assert_serves_all(self) -> None:
        """Each rule has clients from the other host."""
        index = self.there.call(lambda: socket.if_nametoindex("vb"))
        for address in (("10.9.0.1", 5300), ("fe80::1", 5301, 0, index), ("10.9.0.1", 5303)):
            with self.there.call(partial(reach, address)) as client, accept(self.upstream) as far:
                carry(client, far, b"there")
        with self.there.call(lambda: udp("0.0.0.0")) as client:
            for _ in range(3):  # the second one settles the flow
                client.sendto(b"question", ("10.9.0.1", 5302))
                data, flow = self.datagrams.recvfrom(100)
                self.datagrams.sendto(data + b"!", flow)
                assert client.recvfrom(100)[0] == b"question!"


def reach(address: tuple[Any, ...]) -> socket.socket:
    """Connect, with patience."""
    sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    sock.settimeout(20)
    sock.connect(address)
    return sock


@pytest.fixture
def sites(launch: Launch, tmp_path: Path) -> Iterator[Sites]:
    """See :class:`Sites`."""
    with ExitStack() as stack:
        yield Sites(launch, tmp_path, stack)


@needs_network
def test_listeners_of_an_interface_that_is_made_anew_listen_again(sites: Sites) -> None:
    """Twice. Result: seen in the status meanwhile, served afterwards, no worker concerned."""
    it = sites.start()
    sites.assert_serves_all()
    workers = it.forwarder.workers()
    listening = dict.fromkeys(("device", "local", "udp", "other"), "listening")
    gone = listening | dict.fromkeys(("device", "local", "udp"), "waiting")
    for _ in range(2):
        sites.cut_cable()
        eventually(lambda: sites.states() == gone, lambda: str(sites.states()))
        sites.lay_cable()
        eventually(lambda: sites.states() == listening, lambda: str(sites.states()))
        sites.assert_serves_all()
    it.forwarder.wait_logged("bind.lost rule=device .* the network interface va has gone")
    assert it.forwarder.workers() == workers
    assert stop(it.forwarder, signal.SIGTERM) == 0


@needs_network
def test_while_an_interface_is_gone_other_rules_come_and_go(sites: Sites) -> None:
    """Result: the reload is not refused for the sake of those that wait anyway."""
    it = sites.start()
    sites.cut_cable()
    eventually(lambda: "waiting" in sites.states().values())
    more = RULE.format("more", "127.0.0.1:5304", 9000, "")
    assert "+1 -0 ~0 =4" in it.reload(sites.text(more))
    assert sites.states()["more"] == "listening"
    wrong = RULE.format("wrong", "[fe80::1%nowhere]:5305", 9000, "")
    assert "stays in force" in it.reload(sites.text(wrong))
    it.forwarder.wait_logged("there is no network interface 'nowhere' now")
    sites.lay_cable()
    eventually(lambda: set(sites.states().values()) == {"listening"})
    sites.assert_serves_all()
    assert stop(it.forwarder, signal.SIGTERM) == 0


@needs_network
def test_an_interface_that_changes_its_name_is_left_alone(sites: Sites) -> None:
    it = sites.start()
    sites.here.ip("link set va down", "link set va name vx", "link set vx up")
    sites.here.ip("address add fe80::1/64 dev vx nodad")  # it went with the interface going down
    sites.there.ip("address replace fe80::2/64 dev vb nodad")
    sites.assert_serves_all()
    assert set(sites.states().values()) == {"listening"}
    assert stop(it.forwarder, signal.SIGTERM) == 0


class Affected:
    """A service that waits for an address."""

    can_go_deaf = False

    def __init__(self) -> None:
        self.retries = Retries()
        self.retries.on_failure("rule", "why", 100.0)

    def look_around(self, now: float) -> bool:
        return now < 0


@needs_network
@pytest.mark.parametrize(
    ("change", "back"),
    [
        ("address add 10.1.1.1/32 dev lo", "address del 10.1.1.1/32 dev lo"),
        ("address add fd01::1/128 dev lo", "address del fd01::1/128 dev lo"),
        ("link set lo mtu 1500", "link set lo mtu 2000"),
    ],
)
def test_the_kernel_tells_of_what_has_appeared(change: str, back: str) -> None:
    """Result: what waits is tried at once, and not more than once a second."""
    service = Affected()
    with Namespace() as there, selectors.DefaultSelector() as selector:
        surroundings = there.call(
            lambda: Surroundings(service, selector, lambda: True, lambda: None)
        )
        surroundings.turn(100.0)
        assert service.retries.deadline == 101.0
        for now, expected in ((100.1, 100.1), (100.2, 100.1 + 1)):
            there.ip(change)
            for key, _ in selector.select(20):
                key.data()
            surroundings.turn(now)
            assert service.retries.deadline == pytest.approx(expected)
            there.ip(back)
            for key, _ in selector.select(20):
                key.data()
            surroundings.turn(now)
            service.retries.on_failure("rule", "why", now)
        surroundings.close()


# -- files of unix sockets


@pytest.fixture
def unix(launch: Launch, tmp_path: Path) -> Iterator[tuple[Configured, Path, socket.socket]]:
    """A forwarder that listens at a path, and its upstream."""
    directory = tmp_path / "sub"
    directory.mkdir()
    path, where = tmp_path / "forwarder.toml", directory / "in.sock"
    with listen() as upstream:
        path.write_text(
            f'workers = 2\ncontrol = "{tmp_path}/control.sock"\n'
            + RULE.format("unix", f"unix:{where}", upstream.getsockname()[1], 'mode = "0600"')
        )
        it = Configured(launch("-c", str(path)), path)
        yield it, where, upstream
        assert stop(it.forwarder, signal.SIGTERM) == 0


def assert_serves(where: Path, upstream: socket.socket) -> None:
    with connect(str(where)) as client, accept(upstream) as far:
        carry(client, far, b"there")


def test_a_unix_socket_whose_file_was_deleted_listens_again(
    unix: tuple[Configured, Path, socket.socket],
) -> None:
    """Sessions go on. Result: the same path, the same permissions."""
    it, where, upstream = unix
    with connect(str(where)) as client, accept(upstream) as far:
        where.unlink()
        it.forwarder.wait_logged("bind.lost rule=unix .* its file has gone")
        it.forwarder.wait_logged("bind.done rule=unix ")
        assert where.stat().st_mode & 0o777 == 0o600
        assert_serves(where, upstream)
        carry(client, far, b"still")


def test_a_unix_socket_whose_file_is_another_programs_waits_for_it(
    unix: tuple[Configured, Path, socket.socket],
) -> None:
    it, where, upstream = unix
    where.unlink()
    with listen_unix(str(where)) as other:
        it.forwarder.wait_logged("bind.lost rule=unix ")
        with connect(str(where)), accept(other):
            pass
    it.forwarder.wait_logged("bind.done rule=unix ")
    assert_serves(where, upstream)


def test_a_unix_socket_whose_directory_was_deleted_waits_for_it(
    unix: tuple[Configured, Path, socket.socket],
) -> None:
    it, where, upstream = unix
    where.unlink()
    where.parent.rmdir()
    it.forwarder.wait_logged("bind.lost rule=unix ")
    where.parent.mkdir()
    it.forwarder.wait_logged("bind.done rule=unix ")
    assert_serves(where, upstream)
