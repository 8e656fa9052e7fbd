"""``bind = "retry"``: an address that comes later keeps nobody else waiting."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from support.configured import Configured, many_rules
from support.ends import accept, carry, connect, listen, listen_unix
from support.forwarder import reserve_port
from support.hosts import own_host
from support.processes import listeners, run_command
from support.waiting import eventually

from process.conftest import stop

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from process.conftest import Launch

pytestmark = pytest.mark.process

Address = tuple[str, int]


class Site:
    """A forwarder with a rule that can listen, and others that perhaps cannot."""

    def __init__(self, launch: Launch, directory: Path, stack: ExitStack) -> None:
        self._launch = launch
        self._stack = stack
        self.path = directory / "forwarder.toml"
        self.control = directory / "control.sock"
        self.good: Address = stack.enter_context(reserve_port()).getsockname()
        self.upstream = stack.enter_context(listen())

    def free(self) -> Address:
        """An address that is free now; nobody holds it."""
        with reserve_port() as holder:
            host, port = holder.getsockname()
        return host, port

    def text(self, *where: str, bind: str = 'bind = "retry"', more: str = "") -> str:
        """The good rule first, then one for each listen address that may come later."""
        target = "{}:{}".format(*self.upstream.getsockname())
        rules = [f'listen = "{self.good[0]}:{self.good[1]}"', *(f'listen = "{w}"' for w in where)]
        return f'workers = 2\ncontrol = "{self.control}"\n' + "".join(
            f'[[forwarding_rules]]\nname = "rule {n}"\n{line}\nupstream = "{target}"\n'
            f"{bind if n else ''}\n{more if n else ''}\n"
            for n, line in enumerate(rules)
        )

    def start(self, text: str, *arguments: str, prefix: list[str] | None = None) -> Configured:
        """Start with this text."""
        self.path.write_text(text)
        forwarder = self._launch("-c", str(self.path), *arguments, prefix=prefix or ())
        return Configured(forwarder, self.path)

    def rules(self) -> list[dict[str, Any]]:
        """Rules as in ``forwarder status --json``."""
        done = run_command("status", "--json", "--control", str(self.control))
        found = json.loads(done.stdout)["rules"]
        assert isinstance(found, list)
        return found

    def assert_serves(self, address: Address | str | None = None) -> None:
        """Clients get through."""
        for _ in range(4):
            with connect(address or self.good) as client, accept(self.upstream) as far:
                carry(client, far, b"there")

    def wait_served(self, address: Address) -> None:
        """Wait until it is listened on, by a socket for each worker; then clients get through."""
        eventually(lambda: listeners(address) == 2, self.path.read_text)
        self.assert_serves(address)


@pytest.fixture
def site(launch: Launch, tmp_path: Path) -> Iterator[Site]:
    """See :class:`Site`."""
    with ExitStack() as stack:
        yield Site(launch, tmp_path, stack)


def text_of(address: Address) -> str:
    return f"{address[0]}:{address[1]}"


def test_an_address_that_is_taken_is_had_when_it_is_free(site: Site) -> None:
    """Shown in the status meanwhile; logged once, and once more at the end."""
    address = site.free()
    with listen(*address) as taken:
        it = site.start(site.text(text_of(address)))
        site.assert_serves()
        good, waiting = site.rules()
        assert good["state"] == "listening"
        assert (waiting["state"], waiting["addresses"]) == ("waiting", [])
        assert "Address already in use" in str(waiting["why"])
        assert 0 <= float(waiting["retry_in_s"]) <= 30
        assert int(waiting["attempts"]) >= 1
        told = run_command("status", "--control", str(site.control)).stdout
        assert "in use; next attempt in " in told
        eventually(lambda: int(site.rules()[1]["attempts"]) >= 2)
        with connect(address) as client, accept(taken) as far:
            carry(client, far, b"still mine")
    site.wait_served(address)
    assert site.rules()[1]["state"] == "listening"
    it.forwarder.wait_logged('bind.done rule="rule 1" listens, at attempt')
    assert sum("bind.waiting" in line for line in it.forwarder.lines) == 1
    assert stop(it.forwarder, signal.SIGTERM) == 0


@pytest.mark.skipif(
    os.geteuid() != 0, reason="only root has a namespace where nobody else waits for the lock"
)
def test_whoever_holds_the_start_lock_does_not_hold_up_what_comes_later(site: Site) -> None:
    """Any user can, for as long as they like."""
    address = site.free()
    with listen(*address):
        it = site.start(site.text(text_of(address)))
        lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        lock.bind("\0forwarder-start")
        eventually(lambda: "another instance is starting" in str(site.rules()[1]["why"]))
    with lock:
        site.wait_served(address)
    assert stop(it.forwarder, signal.SIGTERM) == 0


def test_an_address_of_a_network_that_comes_up_later(launch: Launch, tmp_path: Path) -> None:
    """In a network of its own, into which an address is put while it runs."""
    path = tmp_path / "forwarder.toml"
    path.write_text(
        f'workers = 1\ncontrol = "{tmp_path}/c"\n'
        '[[forwarding_rules]]\nlisten = "10.99.0.1:8000-8001"\nupstream = "127.0.0.1:1"\n'
        'bind = "retry"\n'
    )
    # Without any address a kernel lets everything be bound.
    up = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    unshare = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    it = launch("-c", str(path), prefix=[*unshare, *up], expect_ready=False)
    it.wait_logged("bind.waiting .* Cannot assign requested address")
    it.wait_logged("master.ready")
    inside = ["nsenter", f"--target={it.pid}", "--net"]
    if os.geteuid():
        inside = ["nsenter", f"--target={it.pid}", "--user", "--preserve-credentials", "--net"]
    subprocess.run([*inside, *["ip", "address", "add", "10.99.0.1/32", "dev", "lo"]], check=True)
    it.wait_logged('bind.done rule=.*10.99.0.1:8000-8001" listens')
    told = run_command("status", "--control", f"{tmp_path}/c").stdout
    assert "10.99.0.1:8000-8001  127.0.0.1:1" in told
    assert stop(it, signal.SIGTERM) == 0


def test_a_name_that_does_not_resolve_waits_and_stops_nothing(site: Site) -> None:
    """Nor does it keep the master from answering or from stopping."""
    it = site.start(site.text("no-such-host.invalid:4000"))
    site.assert_serves()
    eventually(lambda: int(site.rules()[1]["attempts"]) >= 2)
    assert "cannot listen on no-such-host.invalid:4000: " in str(site.rules()[1]["why"])
    assert stop(it.forwarder, signal.SIGTERM) == 0
    assert sum("bind.waiting" in line for line in it.forwarder.lines) == 1


def test_all_ports_of_a_range_are_had_or_none(site: Site) -> None:
    """The last one is taken. Result: the others are free for anybody meanwhile."""
    host = own_host(4)
    with listen(host, 8004):
        it = site.start(site.text(f"{host}:8000-8004"))
        site.assert_serves()
        listen(host, 8000).close()
    for port in range(8000, 8005):
        site.wait_served((host, port))
    assert stop(it.forwarder, signal.SIGTERM) == 0


def test_without_it_the_start_fails_and_a_reload_is_refused(site: Site) -> None:
    address = site.free()
    with listen(*address):
        text = site.text(text_of(address), bind="")
        site.path.write_text(text)
        ended = run_command("-c", str(site.path))
        assert ended.returncode == 69
        assert listeners(site.good) == 0
        it = site.start(site.text())
        assert "stays in force" in it.reload(text)
        assert "generation 2" in it.reload(site.text(text_of(address)))
    site.wait_served(address)
    assert stop(it.forwarder, signal.SIGTERM) == 0


def test_keep_going_is_for_all_rules_also_after_a_reload(site: Site) -> None:
    first, second = site.free(), site.free()
    with listen(*first), listen(*second):
        it = site.start(site.text(text_of(first), bind=""), "--keep-going")
        it.forwarder.wait_logged('bind.waiting rule="rule 1" ')
        reloaded = it.reload(site.text(text_of(first), text_of(second), bind=""))
        assert "+1 -0 ~0 =2" in reloaded
        it.forwarder.wait_logged('bind.waiting rule="rule 2" ')
    site.wait_served(first)
    site.wait_served(second)
    assert stop(it.forwarder, signal.SIGTERM) == 0


def test_a_reload_tries_at_once_and_forgets_what_went(site: Site) -> None:
    """Three wait; one is removed, one gets another address, one can be had by now."""
    a, b, c, other = (site.free() for _ in range(4))
    with ExitStack() as stack:
        for address in (a, b):
            stack.enter_context(listen(*address))
        held = listen(*c)
        it = site.start(site.text(*map(text_of, (a, b, c))))
        assert [rule["state"] for rule in site.rules()] == ["listening"] + 3 * ["waiting"]
        held.close()
        it.reload(site.text(text_of(other), text_of(b), text_of(c)))
        assert [rule["state"] for rule in site.rules()].count("waiting") == 1
        site.assert_serves(other)
        site.assert_serves(c)
        it.reload(site.text())
        assert [rule["state"] for rule in site.rules()] == ["listening"]
    listen(*a).close()
    assert stop(it.forwarder, signal.SIGTERM) == 0


def test_a_bound_rule_that_moves_to_a_missing_address_waits_there(site: Site) -> None:
    """What it had is closed, and had again when it moves back."""
    old = site.free()
    it = site.start(site.text(text_of(old)))
    site.wait_served(old)
    it.reload(site.text("192.0.2.1:4000"))
    assert site.rules()[1]["state"] == "waiting"
    eventually(lambda: listeners(old) == 0)
    it.reload(site.text(text_of(old)))
    site.wait_served(old)
    assert stop(it.forwarder, signal.SIGTERM) == 0


def test_an_address_that_comes_while_a_reload_is_read_is_had_after_it(site: Site) -> None:
    """Nothing is bound between reading a configuration and its coming into force."""
    address = site.free()
    held = listen(*address)
    it = site.start(site.text(text_of(address)))
    loader = it.begin_slow_reload(site.text(text_of(address)) + many_rules(10))
    held.close()
    os.kill(loader, signal.SIGCONT)
    eventually(lambda: len(it.outcomes()) == 1)
    site.wait_served(address)
    assert stop(it.forwarder, signal.SIGTERM) == 0


def test_it_is_had_while_workers_are_replaced(site: Site) -> None:
    address = site.free()
    held = listen(*address)
    it = site.start(site.text(text_of(address)))
    for pid in it.forwarder.workers():
        os.kill(pid, signal.SIGKILL)
    held.close()
    site.wait_served(address)
    it.resize(signal.SIGTTIN, 3)
    eventually(lambda: listeners(address) == 3)
    site.assert_serves(address)
    assert stop(it.forwarder, signal.SIGTERM) == 0


def test_an_upgrade_leaves_what_waits_to_the_new_one(site: Site) -> None:
    address = site.free()
    held = listen(*address)
    it = site.start(site.text(text_of(address)))
    done = run_command("upgrade", "--control", str(site.control))
    assert done.returncode == 0, done.stderr
    assert it.forwarder.process.wait(30) == 0
    assert [rule["state"] for rule in site.rules()] == ["listening", "waiting"]
    held.close()
    site.wait_served(address)
    assert run_command("stop", "--control", str(site.control)).returncode == 0
    assert listeners(address) == 0


def test_a_second_instance_waits_until_the_first_is_gone(site: Site, launch: Launch) -> None:
    """Both may wait. Result: never do two serve one address."""
    target = "{}:{}".format(*site.upstream.getsockname())
    pair = ["-l", text_of(site.free()), "-r", target, "--workers", "2", "--keep-going"]
    host, _, port = pair[1].partition(":")
    address = (host, int(port))
    first, second = launch(*pair), launch(*pair)
    second.wait_logged("bind.waiting .* Address already in use")
    assert listeners(address) == 2
    assert stop(first, signal.SIGTERM) == 0
    second.wait_logged("bind.done")
    site.wait_served(address)
    assert stop(second, signal.SIGTERM) == 0


@pytest.mark.parametrize("kind", ["no directory", "served"])
def test_a_unix_socket_may_come_later_too(site: Site, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "sub" / "in.sock"
    served: socket.socket | None = None
    if kind == "served":
        path.parent.mkdir()
        served = listen_unix(str(path))
    it = site.start(site.text(f"unix:{path}"))
    site.assert_serves()
    it.forwarder.wait_logged(f'bind.waiting rule="rule 1" cannot listen on unix:{path}: ')
    if served is None:
        path.parent.mkdir()
    else:
        served.close()
    it.forwarder.wait_logged("bind.done")
    site.assert_serves(str(path))
    assert stop(it.forwarder, signal.SIGTERM) == 0
    assert not path.exists()


def test_too_few_descriptors_are_an_error_all_the_same(site: Site) -> None:
    """No waiting would bring them."""
    site.path.write_text(site.text("127.0.0.1:20000-20199"))
    done = run_command("-c", str(site.path), prefix=["prlimit", "--nofile=100:100"])
    assert done.returncode == 69
    assert "need at least 430 file descriptors" in done.stderr
