"""The installed code in place of the running: nobody is dropped; what fails changes nothing.

A successor is no child of ours nor of the old one: it is found by the pid file, and in the session
of the first.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeAlias

import pytest
from support import procfs
from support.configured import IS_SOAK, rule
from support.ends import accept, carry, connect, listen, receive_to_end
from support.forwarder import reserve_port
from support.loads import Load
from support.processes import listeners, members, owner, run_command
from support.upgraded import Site, assert_alive, is_running
from support.waiting import PATIENCE_S, eventually

from forwarder.control.requests import LOOK_S

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.forwarder import Forwarder

    from process.conftest import Launch

    Two: TypeAlias = tuple[Path, Forwarder, Forwarder]

pytestmark = pytest.mark.process

TIMES = 20 if IS_SOAK else 3


@pytest.fixture
def site(launch: Launch, tmp_path: Path) -> Iterator[Site]:
    """See :class:`Site`."""
    with ExitStack() as stack:
        yield Site(launch, tmp_path, stack)


# -- nobody is dropped


@pytest.mark.parametrize("way", ["command", "SIGUSR2"])
def test_upgrades_under_load_drop_nobody(site: Site, way: str) -> None:
    """Several in a row, with streams that live through all of them.

    Result: everybody is served; each master leaves though the streams go on.
    """
    masters = [site.start(workers=3)]
    with Load(site.address, site.upstream, rate=300, streams=5) as load:
        load.wait_served(100)
        for _ in range(TIMES):
            masters.append(site.upgrade() if way == "command" else site.upgrade_by_signal())
            load.wait_served(100)
        for pid in masters[:-1]:
            site.wait_gone(pid)
        load.wait_served(100)
        account = load.stop()
    assert account.dropped == 0, account.problems
    assert account.served > 100 * TIMES
    assert len(set(masters)) == TIMES + 1
    assert site.status()["pid"] == masters[-1]
    site.stop()


@pytest.mark.usefixtures("keeping")
def test_sessions_that_stay_go_on_and_end_in_the_old_process(site: Site) -> None:
    old = site.start()
    links = [site.link() for _ in range(6)]
    new = site.upgrade()
    site.assert_serves()
    for link in links:
        assert_alive(link)
    for link in links:
        link.client.shutdown(1)
        assert receive_to_end(link.upstream) == b""
    assert is_running(old)
    for link in links:
        link.upstream.sendall(b"the last word")
        link.upstream.close()
        assert receive_to_end(link.client) == b"the last word"
    site.wait_gone(old)
    assert site.master() == new
    assert site.status()["pid"] == new
    site.assert_serves()
    site.stop()


def test_the_service_manager_is_told_whom_to_watch(site: Site) -> None:
    old = site.start()
    new = site.upgrade()
    site.forwarder.wait_notified(f"MAINPID={new}")
    site.wait_gone(old)
    site.assert_serves()
    site.stop()
    site.forwarder.wait_notified("STOPPING=1")


@pytest.mark.usefixtures("keeping")
def test_the_one_to_watch_is_no_child_of_the_old_one(site: Site) -> None:
    """A service manager waits at a stop for a main process that it has inherited, for no other."""
    old = site.start()
    link = site.link()
    new = site.upgrade()
    site.forwarder.wait_notified(f"MAINPID={new}")
    assert new not in procfs.children(old)
    assert_alive(link)
    assert is_running(old)  # so nobody has inherited it because that has gone
    link.close()
    site.wait_gone(old)
    site.stop()


def test_a_watchdog_hears_from_the_new_one_too(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    old = site.start()
    site.forwarder.wait_notified("WATCHDOG=1")
    site.upgrade()
    site.wait_gone(old)
    for _ in range(15):  # the first ones may still be the old one's
        site.forwarder.wait_notified("WATCHDOG=1")
    site.stop()


def test_a_changed_configuration_is_in_force_after_it(site: Site) -> None:
    site.start(workers=2)
    with reserve_port() as holder:
        added = holder.getsockname()
        for workers in (4, 1):
            more = rule(added, site.upstream.getsockname())
            site.config.write_text(site.text(workers, more))
            new = site.upgrade()
            assert len(procfs.children(new)) == workers
            for address in (site.address, added):
                for _ in range(40):  # however many sockets there are, all are served
                    with connect(address) as client, accept(site.upstream) as peer:
                        carry(client, peer, b"x" * 100)
        site.config.write_text(site.text(1))
        site.upgrade()
        eventually(lambda: listeners(added) == 0)
        site.assert_serves()
    site.stop()


def test_a_rule_that_goes_with_an_upgrade_resets_nobody(site: Site) -> None:
    """Clients connect to it all the time, as to one that stays.

    Result: those whose handshake had begun are served; later ones are refused, not reset.
    """
    site.start(workers=3)
    with ExitStack() as stack:
        other_upstream = stack.enter_context(listen())
        going = stack.enter_context(reserve_port()).getsockname()
        more = rule(going, other_upstream.getsockname())
        for number in range(1, TIMES + 1):
            site.config.write_text(site.text(3, more))
            site.upgrade()
            with (
                Load(site.address, site.upstream, rate=200, streams=3) as load,
                Load(going, other_upstream, rate=600) as there,
            ):
                there.wait_served(100)
                site.config.write_text(site.text(3))
                site.upgrade()
                load.wait_served(100)
                eventually(lambda: listeners(going) == 0)
                site.wait_logged("upgrade: a rule has gone; serving it", times=number)
                accounts = load.stop(), there.stop()
            assert accounts[0].dropped == 0, accounts[0].problems
            assert accounts[1].dropped == accounts[1].refused, accounts[1].problems
    site.stop()


@pytest.mark.usefixtures("keeping")
def test_hup_after_an_upgrade_reaches_the_one_that_serves(site: Site) -> None:
    """Whoever sends it knows the old one only, which still has a session."""
    old = site.start()
    link = site.link()
    new = site.upgrade()
    site.forwarder.signal(signal.SIGHUP)
    site.wait_logged(r"master\.reloaded .* generation 2")
    assert site.status()["generation"] == 2
    assert_alive(link)
    link.close()
    site.wait_gone(old)
    assert site.master() == new
    site.stop()


@pytest.mark.usefixtures("keeping")
def test_a_worker_that_hangs_while_the_old_one_drains_is_ended(site: Site) -> None:
    """Nothing bounds how long it drains. Result: it does not stay for ever."""
    old = site.start(head='hang_timeout = "3s"\n')
    link = site.link()
    worker = owner(procfs.children(old), link.client)
    new = site.upgrade()
    eventually(lambda: procfs.children(old) == [worker], "the other one stays")
    os.kill(worker, signal.SIGSTOP)
    site.wait_logged(rf"worker.hung .*pid={worker}")
    site.wait_gone(old)
    assert site.master() == new
    site.assert_serves()
    site.stop()


def test_an_old_one_that_is_told_to_hurry_leaves_the_unix_sockets_of_the_new_one(
    site: Site, tmp_path: Path
) -> None:
    """It still serves a rule that has gone when it is told to stop."""
    path = tmp_path / "web.sock"
    with reserve_port() as holder:
        upstream = site.upstream.getsockname()
        to = "{}:{}".format(*upstream)
        kept = f'[[forwarding_rules]]\nlisten = "unix:{path}"\nupstream = "{to}"\n'
        site.start()
        site.config.write_text(site.text(more=kept + rule(holder.getsockname(), upstream)))
        old = site.upgrade()
        site.config.write_text(site.text(more=kept))
        site.upgrade()
        site.wait_logged(rf"\[{old}\] INFO upgrade: a rule has gone")
        os.kill(old, signal.SIGINT)
        site.wait_gone(old)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(path))
            with accept(site.upstream) as peer:
                carry(client, peer, b"x" * 100)
        assert not any("bind.lost" in line for line in site.forwarder.lines)
        site.stop()


# -- one that fails


def test_code_that_does_not_start_changes_nothing(site: Site) -> None:
    old = site.start()
    link = site.link()
    site.config.write_text(site.text() + "nonsense = [\n")
    for _ in range(2):
        done = site.run("upgrade")
        assert done.returncode == 1
        assert re.search(r"pid \d+ did not come to serve \(exit status 78\); this", done.stderr)
    assert site.master() == old
    assert site.status()["pid"] == old
    assert_alive(link)
    site.assert_serves()
    site.config.write_text(site.text())
    site.upgrade()
    link.close()
    site.stop()


def test_a_control_socket_that_cannot_be_made_changes_nothing(site: Site, tmp_path: Path) -> None:
    """The successor finds out when its workers serve already. Result: none of them is left."""
    old = site.start()
    before = members(site.forwarder.pid)
    site.config.write_text(site.text().replace(str(site.control), str(tmp_path / "no" / "c")))
    done = site.run("upgrade")
    assert done.returncode == 1
    assert "(exit status 69)" in done.stderr
    eventually(lambda: members(site.forwarder.pid) == before)
    assert site.master() == old
    for _ in range(40):
        site.assert_serves()
    site.stop()


def test_a_successor_that_is_killed_changes_nothing(site: Site) -> None:
    old = site.start()
    with Load(site.address, site.upstream, rate=200, streams=3) as load:
        successor = site.begin_upgrade()
        os.kill(successor, signal.SIGKILL)
        site.wait_logged(rf"pid {successor} did not come to serve \(without a word\)")
        load.wait_served(100)
        account = load.stop()
    assert account.dropped == 0, account.problems
    assert site.master() == old
    assert site.status()["pid"] == old
    site.stop()


DOOMED = """
import os
from forwarder import worker
worker.run_and_exit = lambda spec: os._exit(70)
"""


def test_a_successor_whose_workers_die_changes_nothing(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before they serve, again and again, so that at times there is none.

    Result: it does not take over, and what it says to the service manager ends nobody.
    """
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    old = site.start()
    link = site.link()
    (tmp_path / "sitecustomize.py").write_text(DOOMED)
    site.signal(signal.SIGUSR2)
    site.wait_logged(r"\(crash loop\)")
    assert site.master() == old
    lines = "\n".join(site.forwarder.lines)
    assert lines.count("master.ready") == 1
    successor = int(re.findall(r"upgrade: started pid=(\d+)", lines)[-1])
    os.kill(successor, signal.SIGTERM)
    site.wait_logged(rf"pid {successor} did not come to serve \(exit status 0\)")
    assert site.run("reload").returncode == 0
    assert "STOPPING=1" not in site.forwarder.wait_notified("READY=1")
    assert_alive(link)
    site.assert_serves()
    link.close()
    site.stop()


