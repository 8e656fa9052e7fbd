"""Addresses of interfaces that are not there: a state of their upstream, and of nothing else."""

from __future__ import annotations

import itertools
import select
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from support.control import ask
from support.datagrams import drain, udp, udp_client
from support.ends import accept, be_reset, carry, connect, listen
from support.namespaces import Namespace, join, needs_network
from support.processes import run_command
from support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.forwarder import Forwarder

    from process.conftest import Launch

pytestmark = [pytest.mark.process, needs_network]
PORT, GOOD, ZONED = 7000, 7001, 7002


def listen_there() -> socket.socket:
    """What answers at the other end."""
    sock = socket.socket(socket.AF_INET6)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"u0")
    sock.bind(("::", PORT))
    sock.listen()
    sock.settimeout(PATIENCE_S)
    return sock


class Site:
    """A forwarder in a namespace whose interface ``wg0`` comes and goes, and the other end."""

    def __init__(self, here: Namespace, there: Namespace, path: Path, launch: Launch) -> None:
        self.here, self.there = here, there
        self.path = path
        self.control = path.with_name("control")
        self._launch = launch

    def plug(self) -> None:
        """Make the interface, anew."""
        join(self.here, self.there, ("wg0", "u0"))
        for network in ("fe80::", "2001:db8::"):
            self.here.ip(f"addr add {network}2/64 dev wg0 nodad")
            self.there.ip(f"addr add {network}1/64 dev u0 nodad")

    def unplug(self) -> None:
        """Remove it; the next one will have another index."""
        self.here.ip("link del wg0")
        self.here.ip("link add other type veth peer name another", "link del other")

    def write(self, zoned: str) -> None:
        """A rule that works whatever happens, and one with ``zoned``, if there is one."""
        text = f'workers = 2\n[[forwarding_rules]]\nname = "good"\nlisten = "127.0.0.1:{GOOD}"\n'
        text += f'upstream = "127.0.0.1:{PORT}"\n'
        if zoned:
            text += f'[[forwarding_rules]]\nname = "zoned"\nlisten = "127.0.0.1:{ZONED}"\n{zoned}\n'
        self.path.write_text(text)

    def start(self, zoned: str) -> Forwarder:
        """Start it, with the interface or without."""
        self.write(zoned)
        it = self._launch(
            *("-c", str(self.path), "--control", str(self.control)),
            prefix=self.here.prefix,
            expect_ready=False,
        )
        it.wait_logged(r"master\.ready")
        return it

    def serves(self, port: int, server: Namespace, listening: Callable[[], socket.socket]) -> None:
        """A session of a rule gets through."""
        with (
            server.call(listening) as listener,
            self.here.call(partial(connect, ("127.0.0.1", port))) as client,
            accept(listener) as far,
        ):
            carry(client, far, b"there")

    def good(self) -> None:
        """The rule that has nothing to do with the interface works."""
        self.serves(GOOD, self.here, partial(listen, port=PORT))

    def zoned(self) -> dict[str, Any]:
        """The other rule, as in the status."""
        rules = ask(self.control, "status")["rules"]
        assert isinstance(rules, list)
        (rule,) = (rule for rule in rules if rule["name"] == "zoned")
        assert isinstance(rule, dict)
        return rule

    def dropped(self) -> int:
        """Datagrams that were dropped so far, of all rules."""
        totals = ask(self.control, "status")["totals"]
        assert isinstance(totals, dict)
        return int(totals["datagrams_dropped"])

    def drops_from(self, client: socket.socket) -> None:
        """What a client sends is dropped, and counted."""
        before = self.dropped()
        client.send(b"lost")
        eventually(lambda: self.dropped() > before)

    def failing(self) -> list[str]:
        """What fails of the other rule."""
        return [f"{one['upstream']}: {one['why']}" for one in self.zoned()["failing"]]


@pytest.fixture
def site(tmp_path: Path, launch: Launch) -> Iterator[Site]:
    with Namespace() as here, Namespace() as there:
        yield Site(here, there, tmp_path / "forwarder.toml", launch)


SIX = f'upstream = "[::1]:{PORT}"'
UPSTREAM = f'upstream = "[fe80::1%wg0]:{PORT}"'
EVERY_WAY = pytest.mark.parametrize(
    ("zoned", "what"),
    [
        (UPSTREAM, f"[fe80::1%wg0]:{PORT}"),
        (f'upstream = ["[fe80::1%wg0]:{PORT}", "127.0.0.1:1"]', f"[fe80::1%wg0]:{PORT}"),
        (
            f'source_address = "fe80::2%wg0"\nupstream = "[::1]:{PORT}"',
            "source_address fe80::2%wg0",
        ),
        (f'upstream_device = "wg0"\n{SIX}', "upstream_device wg0"),
        (f'protocol = "udp"\nupstream_device = "wg0"\n{SIX}', "upstream_device wg0"),
        (f'protocol = "udp"\n{UPSTREAM}', f"[fe80::1%wg0]:{PORT}"),
        (f'protocol = "udptotcp"\n{UPSTREAM}', f"[fe80::1%wg0]:{PORT}"),
        (f'protocol = "tcptoudp"\n{UPSTREAM}', f"[fe80::1%wg0]:{PORT}"),
        (f'upstream = "[2001:db8::1%wg0]:{PORT}"', f"[2001:db8::1%wg0]:{PORT}"),
    ],
    ids=[
        *("upstream", "list", "source", "device", "udp by device"),
        *("udp", "udptotcp", "tcptoudp", "not link-local"),
    ],
)


