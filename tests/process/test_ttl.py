"""Names by the TTL of a real name server, which the forwarder asks in a namespace of its own."""

from __future__ import annotations

import select
import signal
import subprocess
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import pytest
from support.configured import rule
from support.ends import accept, connect, listen
from support.namespaces import Namespace, needs_network
from support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.forwarder import Forwarder

    from process.conftest import Launch

pytestmark = [pytest.mark.process, needs_network]

NAME = "moves.test"
LISTEN = ("127.0.0.1", 8000)
PORT = 9000
# Far below the 30 s after which a name is looked up if its TTL is not known, far above 0.9 TTL.
WITHIN_S = 20.0


class Site:
    """A name server, its one name, and two places to which that may lead."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.space = stack.enter_context(Namespace())
        self._hosts = directory / "hosts"
        resolv = directory / "resolv.conf"
        resolv.write_text("nameserver 127.0.0.1\n")
        bind = f'mount --bind {resolv} /etc/resolv.conf && exec "$@"'
        self.prefix = [*self.space.prefix, "unshare", "--mount", "sh", "-c", bind, "sh"]
        self.places = {
            host: stack.enter_context(self.space.call(partial(listen, host, PORT)))
            for host in ("127.0.0.2", "127.0.0.3")
        }
        self._hosts.write_text(f"127.0.0.2 {NAME}\n")
        self.server = subprocess.Popen(
            [
                *(*self.space.prefix, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null"),
                *("--pid-file=", "--no-resolv", "--no-hosts", "--user=root", "--group=root"),
                *("--listen-address=127.0.0.1", "--bind-interfaces", "--local-ttl=2"),
                f"--addn-hosts={self._hosts}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(self.server.wait)
        stack.callback(self.server.kill)  # it may be stopped
        eventually(self._answers, "dnsmasq does not answer")

    def _answers(self) -> bool:
        command = [*self.space.prefix, "dig", "@127.0.0.1", "+short", "+tries=1", "+time=1", NAME]
        return bool(subprocess.run(command, capture_output=True, check=False).stdout)

    def lead_to(self, host: str) -> None:
        """Move the name."""
        self._hosts.write_text(f"{host} {NAME}\n")
        self.server.send_signal(signal.SIGHUP)

    def reaches(self, host: str) -> bool:
        """Whether a new client comes there."""
        with self.space.call(lambda: connect(LISTEN)):
            (place,), _, _ = select.select(self.places.values(), [], [], PATIENCE_S)
            accept(place).close()
        return place is self.places[host]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(tmp_path, stack)


def start(site: Site, launch: Launch, directory: Path) -> Forwarder:
    path = directory / "forwarder.toml"
    path.write_text(rule(LISTEN, (NAME, PORT)))
    # The socket for notifications is not in its namespace.
    forwarder = launch("-c", str(path), prefix=site.prefix, expect_ready=False)
    forwarder.wait_logged("master.ready")
    return forwarder


def test_a_name_is_looked_up_again_when_its_ttl_is_over(
    site: Site, launch: Launch, tmp_path: Path
) -> None:
    start(site, launch, tmp_path)
    eventually(lambda: site.reaches("127.0.0.2"))
    site.lead_to("127.0.0.3")
    eventually(lambda: site.reaches("127.0.0.3"), within_s=WITHIN_S)


def test_in_an_outage_the_old_address_serves_and_the_new_one_soon_after_it(
    site: Site, launch: Launch, tmp_path: Path
) -> None:
    it = start(site, launch, tmp_path)
    eventually(lambda: site.reaches("127.0.0.2"))
    site.server.send_signal(signal.SIGSTOP)
    it.wait_logged(f"name.failed host={NAME} ")
    assert site.reaches("127.0.0.2")
    site.lead_to("127.0.0.3")
    site.server.send_signal(signal.SIGCONT)
    eventually(lambda: site.reaches("127.0.0.3"), within_s=PATIENCE_S)