DYING = """
import os, signal
from forwarder.succession import upgrade
upgrade.tell_predecessor = lambda **_: os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_successor_that_dies_in_the_last_moment_changes_nothing(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has pid file and control socket already, and is about to turn clients of a rule away."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with reserve_port() as holder:
        going = holder.getsockname()
        more = rule(going, site.upstream.getsockname())
        site.start()
        site.config.write_text(site.text(more=more))
        old = site.upgrade()
        site.config.write_text(site.text())
        (tmp_path / "sitecustomize.py").write_text(DYING)
        site.signal(signal.SIGUSR2)
        site.wait_logged(r"did not come to serve \(without a word\)")
        assert site.master() == old
        eventually(lambda: site.run("status").returncode == 0)
        assert site.status()["pid"] == old
        for address in (site.address, going):
            with connect(address) as client, accept(site.upstream) as peer:
                carry(client, peer, b"x" * 100)
        (tmp_path / "sitecustomize.py").unlink()
        new = site.upgrade()
        site.signal(signal.SIGTERM)
        site.wait_gone(new)  # workers of the one that died are orphans for half a minute


# -- other signals meanwhile


def test_hup_during_an_upgrade_reaches_the_one_that_serves(site: Site) -> None:
    """The successor may have read the file before it was changed. Result: it reads it again."""
    site.start()
    successor = site.begin_upgrade()
    site.forwarder.signal(signal.SIGHUP)
    site.wait_logged("an upgrade is under way")
    os.kill(successor, signal.SIGCONT)
    site.wait_logged(f"pid={successor} serves")
    site.wait_logged(r"master\.reloaded .* generation 2")
    assert site.status()["generation"] == 2
    assert site.master() == successor
    site.stop()


def test_hup_during_an_upgrade_that_fails_reloads_the_old(site: Site) -> None:
    old = site.start()
    successor = site.begin_upgrade()
    site.forwarder.signal(signal.SIGHUP)
    site.wait_logged("an upgrade is under way")
    site.config.write_text(site.text())
    os.kill(successor, signal.SIGKILL)
    site.wait_logged(r"master\.reloaded .* generation 2")
    assert site.status()["pid"] == old
    site.stop()


@pytest.mark.parametrize("is_suspended", [True, False])
def test_term_during_an_upgrade_leaves_no_process(site: Site, is_suspended: bool) -> None:
    site.start()
    successor = site.begin_upgrade()
    if not is_suspended:
        os.kill(successor, signal.SIGCONT)
    site.forwarder.signal(signal.SIGTERM)
    site.wait_logged("master.stopping")
    site.assert_nothing_left()
    assert site.forwarder.wait() == 0


def test_a_second_upgrade_at_once_waits_for_the_first(site: Site) -> None:
    site.start()
    successor = site.begin_upgrade()
    site.forwarder.signal(signal.SIGUSR2)
    assert "an upgrade is under way" in site.run("workers", "+1").stderr
    assert "an upgrade is under way" in site.run("reload").stderr
    os.kill(successor, signal.SIGCONT)
    site.wait_logged(f"pid={successor} serves")
    assert sum("upgrade: started" in line for line in site.forwarder.lines) == 1
    assert site.status()["pid"] == successor
    site.stop()


@pytest.fixture
def two(
    launch: Launch, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Two]:
    """Where control sockets are, and two instances, the first of which has the default place."""
    directory = tmp_path / "run"
    directory.mkdir()
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(directory))
    with reserve_port() as holder:
        pairs = ["-r", "{}:{}".format(*site.upstream.getsockname())]
        first, second = (
            launch("-l", "{}:{}".format(*address), *pairs, "--workers", "1")
            for address in (holder.getsockname(), site.address)
        )
        yield directory, first, second


def test_an_instance_without_control_socket_of_its_own_leaves_that_of_another(two: Two) -> None:
    """Two share the default place: the second has its pid in the name, after an upgrade too."""
    directory, first, second = two
    theirs = directory / "control.sock"
    ours = directory / f"control-{second.pid}.sock"
    done = run_command("upgrade", "--control", str(ours))
    assert done.returncode == 0, done.stderr
    new = int(done.stdout.split()[1])
    eventually(lambda: not ours.exists(), within_s=PATIENCE_S)
    for path, pid in ((theirs, first.pid), (directory / f"control-{new}.sock", new)):
        said = run_command("status", "--json", "--control", str(path))
        assert json.loads(said.stdout)["pid"] == pid


@pytest.mark.usefixtures("keeping")
def test_one_that_drains_takes_over_no_name(site: Site, two: Two) -> None:
    """The name of another instance gets free: it is for the one that serves."""
    directory, first, second = two
    link = site.link()
    done = run_command("upgrade", "--control", str(directory / f"control-{second.pid}.sock"))
    assert done.returncode == 0, done.stderr
    new = int(done.stdout.split()[1])
    second.wait_logged(rf"\[{second.pid}\] INFO master.stopping how=drain")
    os.kill(new, signal.SIGSTOP)  # it would be first
    assert first.stop() == 0
    status = ("status", "--json", "--control", str(directory / f"control-{second.pid}.sock"))
    uptime_s = json.loads(run_command(*status).stdout)["uptime_s"]
    eventually(lambda: json.loads(run_command(*status).stdout)["uptime_s"] > uptime_s + 2 * LOOK_S)
    assert not (directory / "control.sock").exists()
    os.kill(new, signal.SIGCONT)
    second.wait_logged(rf"\[{new}\] INFO control: listening at .*/control\.sock$")
    assert json.loads(run_command("status", "--json").stdout)["pid"] == new
    link.close()
    assert run_command("stop").returncode == 0
    assert second.wait() == 0


def test_the_name_of_an_instance_that_goes_is_taken_over(two: Two) -> None:
    """The second one began while the first had it. Result: commands find it without --control."""
    directory, first, second = two
    assert (directory / f"control-{second.pid}.sock").exists()
    assert first.stop() == 0
    second.wait_logged(r"control: listening at .*/control\.sock$")
    assert [path.name for path in directory.iterdir()] == ["control.sock"]
    said = run_command("status", "--json")
    assert json.loads(said.stdout)["pid"] == second.pid
    assert second.stop() == 0
    assert list(directory.iterdir()) == []
