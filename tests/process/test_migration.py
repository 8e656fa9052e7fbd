"""docs/migration: the configurations of each page forward alike in the old program and in ours.

Both run with what stands in the page, with the ports that stand there, in a network of their own.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import pytest
from support.echo import Echo, ask_tcp, ask_udp
from support.ends import connect
from support.namespaces import needs_network, network
from support.pages import DOCS, blocks, commands, file_block, placed
from support.processes import run_command
from support.programs import debian
from support.waiting import eventually

from bench.peers import NGINX_HEAD, nginx_stream_module
from process.conftest import kill_session

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator
    from pathlib import Path

    from process.conftest import Launch

pytestmark = [pytest.mark.process, needs_network]

PAGES: Final = DOCS / "migration"
OURS: Final = "/etc/forwarder/forwarder.toml"
US, CLIENT, DENIED = "192.0.2.1", "192.0.2.20", "192.0.2.66"
WEB: Final = [("192.0.2.10", 80), ("192.0.2.11", 80)]
DNS: Final = [("192.0.2.53", 53)]
ADDRESSES: Final = (US, CLIENT, DENIED, "192.0.2.10", "192.0.2.11", "192.0.2.53")


@dataclass(frozen=True)
class Case:
    """A page: what the old program's file is called, and what clients try.

    ``tcp`` is ports and clients, ``served`` those of them that get an answer.
    """

    page: str
    file: str
    tcp: tuple[tuple[int, str], ...]
    served: tuple[tuple[int, str], ...]
    udp: tuple[int, ...] = (5353,)
    unix: tuple[str, ...] = field(default=())


CASES: Final = {
    "rinetd": Case(
        "rinetd.md",
        "/etc/rinetd.conf",
        tcp=((8080, CLIENT), (8080, DENIED), (8080, "127.0.0.1")),
        served=((8080, CLIENT),),
    ),
    "oxidinetd": Case(
        "oxidinetd.md",
        "/etc/oxidinetd.toml",
        tcp=((8080, CLIENT), (8080, "127.0.0.1")),
        served=((8080, CLIENT),),
    ),
    "socat": Case(
        "socat.md",
        "",
        tcp=((8080, CLIENT), (8081, CLIENT), (8081, DENIED)),
        served=((8080, CLIENT), (8081, CLIENT)),
        unix=("/run/forwarder/web.sock",),
    ),
    "haproxy": Case(
        "haproxy.md",
        "/etc/haproxy/haproxy.cfg",
        tcp=((8080, CLIENT), (8080, "127.0.0.1")),
        served=((8080, CLIENT),),
        udp=(),
    ),
    "nginx": Case(
        "nginx-stream.md",
        "/etc/nginx/nginx.conf",
        tcp=((8080, CLIENT), (8080, "127.0.0.1")),
        served=((8080, CLIENT),),
    ),
}
LETS_SESSIONS_END: Final = ("haproxy", "nginx", "socat")


def target(client: str) -> str:
    """Where a client connects to: an address of the same network."""
    return "127.0.0.1" if client.startswith("127.") else US


class Site:
    """A directory for the files of a page, and the upstreams that they name."""

    def __init__(self, root: Path, launch: Launch) -> None:
        self.root = root
        self._launch = launch
        for name in ("run/forwarder", "var/log/forwarder"):
            (root / name).mkdir(parents=True)

    def observe(self, case: Case) -> dict[str, set[str]]:
        """What clients get, each asked often enough to meet every upstream."""
        found: dict[str, set[str]] = {}
        for port, client in case.tcp:
            key = f"tcp {port} {client}"
            found[key] = {ask_tcp((target(client), port), source=client) for _ in range(16)}
        for port in case.udp:
            found[f"udp {port}"] = {ask_udp((US, port), source=CLIENT)}
        for path in case.unix:
            found[path] = {ask_tcp(placed(path, self.root))}
        return found

    @contextmanager
    def old(self, name: str) -> Iterator[list[subprocess.Popen[bytes]]]:
        """Run the old program with what the page says; gives its processes."""
        if name == "oxidinetd":  # it is in no package; see the page
            with self.ours(CASES[name].file):
                yield []
            return
        with ExitStack() as stack:
            processes = []
            for command in getattr(self, f"_{name}")():
                process = subprocess.Popen(
                    command, stderr=subprocess.DEVNULL, start_new_session=True
                )
                stack.callback(process.wait)
                # socat has a child for each UDP client, which holds the port.
                stack.callback(kill_session, process.pid)
                processes.append(process)
            yield processes

    @contextmanager
    def ours(self, file: str = OURS, page: str = "") -> Iterator[None]:
        """Run the forwarder with a file that is there, or with that of a page."""
        if page:
            file_block(PAGES / page, file).write(self.root)
        path = placed(file, self.root)
        checked = run_command("check", "-c", path)
        assert checked.returncode == 0, checked.stderr
        if page:  # of an old one there may be something to tell
            assert checked.stderr == ""
        forwarder = self._launch("-c", path)
        yield
        assert forwarder.stop() == 0

    def _rinetd(self) -> list[list[str]]:
        path = file_block(PAGES / "rinetd.md", "/etc/rinetd.conf").write(self.root)
        pid_file = f"pidlogfile {self.root}/rinetd.pid\n"
        own = path.with_name("rinetd.with-pid-file")
        own.write_text(pid_file + path.read_text())
        return [["rinetd", "-f", "-c", str(own)]]

    def _socat(self) -> list[list[str]]:
        (block,) = [b for b in blocks(PAGES / "socat.md") if (b.language, b.name) == ("sh", "old")]
        return [shlex.split(placed(line, self.root)) for line in commands(block)]

    def _haproxy(self) -> list[list[str]]:
        path = file_block(PAGES / "haproxy.md", "/etc/haproxy/haproxy.cfg").write(self.root)
        # The descriptors that maxconn asks for may be more than there are here.
        path.write_text(path.read_text().replace("maxconn 20000", "maxconn 200"))
        return [["haproxy", "-W", "-f", str(path)]]

    def _nginx(self) -> list[list[str]]:
        path = file_block(PAGES / "nginx-stream.md", "/etc/nginx/nginx.conf").write(self.root)
        head = nginx_stream_module() + NGINX_HEAD.format(directory=self.root)
        path.write_text(head + path.read_text())
        return [["nginx", "-p", str(self.root), "-e", "stderr", "-c", str(path)]]


@pytest.fixture
def site(public_path: Path, launch: Launch) -> Iterator[Site]:
    """See :class:`Site`."""
    with network(*ADDRESSES), Echo(tcp=WEB, udp=DNS):
        yield Site(public_path, launch)


def wait_until_served(case: Case) -> None:
    port, client = case.served[0]

    def is_served() -> bool:
        try:
            return ask_tcp((US, port), source=client) != ""
        except OSError:
            return False

    eventually(is_served, f"{case.page}: port {port} is not served")


@debian("rinetd", "socat", "haproxy", "nginx", "ip")
@pytest.mark.parametrize("name", CASES)
def test_the_new_configuration_forwards_as_the_old_one(name: str, site: Site) -> None:
    case = CASES[name]
    if name == "oxidinetd":
        file_block(PAGES / case.page, case.file).write(site.root)
    with site.old(name):
        wait_until_served(case)
        before = site.observe(case)
    with site.ours(page=case.page):
        after = site.observe(case)
    assert after == before
    for port, client in case.tcp:
        has_answer = after[f"tcp {port} {client}"] != {""}
        assert has_answer == ((port, client) in case.served), (port, client)
        assert len(after[f"tcp {port} {client}"]) == (2 if name in ("haproxy", "nginx") else 1) or (
            not has_answer
        )


@debian("rinetd", "ip")
def test_the_configuration_of_rinetd_can_be_used_as_it_is_and_converted(site: Site) -> None:
    case = CASES["rinetd"]
    file = file_block(PAGES / case.page, case.file).write(site.root)
    converted = run_command("convert", str(file), "-o", placed("/etc/new.toml", site.root))
    assert converted.returncode == 0, converted
    with site.old("rinetd"):
        wait_until_served(case)
        before = site.observe(case)
    for name in (case.file, "/etc/new.toml"):
        with site.ours(name):
            assert site.observe(case) == before


STOP: Final = {"haproxy": signal.SIGUSR1, "nginx": signal.SIGQUIT}


@debian("socat", "haproxy", "nginx", "ip")
@pytest.mark.parametrize("name", LETS_SESSIONS_END)
def test_sessions_of_the_old_program_go_on_while_ours_has_the_port(name: str, site: Site) -> None:
    """Stopped as the page says: HAProxy by USR1, nginx by QUIT, of socat the one that listens."""
    case = CASES[name]
    with site.old(name) as processes:
        wait_until_served(case)
        with connect((US, 8080)) as client:
            client.sendall(b"old")
            assert client.recv(100).endswith(b": old")
            if name == "socat":
                assert ask_udp((US, 5353), source=CLIENT).endswith(": hello")
                type_page(case.page, "kill ")
                for process in processes:  # of those, the page has no command
                    process.terminate()
            eventually(lambda: has_let_go(processes, STOP.get(name)), "the old one listens")
            with site.ours(page=case.page):
                assert ask_tcp((US, 8080), source=CLIENT).endswith(": hello")
                client.sendall(b"still there")
                assert client.recv(100).endswith(b": still there")


@debian("socat", "nft", "ip")
def test_nobody_is_refused_or_cut_on_the_way_of_the_packet_filter(
    site: Site, launch: Launch
) -> None:
    """The steps of the page, with socat as the old program. Result: every session goes on.

    Clients of this host pass the hook `output` in place of `prerouting`.
    """
    page = PAGES / "README.md"
    first, second = [block for block in blocks(page) if block.name == OURS]
    path = first.write(site.root)
    with ExitStack() as stack:

        def session() -> socket.socket:
            client = stack.enter_context(connect((US, 8080)))
            client.sendall(b"a")
            assert client.recv(100).endswith(b": a")
            return client

        old = subprocess.Popen(["socat", "TCP-LISTEN:8080,fork,reuseaddr", "TCP:192.0.2.10:80"])
        stack.callback(old.wait)
        eventually(lambda: is_listening(8080))
        sessions = [session()]
        control = str(site.root / "control.sock")
        forwarder = launch("-c", str(path), "--control", control)
        for command in nft_commands(page)[:3]:
            subprocess.run(["bash", "-c", command], check=True)
        sessions.append(session())
        assert is_of(control, 1)
        old.terminate()
        eventually(lambda: not is_listening(8080))
        sessions.append(session())
        second.write(site.root)
        assert run_command("reload", "--control", control).returncode == 0
        subprocess.run(["bash", "-c", nft_commands(page)[3]], check=True)
        sessions.append(session())
        assert is_of(control, 3)
        for client in sessions:
            client.sendall(b"still there")
            assert client.recv(100).endswith(b": still there")
            client.close()
        assert forwarder.stop() == 0


def nft_commands(page: Path) -> list[str]:
    """The commands of a page for the packet filter, in order, for clients of this host."""
    found = [line for block in blocks(page) for line in commands(block)]
    return [
        line.replace("hook prerouting priority dstnat", "hook output priority -100")
        for line in found
        if line.startswith("nft ")
    ]


def is_of(control: str, count: int) -> bool:
    """Whether so many sessions are the forwarder's."""
    done = run_command("sessions", "--json", "--control", control)
    return len(done.stdout.splitlines()) == count


def has_let_go(processes: list[subprocess.Popen[bytes]], number: signal.Signals | None) -> bool:
    """Tell them to; HAProxy's master serves before it hears signals, so perhaps once more."""
    if number is not None:
        for process in processes:
            process.send_signal(number)
    return not is_listening(8080)


def type_page(page: str, *beginnings: str) -> None:
    """Type those commands of a page that begin so."""
    for block in blocks(PAGES / page):
        for command in commands(block) if block.language == "sh" and not block.name else ():
            if command.startswith(beginnings):
                subprocess.run(["bash", "-c", command], check=True)


def is_listening(port: int) -> bool:
    done = subprocess.run(
        ["ss", "-Hltn", f"sport = :{port}"], capture_output=True, text=True, check=True
    )
    return bool(done.stdout)
