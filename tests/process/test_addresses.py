"""Addresses as they are spelled, on hosts that have not all of them."""

from __future__ import annotations

import json
import signal
import sys
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from support import without_ipv6
from support.configured import Configured
from support.datagrams import udp
from support.ends import accept, carry, connect, listen
from support.forwarder import reserve_port
from support.namespaces import Namespace, needs_network
from support.processes import run_command
from support.waiting import eventually

from process.conftest import stop

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from process.conftest import Launch

pytestmark = pytest.mark.process

WITHOUT_IPV6 = [sys.executable, without_ipv6.__file__]
no_seccomp = pytest.mark.skipif(
    not without_ipv6.IS_POSSIBLE, reason="no numbers of calls for this machine"
)


class Site:
    """A configuration of rules that lead to one upstream."""

    def __init__(self, launch: Launch, directory: Path, stack: ExitStack) -> None:
        self._launch = launch
        self.path = directory / "forwarder.toml"
        self.control = directory / "control.sock"
        self.upstream = stack.enter_context(listen())
        self.port: int = stack.enter_context(reserve_port("::")).getsockname()[1]

    def write(self, *listens: str, more: str = "") -> None:
        """A rule for each, named by its number."""
        to = "{}:{}".format(*self.upstream.getsockname())
        self.path.write_text(
            f'workers = 2\ncontrol = "{self.control}"\n'
            + "".join(
                f'[[forwarding_rules]]\nname = "{n}"\nlisten = "{where}"\n'
                f'upstream = "{to}"\n{more}\n'
                for n, where in enumerate(listens)
            )
        )

    def start(self, *prefix: str) -> Configured:
        """Start."""
        return Configured(self._launch("-c", str(self.path), prefix=prefix), self.path)

    def rules(self) -> list[dict[str, Any]]:
        """Rules as in ``forwarder status --json``."""
        done = run_command("status", "--json", "--control", str(self.control))
        found = json.loads(done.stdout)["rules"]
        assert isinstance(found, list)
        return found

    def ask(self, *command: str) -> str:
        """What a command for the instance says; it succeeds."""
        done = run_command(*command, "--control", str(self.control))
        assert done.returncode == 0, done.stderr
        return done.stdout

    def assert_serves(self, host: str) -> None:
        """Clients get through at this address."""
        for _ in range(3):
            with connect((host, self.port)) as client, accept(self.upstream) as far:
                carry(client, far, b"there")


@pytest.fixture
def site(launch: Launch, tmp_path: Path) -> Iterator[Site]:
    """See :class:`Site`."""
    with ExitStack() as stack:
        yield Site(launch, tmp_path, stack)


# -- one address, many spellings


@pytest.mark.parametrize("host", ["::", "::0", "0:0:0:0:0:0:0:0", "::0.0.0.0", "*"])
def test_every_spelling_of_the_wildcard_takes_both_families(site: Site, host: str) -> None:
    written = host if host == "*" else f"[{host}]"
    site.write(f"{written}:{site.port}")
    it = site.start()
    site.assert_serves("127.0.0.1")
    site.assert_serves("::1")
    assert stop(it.forwarder, signal.SIGTERM) == 0


@pytest.mark.parametrize("host", ["::ffff:127.0.0.1", "::FFFF:7f00:1", "::ffff:0.0.0.0"])
def test_an_ipv4_address_in_ipv6_clothes_is_that_address(site: Site, host: str) -> None:
    site.write(f"[{host}]:{site.port}")
    it = site.start()
    site.assert_serves("127.0.0.1")
    with pytest.raises(ConnectionRefusedError):
        connect(("::1", site.port))
    assert stop(it.forwarder, signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("one", "other"), [("[::0]", "[::]"), ("[::ffff:0.0.0.0]", "0.0.0.0"), ("[0::1]", "[::1]")]
)
def test_two_spellings_on_one_port_are_one_address_too_often(
    site: Site, one: str, other: str
) -> None:
    site.write(f"{one}:{site.port}", f"{other}:{site.port}")
    done = run_command("check", "-c", str(site.path))
    assert done.returncode == 78
    assert "is already listened on" in done.stderr


# -- hosts without IPv6


@no_seccomp
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_where_there_is_no_ipv6_the_wildcard_is_every_address_there_is(
    launch: Launch, tmp_path: Path, site: Site, protocol: str
) -> None:
    """A kernel that was started with ``ipv6.disable=1``."""
    assert without_ipv6.__file__ is not None
    if protocol == "tcp":
        site.write(f"*:{site.port}")
        it = site.start(*WITHOUT_IPV6)
        site.assert_serves("127.0.0.1")
        assert site.rules()[0]["addresses"] == [f"0.0.0.0:{site.port}"]
        assert "generation 2" in site.ask("reload")
        site.assert_serves("127.0.0.1")
        assert stop(it.forwarder, signal.SIGTERM) == 0
        return
    with udp() as upstream, udp() as client:
        path = tmp_path / "udp.toml"
        path.write_text(
            f'[[forwarding_rules]]\nprotocol = "udp"\nlisten = "*:{site.port}"\n'
            'upstream = "{}:{}"\n'.format(*upstream.getsockname())
        )
        forwarder = launch("-c", str(path), prefix=WITHOUT_IPV6)
        for _ in range(3):  # the second one settles the flow
            client.sendto(b"question", ("127.0.0.1", site.port))
            data, flow = upstream.recvfrom(100)
            upstream.sendto(data + b"!", flow)
            assert client.recvfrom(100)[0] == b"question!"
        assert stop(forwarder, signal.SIGTERM) == 0


