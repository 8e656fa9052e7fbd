"""Limits of sessions through reloads, resizes and upgrades; what was before counts."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from support.ends import accept, carry, connect
from support.forwarder import reserve_port
from support.limited import LIMIT
from support.processes import run_command
from support.waiting import eventually

if TYPE_CHECKING:
    from process.conftest import Limit

pytestmark = pytest.mark.process


def test_reloads_add_lower_and_remove_limits_and_nobody_ends(limit: Limit) -> None:
    it = limit("", workers=2)
    for _ in range(6):
        it.link()
    it.reload("max_sessions = 8")  # those that are open count
    it.link(), it.link()
    it.refused()
    it.reload("max_sessions = 3")  # nobody is ended, nobody is new until there are fewer
    it.refused()
    for _ in range(5):
        it.links.pop(0).close()
    eventually(lambda: it.status()["sessions"] == 3)
    it.refused()
    it.links.pop().close()
    eventually(lambda: it.status()["sessions"] == 2)
    it.link()
    it.refused()
    it.reload("max_sessions = 100\nmax_sessions_per_client = 3")  # all are of one client
    it.refused()
    it.reload("max_sessions = 100\nmax_sessions_per_client = 4")
    it.link()
    it.refused()
    it.reload("", top="max_sessions = 4")
    it.refused()
    it.reload("")
    for _ in range(5):
        it.link()
    for link in it.links:
        carry(link.client, link.upstream, b"still here")
    it.close_links()
    it.reload(f"max_sessions = {LIMIT}\nmax_sessions_per_client = {LIMIT}")
    it.assert_all_places_free()


def test_sessions_of_rules_that_are_gone_count_among_all(limit: Limit) -> None:
    it = limit("", workers=2, top="max_sessions = 5")
    for _ in range(3):
        it.link()
    text = it.text("", "max_sessions = 5").replace('name = "one"', 'name = "other"')
    assert "reloaded" in it.it.reload(text)
    it.link(), it.link()
    it.refused()
    it.links.pop(0).close()
    eventually(it.link_if_there_is_room)


def test_who_waits_for_a_slow_rate_goes_on_when_a_reload_takes_it_away(limit: Limit) -> None:
    it = limit('rate = "1/h"\non_limit = "queue"', workers=2)
    it.link()
    with connect(it.address) as client:
        it.it.forwarder.wait_logged("limit.reached rule=one: rate; clients wait in the queue")
        it.reload('on_limit = "queue"', top="max_sessions = 100")
        with accept(it.upstream) as there:
            carry(client, there, b"x")


def test_what_a_removed_rule_has_used_up_is_not_missed_by_the_next_one(limit: Limit) -> None:
    """The row of the first rule is given to the second one."""
    it = limit('rate = "1/h"\nrate_per_client = "1/h"', workers=2)
    it.link().close()
    it.links.clear()
    it.refused()
    with reserve_port() as holder:
        host, port = holder.getsockname()
        other = f'[[forwarding_rules]]\nname = "other"\nlisten = "{host}:{port}"\n'
        other += 'upstream = "{}:{}"\n'.format(*it.upstream.getsockname())
        assert "reloaded" in it.it.reload(it.head + other)
        eventually(lambda: "one" not in str(run_command("status", "--control", it.control).stdout))
        assert "reloaded" in it.it.reload(it.head + other)
        text = it.text('rate = "1/h"\nrate_per_client = "1/h"')
        assert "reloaded" in it.it.reload(text.replace('name = "one"', 'name = "two"') + other)
        it.link()


def test_limits_hold_through_resizes(limit: Limit) -> None:
    it = limit(f"max_sessions = {LIMIT}", workers=2)
    for _ in range(LIMIT):
        it.link()
    it.it.resize(signal.SIGTTIN, 3)
    it.refused()
    it.it.resize(signal.SIGTTOU, 2)
    it.it.resize(signal.SIGTTOU, 1)
    for link in it.links:
        carry(link.client, link.upstream, b"still here")
    it.refused()
    it.close_links()
    it.assert_all_places_free()


def test_after_an_upgrade_sessions_that_came_along_count(limit: Limit) -> None:
    it = limit(f"max_sessions = {LIMIT}", workers=2)
    for _ in range(LIMIT):
        it.link()
    old = it.it.forwarder.pid
    it.it.forwarder.signal(signal.SIGUSR2)
    it.it.forwarder.wait_logged(rf"\[{old}\] INFO master\.stopped .* moved={LIMIT}")
    it.refused()
    it.close_links()
    it.assert_all_places_free()


@pytest.mark.usefixtures("keeping")
def test_after_an_upgrade_sessions_that_stay_do_not_count_in_the_new_instance(limit: Limit) -> None:
    it = limit(f"max_sessions = {LIMIT}", workers=2)
    kept = it.link()
    it.it.forwarder.signal(signal.SIGUSR2)
    it.it.forwarder.wait_notified("READY=1")
    done = run_command("status", "--json", "--control", it.control)
    assert done.returncode == 0
    it.assert_all_places_free()
    carry(kept.client, kept.upstream, b"still here")
    kept.close()
    it.links.clear()
