"""The shipped unit under a real systemd: upgrades, stops and restarts, and sessions meanwhile."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

import pytest
from support.configured import many_rules
from support.ends import carry, receive_to_end
from support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    import subprocess

    from support.ends import Link

    from systemd.conftest import Unit

pytestmark = pytest.mark.process


def end_well(links: list[Link], job: subprocess.Popen[str]) -> None:
    """Sessions go on while systemd waits, and end by themselves; then it is done."""
    for link in links:
        carry(link.client, link.upstream, b"x" * 1000)
        assert job.poll() is None
        link.client.shutdown(1)
        assert receive_to_end(link.upstream) == b""
        link.upstream.sendall(b"the last word")
        link.upstream.close()
        assert receive_to_end(link.client) == b"the last word"
    assert job.wait(2 * PATIENCE_S) == 0


@pytest.mark.parametrize("verb", ["stop", "restart"])
@pytest.mark.parametrize("upgrades", [0, 1, 2])
def test_a_stop_lets_all_sessions_end(unit: Unit, verb: str, upgrades: int) -> None:
    """One begun before each upgrade, and one after the last."""
    unit.systemctl("start")
    links = [unit.link()]
    for _ in range(upgrades):
        unit.upgrade()
        links.append(unit.link())
    old = unit.master()
    job = unit.begin(verb)
    unit.wait_logged(rf"\[{old}\] INFO master.stopping how=drain sessions={len(links)}")
    end_well(links, job)
    if verb == "restart":
        assert unit.master() != old
        assert unit.show("Result") == "success"
        unit.link().close()
        unit.systemctl("stop")
    unit.assert_stopped_well()


def test_sessions_go_on_in_the_new_main_process_and_no_old_one_stays(unit: Unit) -> None:
    """Through upgrades; then the main process is killed, and the one that systemd starts has them.

    The workers must outlive their master for that, which is not what the shipped unit says.
    """
    unit.set_more("KillMode=process\n")
    unit.systemctl("start")
    links = [unit.link() for _ in range(4)]
    links[0].client.shutdown(1)
    for _ in range(2):
        new = unit.upgrade()
        assert unit.master() == new
    workers = unit.workers()
    unit.kill(new, signal.SIGKILL)
    eventually(lambda: unit.master() not in (0, new), unit.journal)
    eventually(lambda: not any(map(unit.is_running, workers)), unit.journal)
    for link in links[1:]:
        carry(link.client, link.upstream, b"x" * 1000)
    carry(links[0].upstream, links[0].client, b"x" * 1000)
    job = unit.begin("stop")
    unit.wait_logged(rf"\[{unit.master()}\] INFO master\.stopping how=drain sessions=4")
    links[0].close()
    end_well(links[1:], job)
    unit.assert_stopped_well()


def test_a_stop_when_idle_after_an_upgrade_is_a_success(unit: Unit) -> None:
    unit.systemctl("start")
    unit.upgrade()
    unit.systemctl("stop")
    unit.assert_stopped_well()


def test_sessions_from_before_an_upgrade_are_reset_by_us_at_the_end_of_drain_timeout(
    unit: Unit,
) -> None:
    """Not by a SIGKILL of systemd."""
    unit.systemctl("start")
    link = unit.link()
    unit.write(head='drain_timeout = "1s"\n')
    unit.upgrade()
    unit.systemctl("stop")
    unit.wait_logged(r"master\.stopped ended=0 cut=1")
    link.close()
    unit.assert_stopped_well()


def test_forwarder_stop_after_an_upgrade_ends_the_unit_well(unit: Unit) -> None:
    unit.systemctl("start")
    links = [unit.link()]
    unit.upgrade()
    job = unit.box.popen(sys.executable, "-m", "forwarder", "stop")
    unit.wait_logged(r"how=drain sessions=1 limit_s=30")
    with job:
        end_well(links, job)
        assert job.stdout is not None
        assert job.stdout.read().startswith("stopped: 1 ended, 0 reset after ")
    eventually(lambda: unit.show("ActiveState") == "inactive", unit.journal)
    unit.assert_stopped_well()


def test_a_reload_after_an_upgrade_reaches_the_new_one(unit: Unit) -> None:
    unit.systemctl("start")
    new = unit.upgrade()
    unit.write(head="cut_denied = true\n")
    unit.systemctl("reload")
    unit.wait_logged(rf"\[{new}\] INFO master\.reloaded .*generation 2")
    assert unit.master() == new
    unit.write(more="nonsense = [\n")
    assert unit.box.run("systemctl", "reload", "forwarder").returncode != 0
    assert unit.show("ActiveState") == "active"
    unit.systemctl("stop")
    unit.assert_stopped_well()


def test_the_watchdog_watches_the_new_one(unit: Unit) -> None:
    """Suspended, it is found and replaced; the old one, which has gone, is missed by nobody."""
    unit.set_more("WatchdogSec=3\n")
    unit.systemctl("start")
    new = unit.upgrade()
    unit.kill(new, signal.SIGSTOP)
    eventually(lambda: unit.master() not in (0, new), unit.journal, within_s=2 * PATIENCE_S)
    eventually(lambda: unit.show("ActiveState") == "active", unit.journal)
    unit.link().close()
    assert unit.show("NRestarts") == "1"
    unit.systemctl("stop")


def begin_upgrade(unit: Unit) -> int:
    """Begin one whose successor takes a while, and suspend that; returns its pid."""
    unit.write(more=many_rules(600))
    unit.kill(unit.master(), signal.SIGUSR2)
    unit.wait_logged(r"upgrade: started pid=")
    successor = int(unit.journal().rpartition("upgrade: started pid=")[2].split()[0])
    unit.kill(successor, signal.SIGSTOP)
    return successor


def test_a_successor_that_is_killed_costs_nothing(unit: Unit) -> None:
    unit.systemctl("start")
    link = unit.link()
    old = unit.master()
    unit.kill(begin_upgrade(unit), signal.SIGKILL)
    unit.wait_logged(r"did not come to serve \(without a word\)")
    assert unit.master() == old
    job = unit.begin("stop")
    unit.wait_logged(r"master\.stopping how=drain")
    end_well([link], job)
    unit.assert_stopped_well()


def test_a_stop_during_an_upgrade_ends_both(unit: Unit) -> None:
    unit.systemctl("start")
    link = unit.link()
    begin_upgrade(unit)
    job = unit.begin("stop")
    unit.wait_logged(r"master\.stopping how=drain")
    end_well([link], job)
    unit.assert_stopped_well()


def test_a_new_one_that_is_killed_is_started_again(unit: Unit) -> None:
    unit.systemctl("start")
    new = unit.upgrade()
    unit.kill(new, signal.SIGKILL)
    eventually(lambda: unit.master() not in (0, new), unit.journal)
    eventually(lambda: unit.show("ActiveState") == "active", unit.journal)
    unit.link().close()
    unit.systemctl("stop")
    unit.assert_stopped_well()