@EVERY_WAY
@pytest.mark.expects_log("upstream.failed .*there is no interface wg0")
def test_an_absent_interface_is_a_state_of_its_upstream(site: Site, zoned: str, what: str) -> None:
    """At the start and in a reload. *Result*: the other rule works, and the status says which."""
    it = site.start(zoned)
    workers = sorted(it.workers())
    eventually(lambda: site.failing() == [f"{what}: there is no interface wg0"])
    site.good()
    site.write("")
    assert ask(site.control, "reload")["ok"]
    site.write(zoned)
    assert ask(site.control, "reload")["ok"]
    eventually(lambda: site.failing() == [f"{what}: there is no interface wg0"])
    site.good()
    assert sorted(it.workers()) == workers


@pytest.mark.expects_log("upstream.failed", "connect.failed")
@pytest.mark.parametrize(
    ("zoned", "what"),
    [
        (UPSTREAM, f"[fe80::1%wg0]:{PORT}"),
        (f'upstream_device = "wg0"\nupstream = "[2001:db8::1]:{PORT}"', "upstream_device wg0"),
    ],
    ids=["zone", "device"],
)
def test_an_interface_that_comes_goes_and_comes_back_is_noticed(
    site: Site, zoned: str, what: str
) -> None:
    """Each time with another index, for others are made as well."""
    missing = f"{what}: there is no interface wg0"
    site.start(zoned)
    site.here.call(partial(be_reset, ("127.0.0.1", ZONED)))
    for _ in range(3):
        site.plug()
        site.serves(ZONED, site.there, listen_there)
        eventually(lambda: missing not in site.failing())
        site.unplug()
        eventually(lambda: missing in site.failing())
        site.good()


DEVICE = f'upstream_device = "wg0"\nupstream = "[2001:db8::1]:{PORT}"'


@pytest.mark.expects_log("upstream.failed")
@pytest.mark.parametrize("is_silent", [False, True], ids=["asks meanwhile", "silent meanwhile"])
@pytest.mark.parametrize(
    ("zoned", "what", "dial"),
    [
        (f'protocol = "udp"\n{UPSTREAM}', f"[fe80::1%wg0]:{PORT}", udp_client),
        (f'protocol = "udp"\n{DEVICE}', "upstream_device wg0", udp_client),
        (f'protocol = "tcptoudp"\n{UPSTREAM}', f"[fe80::1%wg0]:{PORT}", connect),
        (f'protocol = "tcptoudp"\n{DEVICE}', "upstream_device wg0", connect),
        (
            f'protocol = "udp"\nsource_address = "fe80::2%wg0"\n{UPSTREAM}',
            "source_address fe80::2%wg0",
            udp_client,
        ),
    ],
    ids=["zone", "device", "tcptoudp by zone", "tcptoudp by device", "source"],
)
def test_a_flow_goes_on_through_an_interface_that_was_made_anew(
    site: Site,
    zoned: str,
    what: str,
    dial: Callable[[tuple[str, int]], socket.socket],
    is_silent: bool,
) -> None:
    """Each time with another index. What its client sends while there is none is dropped."""
    missing = f"{what}: there is no interface wg0"
    site.plug()
    site.start(zoned)
    numbers = itertools.count()
    with (
        site.there.call(partial(udp, "::", PORT)) as server,
        site.here.call(partial(dial, ("127.0.0.1", ZONED))) as client,
    ):

        def is_answered() -> bool:
            question = b"question %d" % next(numbers)
            client.send(question)
            while select.select([server], [], [], 0.2)[0]:
                content, source = server.recvfrom(100)
                if content == question:
                    server.sendto(content, source)
                    return client.recv(100) == content
            return False

        eventually(is_answered)
        for _ in range(2):
            site.unplug()
            eventually(lambda: missing in site.failing())
            if not is_silent:
                site.drops_from(client)
            site.plug()
            eventually(lambda: missing not in site.failing())
            eventually(is_answered)
        assert site.zoned()["sessions_total"] == 1
        assert drain(client) == []
        eventually(lambda: site.failing() == [])


@pytest.mark.parametrize(
    ("zoned", "what"),
    [
        (UPSTREAM, f"upstream [fe80::1%wg0]:{PORT}"),
        (f'source_address = "fe80::2%wg0"\n{SIX}', "source_address fe80::2%wg0"),
        (f'upstream_device = "wg0"\n{SIX}', "upstream_device wg0"),
    ],
    ids=["upstream", "source", "device"],
)
def test_check_warns_of_an_interface_that_is_not_there(site: Site, zoned: str, what: str) -> None:
    site.write(zoned)
    done = run_command("check", str(site.path), prefix=site.here.prefix)
    assert done.returncode == 0
    assert f"{what}: there is no interface wg0 now; hint: it is waited for" in done.stderr
    site.plug()
    assert run_command("check", str(site.path), prefix=site.here.prefix).stderr == ""


@pytest.mark.expects_log("upstream.failed")
def test_the_status_tells_people_what_cannot_be_used(site: Site) -> None:
    site.start(UPSTREAM)
    eventually(lambda: site.failing() != [])
    done = run_command("status", "--control", str(site.control))
    assert f"rule zoned: [fe80::1%wg0]:{PORT} cannot be used for" in done.stdout
    assert "there is no interface wg0" in done.stdout