@no_seccomp
def test_where_there_is_no_ipv6_its_addresses_are_refused_with_what_to_write(site: Site) -> None:
    site.write(f"[::1]:{site.port}")
    done = run_command("-c", str(site.path), prefix=WITHOUT_IPV6)
    assert done.returncode == 69
    assert "this system has no IPv6: write an IPv4 address, or *" in done.stderr


# -- names of which not all addresses can be had


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    """A table of host names for processes that are started with ``with_hosts``."""
    path = tmp_path / "hosts"
    path.write_text("127.0.0.1 localhost\n")
    return path


def with_hosts(hosts: Path) -> list[str]:
    """A command line that executes the one given to it with this table."""
    return ["unshare", "--mount", "sh", "-c", f'mount --bind {hosts} /etc/hosts && exec "$@"', "sh"]


def reach(host: str, port: int) -> None:
    """Somebody listens there, who resets us perhaps for want of an upstream."""
    with suppress(ConnectionResetError):
        connect((host, port)).close()


@needs_network
def test_a_name_listens_on_those_of_its_addresses_that_can_be_had(
    launch: Launch, tmp_path: Path, hosts: Path
) -> None:
    """As ``localhost`` in Docker, where IPv6 is off.

    Result: the others are served; start, reload and upgrade say which one is missing, as does the
    status; it is listened on as soon as it is there.
    """
    hosts.write_text("127.0.0.1 localhost\n::1 localhost\n")
    path, control = tmp_path / "forwarder.toml", tmp_path / "control.sock"
    text = (
        f'workers = 2\ncontrol = "{control}"\n[[forwarding_rules]]\nname = "web"\n'
        'listen = "localhost:8080-8081"\nupstream = "127.0.0.1:9"\n'
    )
    path.write_text(text)

    def rule() -> dict[str, Any]:
        done = run_command("status", "--json", "--control", str(control))
        found: dict[str, Any] = json.loads(done.stdout)["rules"][0]
        return found

    with Namespace() as there:
        there.sysctl("ipv6/conf/all/disable_ipv6", 1)
        prefix = [*there.prefix, *with_hosts(hosts)]
        checked = run_command("check", "--names", str(path), prefix=prefix)
        assert checked.returncode == 0
        assert "::1: Cannot assign requested address; hint: the rule listens on" in checked.stderr
        it = Configured(launch("-c", str(path), prefix=prefix, expect_ready=False), path)
        it.forwarder.wait_logged(
            r"bind.waiting rule=web cannot listen on \[::1\]:8080: Cannot assign requested address;"
            r" it listens on 127\.0\.0\.1:8080; the rest is tried again"
        )
        it.forwarder.wait_logged("master.ready")
        it.forwarder.wait_logged("partly listening web tcp localhost:8080-8081")
        assert rule()["state"] == "partial"
        assert rule()["addresses"] == ["127.0.0.1:8080-8081"]
        assert "[::1]:8080: Cannot assign" in rule()["why"]
        told = run_command("status", "--control", str(control)).stdout
        assert "127.0.0.1:8080-8081 (cannot listen on [::1]:8080: " in told
        assert "generation 2; waiting for an address: web" in it.reload(text + "# changed\n")
        for port in (8080, 8081):
            there.call(partial(reach, "127.0.0.1", port))
        done = run_command("upgrade", "--control", str(control))
        assert done.returncode == 0, done.stderr
        assert rule()["state"] == "partial"
        there.sysctl("ipv6/conf/all/disable_ipv6", 0)
        eventually(lambda: rule()["state"] == "listening", lambda: str(rule()))
        assert sorted(rule()["addresses"]) == ["127.0.0.1:8080-8081", "[::1]:8080-8081"]
        for port in (8080, 8081):
            there.call(partial(reach, "::1", port))
        assert run_command("stop", "--control", str(control)).returncode == 0


@needs_network
def test_a_name_of_which_no_address_can_be_had_is_an_error(tmp_path: Path, hosts: Path) -> None:
    hosts.write_text("192.0.2.1 two\n192.0.2.2 two\n127.0.0.1 localhost\n")
    path = tmp_path / "forwarder.toml"
    path.write_text('[[forwarding_rules]]\nlisten = "two:8080"\nupstream = "127.0.0.1:9"\n')
    with Namespace() as there:
        done = run_command("-c", str(path), prefix=[*there.prefix, *with_hosts(hosts)])
    assert done.returncode == 69
    assert "cannot listen on 192.0.2.1:8080" in done.stderr


@needs_network
def test_an_address_of_a_name_that_another_program_has_is_had_when_it_is_free(
    launch: Launch, tmp_path: Path, hosts: Path
) -> None:
    hosts.write_text("127.0.0.1 two\n127.0.0.2 two\n127.0.0.1 localhost\n")
    path, control = tmp_path / "forwarder.toml", tmp_path / "control.sock"
    path.write_text(
        f'control = "{control}"\n[[forwarding_rules]]\nname = "web"\n'
        'listen = "two:8080"\nupstream = "127.0.0.1:9"\n'
    )
    with Namespace() as there, there.call(lambda: listen("127.0.0.2", 8080)) as taken:
        prefix = [*there.prefix, *with_hosts(hosts)]
        it = launch("-c", str(path), prefix=prefix, expect_ready=False)
        it.wait_logged("bind.waiting rule=web cannot listen on 127.0.0.2:8080: Address already in")
        there.call(partial(reach, "127.0.0.1", 8080))
        taken.close()
        it.wait_logged("bind.done rule=web listens")
        there.call(partial(reach, "127.0.0.2", 8080))
        assert stop(it, signal.SIGTERM) == 0
