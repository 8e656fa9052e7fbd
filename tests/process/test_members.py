"""Names that stand for several servers, which a real name server has: expanded names, services."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING

import pytest
from support import control
from support.echo import Echo
from support.ends import be_reset, connect
from support.grouped import Client
from support.namespaces import Namespace, needs_network
from support.processes import run_command
from support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.forwarder import Forwarder

    from process.conftest import Launch

pytestmark = [pytest.mark.process, needs_network]

NAME = "web.test"
SERVICE = "_web._tcp.test"
LISTEN = ("127.0.0.1", 8000)
PORT = 9000
HOSTS = {"a": "127.0.0.2", "b": "127.0.0.3", "c": "127.0.0.4", "d": "127.0.0.5"}
NOBODY = "127.0.0.9"
A, B, C, D = (f"{host}.test:{PORT}" for host in HOSTS)
# The TTL is 2 s; far below the 30 s after which a name of no known TTL is looked up.
WITHIN_S = 20.0


class Site:
    """A name server, servers that say who they are, and a forwarder of one rule to some of them."""

    def __init__(self, launch: Launch, directory: Path, stack: ExitStack) -> None:
        self.space = stack.enter_context(Namespace())
        self._launch = launch
        self._stack = stack
        self.ttl_s = 2
        self._hosts = directory / "hosts"
        self._config = directory / "forwarder.toml"
        self.control = directory / "control.sock"
        resolv = directory / "resolv.conf"
        resolv.write_text("nameserver 127.0.0.1\n")
        bind = f'mount --bind {resolv} /etc/resolv.conf && exec "$@"'
        self._prefix = [*self.space.prefix, "unshare", "--mount", "sh", "-c", bind, "sh"]
        places = [(host, PORT) for host in HOSTS.values()]
        stack.enter_context(self.space.call(partial(Echo, tcp=places, udp=places)))
        self._dnsmasq: subprocess.Popen[bytes] | None = None
        stack.callback(self.end_dnsmasq)

    # -- the name server

    def lead_to(self, *hosts: str) -> None:
        """Have a name server whose expanded name has the addresses of these hosts."""
        lines = [f"{HOSTS.get(host, host)} {NAME}\n" for host in hosts]
        lines += [f"{address} {host}.test\n" for host, address in HOSTS.items()]
        self._hosts.write_text("".join(lines))
        if self._dnsmasq is None:
            self.have()
        self.signal(signal.SIGHUP)

    def have(self, *records: str) -> None:
        """Have a name server with these records of the service: TARGET,PRIORITY,WEIGHT."""
        self.end_dnsmasq()
        lines = [f"{address} {host}.test\n" for host, address in HOSTS.items()]
        if not self._hosts.exists():
            self._hosts.write_text("".join(lines))
        services = []
        for record in records:
            target, _, rest = record.partition(",")
            port = f"{target}.test,{PORT},{rest}" if target else ""
            services.append(f"--srv-host={SERVICE},{port}".rstrip(","))
        self._dnsmasq = subprocess.Popen(
            [
                *(*self.space.prefix, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null"),
                *("--pid-file=", "--no-resolv", "--no-hosts", "--user=root", "--group=root"),
                *("--listen-address=127.0.0.1", "--bind-interfaces", f"--local-ttl={self.ttl_s}"),
                *(f"--addn-hosts={self._hosts}", "--local=/test/", *services),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        eventually(self._answers, "dnsmasq does not answer")

    def _answers(self) -> bool:
        command = [*self.space.prefix, "dig", "@127.0.0.1", "+short", "+tries=1", "+time=1"]
        done = subprocess.run([*command, "a.test"], capture_output=True, check=False)
        return done.stdout.strip() == HOSTS["a"].encode()

    def signal(self, number: signal.Signals) -> None:
        """Send the name server a signal."""
        assert self._dnsmasq is not None
        self._dnsmasq.send_signal(number)

    def end_dnsmasq(self) -> None:
        """Have no name server."""
        if self._dnsmasq is not None:
            self._dnsmasq.kill()
            self._dnsmasq.wait()
            self._dnsmasq = None

    # -- the forwarder

    def write(self, upstream: str, more: str = "", head: str = "") -> None:
        """Write the configuration."""
        self._config.write_text(
            f'workers = 2\ncontrol = "{self.control}"\n{head}\n'
            f'[[forwarding_rules]]\nname = "web"\nlisten = "{LISTEN[0]}:{LISTEN[1]}"\n'
            f"upstream = {upstream}\n{more}\n"
        )

    def start(self, upstream: str, more: str = "", head: str = "") -> Forwarder:
        """Start a forwarder."""
        self.write(upstream, more, head)
        # The socket for notifications is not in its namespace.
        forwarder = self._launch("-c", str(self._config), prefix=self._prefix, expect_ready=False)
        forwarder.wait_logged("master.ready")
        return forwarder

    def run(self, *arguments: str) -> str:
        """Run a command that asks the forwarder, which must succeed."""
        done = run_command(*arguments, "--control", str(self.control))
        assert done.returncode == 0, done.stderr
        return done.stdout

    def session(self) -> Client:
        """Open a session, and hear which server it is with."""
        return Client(self._stack.enter_context(self.space.call(partial(connect, LISTEN))))

    def flow(self) -> socket.socket:
        """A client of UDP."""

        def connected() -> socket.socket:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.settimeout(PATIENCE_S)
            sock.connect(LISTEN)
            return sock

        return self.space.call(connected)

    def asked(self, client: socket.socket) -> str:
        """The server that answers a client of UDP."""
        client.send(b"hello")
        return client.recv(1000).decode().partition(" ")[0]

    def servers(self) -> dict[str, dict[str, object]]:
        """The servers of the group, as in the status; without those that only have an order."""
        groups = control.ask(self.control, "status")["groups"]
        assert isinstance(groups, list)
        (group,) = groups
        return {one["server"]: one for one in group["servers"] if one["state"] != "absent"}

    def wait_for(self, *servers: str) -> None:
        """Wait until these are the servers; workers hear of it a moment later."""
        expected = set(servers)
        eventually(lambda: set(self.servers()) == expected, within_s=WITHIN_S)

    def wait_seen(self, *hosts: str) -> None:
        """Wait until new sessions get these servers, and no others."""
        expected = set(addresses(*hosts))
        eventually(lambda: {self.session().server for _ in range(8)} == expected)


def addresses(*hosts: str) -> list[str]:
    return [f"{HOSTS[host]}:{PORT}" for host in hosts]


@pytest.fixture
def site(launch: Launch, tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(launch, tmp_path, stack)


def generation(site: Site) -> object:
    return control.ask(site.control, "status")["generation"]


EXPANDED = f'{{ at = "{NAME}:{PORT}", expand = true }}'


def test_addresses_of_a_name_come_and_go_and_sessions_and_orders_stay(site: Site) -> None:
    site.lead_to("a", "b")
    # Sessions of rules that change are ended after that; members that move change no rule.
    site.start(EXPANDED, head='drain_timeout = "100ms"')
    site.wait_for(*addresses("a", "b"))
    clients = [site.session() for _ in range(4)]
    assert {one.server for one in clients} == set(addresses("a", "b"))
    site.run("upstream", "drain", "web", *addresses("b"))
    site.lead_to("b", "c")
    site.wait_for(*addresses("b", "c"))
    site.wait_seen("c")
    assert [one.ask() for one in clients] == [one.server for one in clients]
    site.lead_to("a", "b", "c")
    site.wait_for(*addresses("a", "b", "c"))
    found = site.servers()
    assert found[addresses("a")[0]]["sessions"] == 2
    assert found[addresses("b")[0]]["order"] is not None
    assert [one.ask() for one in clients] == [one.server for one in clients]
    assert generation(site) == 1


def test_a_reload_of_the_same_file_changes_nothing_though_members_have_moved(site: Site) -> None:
    site.lead_to("a")
    forwarder = site.start(EXPANDED)
    site.wait_for(*addresses("a"))
    client = site.session()
    site.lead_to("b")
    site.wait_for(*addresses("b"))
    site.run("reload")
    forwarder.wait_logged(r"master.reloaded \+0 -0 ~0 =1 rules")
    assert set(site.servers()) == set(addresses("b"))
    site.wait_seen("b")
    assert client.ask() == client.server


def test_records_of_the_lowest_priority_serve_and_others_when_these_are_gone(site: Site) -> None:
    site.have("a,10,1", "b,10,3", "c,20,1")
    site.start(f'"srv:{SERVICE}"')
    site.wait_for(A, B, C)
    shown = {
        name: (one["weight"], one["backup"], one["of"]) for name, one in site.servers().items()
    }
    of = f"srv:{SERVICE}"
    assert shown == {A: (1, False, of), B: (3, False, of), C: (1, True, of)}
    site.wait_seen("a", "b")
    client = site.session()
    site.have("d,30,1", "c,20,1")
    site.wait_for(C, D)
    site.wait_seen("c")
    assert client.ask() == client.server


def test_a_service_that_is_no_more_has_no_servers(site: Site) -> None:
    site.have("a,1,1")
    forwarder = site.start(f'"srv:{SERVICE}"')
    site.wait_for(A)
    client = site.session()
    site.have("")
    forwarder.wait_logged(f"name.failed host=srv:{SERVICE} .*not available")
    site.wait_for(f"srv:{SERVICE}")
    site.space.call(partial(be_reset, LISTEN))
    assert client.ask() == client.server
    site.have("b,1,1")
    site.wait_for(B)
    site.wait_seen("b")


def test_members_serve_without_a_name_server_also_over_a_reload_and_an_upgrade(site: Site) -> None:
    site.have("a,1,1", "b,1,1")
    forwarder = site.start(f'"srv:{SERVICE}"')
    site.wait_for(A, B)
    clients = [site.session() for _ in range(2)]
    site.signal(signal.SIGSTOP)
    forwarder.wait_logged(f"name.failed host=srv:{SERVICE} ")
    site.wait_seen("a", "b")
    site.write(f'"srv:{SERVICE}"', 'balance = "least"')
    site.run("reload")
    assert set(site.servers()) == {A, B}
    site.run("upgrade")
    assert set(site.servers()) == {A, B}
    site.wait_seen("a", "b")
    assert [one.ask() for one in clients] == [one.server for one in clients]
    site.signal(signal.SIGCONT)
    site.have("c,1,1")
    site.wait_for(C)
    site.wait_seen("c")


@pytest.mark.parametrize("upstream", [EXPANDED, f'"srv:{SERVICE}"'])
def test_a_session_waits_for_the_first_answer(site: Site, upstream: str) -> None:
    site.lead_to("a")
    site.have("a,1,1")
    site.signal(signal.SIGSTOP)
    site.start(upstream, 'connect_timeout = "30s"')
    with ExitStack() as stack:
        sock = stack.enter_context(site.space.call(partial(connect, LISTEN)))
        eventually(lambda: "resolving" in site.run("sessions"))
        site.signal(signal.SIGCONT)
        assert Client(sock).server in addresses("a")


def test_what_a_check_has_found_stays_where_others_come_and_go(site: Site) -> None:
    site.have("a,1,1", "b,1,1")
    # They do not speak HTTP.
    check = '[forwarding_rules.check]\nkind = "http"\npath = "/"\nevery = "100ms"\nfall = 1\n'
    site.start(f'"srv:{SERVICE}"', check)
    site.wait_for(A, B)
    eventually(lambda: states(site) == {A: "down", B: "down"}, within_s=WITHIN_S)
    failed = site.servers()[A]["checks_failed"]
    site.have("a,1,1", "c,1,1")
    site.wait_for(A, C)
    eventually(lambda: states(site)[C] == "down", within_s=WITHIN_S)
    found = site.servers()[A]
    assert found["state"] == "down"
    assert int(str(found["checks_failed"])) >= int(str(failed))


def states(site: Site) -> dict[str, object]:
    return {name: one["state"] for name, one in site.servers().items()}


def test_when_the_checker_dies_the_members_stay_and_the_next_one_follows_them(site: Site) -> None:
    site.have("a,1,1", "b,1,1")
    forwarder = site.start(f'"srv:{SERVICE}"')
    site.wait_for(A, B)
    (pid,) = forwarder.helpers()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: forwarder.helpers() not in ([], [pid]))
    assert set(site.servers()) == {A, B}
    site.wait_seen("a", "b")
    site.have("c,1,1")
    site.wait_for(C)
    site.wait_seen("c")


def test_flows_stay_and_new_ones_go_to_the_servers_of_now(site: Site) -> None:
    site.lead_to("a")
    site.start(EXPANDED, 'protocol = "udp"')
    site.wait_for(*addresses("a"))
    with ExitStack() as stack:
        first = stack.enter_context(site.flow())
        assert site.asked(first) in addresses("a")
        site.lead_to("b")
        site.wait_for(*addresses("b"))

        def goes_to_the_new_one() -> bool:
            with site.flow() as other:
                return site.asked(other) in addresses("b")

        eventually(goes_to_the_new_one)
        assert site.asked(first) in addresses("a")


def test_sessions_from_before_a_move_end_when_their_rule_is_changed(site: Site) -> None:
    head = 'drain_timeout = "100ms"'
    site.lead_to("a")
    site.start(EXPANDED, head=head)
    site.wait_for(*addresses("a"))
    client = site.session()
    for host in ("b", "c"):
        site.lead_to(host)
        site.wait_for(*addresses(host))
        site.wait_seen(host)
    assert client.ask() == client.server
    site.write(EXPANDED, 'connect_timeout = "9s"', head)
    site.run("reload")
    eventually(client.is_cut)


def test_where_members_cannot_be_connected_to_the_name_is_looked_up_before_its_time(
    site: Site,
) -> None:
    site.ttl_s = 3600
    site.lead_to(NOBODY)
    site.start(EXPANDED)
    site.wait_for(f"{NOBODY}:{PORT}")
    site.lead_to("a")

    def reaches() -> bool:
        with suppress(ConnectionError):
            return site.session().server in addresses("a")
        return False

    eventually(reaches, within_s=WITHIN_S)
