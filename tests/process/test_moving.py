"""A rule moves to other listening sockets for the same port, under load: nobody is reset."""

from __future__ import annotations

import os
import re
import signal
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.configured import IS_SOAK, Configured, rule
from support.ends import has_mptcp, listen
from support.forwarder import reserve_port
from support.loads import Load
from support.processes import as_nobody, listeners, run_command
from support.waiting import eventually

from process.conftest import stop

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from process.conftest import Launch

pytestmark = pytest.mark.process

# Connections that must have been served before it moves again, and how often it moves.
EACH = 250
MOVES = 200 if IS_SOAK else 12


@dataclass(frozen=True)
class Form:
    """How a rule listens: its hosts, one rule for each, and more keys of all of them."""

    hosts: tuple[str, ...]
    more: str = ""

    def text(self, port: int, upstream: socket.socket) -> str:
        """The configuration."""
        to = upstream.getsockname()
        return "workers = 2\n" + "".join(rule((host, port), to, self.more) for host in self.hosts)


ONE = Form(("127.0.0.1",))
FOUR = Form(("0.0.0.0",))
ALL = Form(("::",))
BOTH = Form(("::", "0.0.0.0"))  # where :: takes IPv6 only
MULTIPATH = Form(("127.0.0.1",), 'mptcp = "listen"')
MULTIPATH_ALL = Form(("::",), 'mptcp = "listen"')

with_mptcp = pytest.mark.skipif(not has_mptcp(), reason="this kernel has no MPTCP")
WAYS = [
    pytest.param("127.0.0.1", ONE, FOUR, id="one and IPv4"),
    pytest.param("127.0.0.1", ONE, ALL, id="one and all"),
    pytest.param("127.0.0.1", FOUR, ALL, id="IPv4 and all"),
    pytest.param("::1", ALL, BOTH, id="all and IPv6"),
    pytest.param("::1", Form(("::1",)), ALL, id="one of IPv6 and all"),
    pytest.param("127.0.0.1", ONE, MULTIPATH, id="TCP and MPTCP", marks=with_mptcp),
    pytest.param("127.0.0.1", ONE, MULTIPATH_ALL, id="one and all by MPTCP", marks=with_mptcp),
]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What is closed at the end."""
    with ExitStack() as found:
        yield found


@pytest.fixture
def port(stack: ExitStack) -> int:
    """A port of all addresses that nobody else gets."""
    found: int = stack.enter_context(reserve_port("::")).getsockname()[1]
    return found


@pytest.mark.parametrize(("client", "one", "other"), WAYS)
def test_a_reload_that_moves_a_rule_resets_nobody(
    launch: Launch,
    tmp_path: Path,
    stack: ExitStack,
    port: int,
    client: str,
    one: Form,
    other: Form,
) -> None:
    """To and fro, faster than the old sockets are closed. Result: everybody is served."""
    path, upstream = tmp_path / "forwarder.toml", stack.enter_context(listen())
    path.write_text(one.text(port, upstream))
    it = Configured(launch("-c", str(path)), path)
    with Load((client, port), upstream, rate=2000) as load:
        load.wait_served(EACH)
        for number in range(MOVES):
            form = other if number % 2 == 0 else one
            assert "master.reloaded" in it.reload(form.text(port, upstream))
            load.wait_served(EACH)
        account = load.stop()
    assert account.dropped == 0, account
    assert stop(it.forwarder, signal.SIGTERM) == 0


@pytest.mark.parametrize(
    "other", [pytest.param(ALL, id="all"), pytest.param(MULTIPATH, id="MPTCP", marks=with_mptcp)]
)
def test_no_privilege_is_needed_for_that(
    launch: Launch, stack: ExitStack, port: int, other: Form
) -> None:
    """As an ordinary user."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    directory.chmod(0o755)
    path, upstream = directory / "forwarder.toml", stack.enter_context(listen())
    path.write_text(ONE.text(port, upstream))
    it = Configured(launch("-c", str(path), prefix=as_nobody()), path)
    with Load(("127.0.0.1", port), upstream, rate=2000) as load:
        load.wait_served(EACH)
        for number in range(MOVES // 2):
            form = (other, ONE)[number % 2]
            assert "master.reloaded" in it.reload(form.text(port, upstream))
            load.wait_served(EACH)
        account = load.stop()
    assert account.dropped == 0, account
    assert stop(it.forwarder, signal.SIGTERM) == 0


@pytest.mark.parametrize(("client", "one", "other"), WAYS)
def test_an_upgrade_that_moves_a_rule_resets_nobody(
    launch: Launch,
    tmp_path: Path,
    stack: ExitStack,
    port: int,
    client: str,
    one: Form,
    other: Form,
) -> None:
    """The predecessor serves what had begun at its sockets. Result: everybody is served."""
    path, upstream = tmp_path / "forwarder.toml", stack.enter_context(listen())
    control = f'control = "{tmp_path}/control.sock"\n'
    path.write_text(control + one.text(port, upstream))
    it = launch("-c", str(path))
    with Load((client, port), upstream, rate=1000) as load:
        load.wait_served(EACH)
        for number in range(MOVES // 4):
            form = other if number % 2 == 0 else one
            path.write_text(control + form.text(port, upstream))
            done = run_command("upgrade", "--control", f"{tmp_path}/control.sock")
            assert done.returncode == 0, done.stderr
            load.wait_served(EACH)
        account = load.stop()
    assert account.dropped == 0, account
    done = run_command("stop", "--control", f"{tmp_path}/control.sock")
    assert done.returncode == 0, done.stderr
    assert it.process.wait(30) == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_rule_that_an_upgrade_has_dropped_can_be_had_again_at_once(
    launch: Launch, tmp_path: Path, stack: ExitStack, port: int, host: str
) -> None:
    """By a reload, while the predecessor holds its sockets: as it was, and for all addresses."""
    upstream = stack.enter_context(listen())
    here = stack.enter_context(reserve_port()).getsockname()
    control = str(tmp_path / "control.sock")
    to = upstream.getsockname()
    stays = f'workers = 2\ncontrol = "{control}"\n' + rule(here, to)
    path = tmp_path / "forwarder.toml"
    path.write_text(stays + rule(("127.0.0.1", port), to))
    old = Configured(launch("-c", str(path)), path)
    path.write_text(stays)
    done = run_command("upgrade", "--control", control)
    assert done.returncode == 0, done.stderr
    old.forwarder.signal(signal.SIGSTOP)  # it goes on holding them
    pid = int(re.findall(r"master\.ready pid=(\d+)", "\n".join(old.forwarder.lines))[-1])
    path.write_text(stays + rule((host, port), to))
    assert "+1" in old.outcome_of(lambda: os.kill(pid, signal.SIGHUP))
    old.forwarder.signal(signal.SIGCONT)
    with Load(("127.0.0.1", port), upstream, rate=300) as load:
        load.wait_served(600)  # beyond the time of the predecessor
        account = load.stop()
    assert account.dropped == 0, account
    assert old.forwarder.process.wait(30) == 0
    eventually(lambda: listeners((host, port)) == 2, "what could not be had again is not closed")
    assert run_command("stop", "--control", control).returncode == 0
