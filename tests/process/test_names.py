"""Names of upstreams: one process asks for all, nothing waits for it or breaks with it."""

from __future__ import annotations

import os
import select
import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from support import procfs
from support.ends import (
    accept,
    be_reset,
    carry,
    connect,
    listen,
    receive_exactly,
    receive_to_reset,
)
from support.hosts import own_host
from support.processes import listeners, run_command, state
from support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    import socket

    from support.named import Named as Site

pytestmark = pytest.mark.process


@pytest.fixture
def site(named: Site) -> Site:
    """One whose rules lead to names."""
    return named


# -- start, reload and upgrade wait for no look-up


def test_a_start_with_dead_names_listens_at_once(site: Site) -> None:
    """Where the names are never answered, it is ready all the same, and serves the rest."""
    dead = [f"dead{i}.example" for i in range(100)]
    site.names.silence(*dead)
    site.start(plain="127.0.0.1", **{f"rule{i}": host for i, host in enumerate(dead)})
    site.assert_serves("plain")
    assert all(listeners(site.address(f"rule{i}")) == 2 for i in range(100))
    assert set(site.troubles("rule7")) == {"dead7.example"}
    site.stop()


def test_a_start_in_an_outage_serves_as_soon_as_that_is_over(site: Site) -> None:
    """The first client waits for the name, within its connect_timeout."""
    site.names.stop_server()
    site.names.give("db.example", "127.0.0.1")
    site.start(web="db.example")
    with connect(site.address("web")) as client:
        client.sendall(b"early")
        eventually(lambda: site.names.asked()["db.example"] == 1)
        site.names.start_server()
        with accept(site.upstream) as far:
            carry(far, client, b"back")
            assert far.recv(5) == b"early"
    site.stop()


def test_a_reload_in_an_outage_is_accepted_and_breaks_nothing(site: Site) -> None:
    """It adds a rule with an address, one with a name, and a global rule of access."""
    site.names.give("db.example", "127.0.0.1")
    site.start(web="db.example")
    site.wait_known("web")
    site.names.stop_server()
    assert "+2 -0" in site.reload(
        '[[global_rules]]\ntype = "deny"\npattern = "192.0.2.1"',
        web="db.example",
        plain="127.0.0.1",
        new="other.example",
    )
    for _ in range(10):
        site.assert_serves("web", 1)
        site.assert_serves("plain", 1)
    assert site.troubles("new")["other.example"]["state"] == "asked"
    site.names.give("other.example", "127.0.0.1")
    site.names.start_server()
    site.assert_serves("new")
    site.stop()


def test_an_upgrade_in_an_outage_resets_nobody(site: Site) -> None:
    """The new one knows what the old one knew, from its first client on."""
    site.names.give("db.example", "127.0.0.1")
    it = site.start(web="db.example")
    site.wait_known("web")
    site.names.stop_server()
    old = site.status()["pid"]
    assert run_command("upgrade", "--control", str(site.control)).returncode == 0
    assert it.forwarder.process.wait(30) == 0
    assert site.status()["pid"] != old
    site.assert_serves("web", 20)
    assert run_command("stop", "--control", str(site.control)).returncode == 0


@pytest.mark.parametrize("how", ["silent", "refused"])
def test_in_an_outage_a_replaced_and_an_added_worker_know_the_addresses(
    site: Site, how: str
) -> None:
    site.names.give("db.example", "127.0.0.1")
    it = site.start(web="db.example")
    site.wait_known("web")
    site.names.stop_server(how)
    before = it.forwarder.workers()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: len(set(it.forwarder.workers()) - set(before)) == 2)
    eventually(lambda: all(w["state"] == "ready" for w in site.status()["workers"]))
    site.assert_serves("web", 20)
    it.resize(signal.SIGTTIN, 3)
    site.assert_serves("web", 20)
    site.stop()


# -- a dead name costs nobody anything who has another one


def test_a_dead_name_beside_an_address_delays_nobody(site: Site) -> None:
    """Neither while it is asked for nor after that."""
    site.names.silence("db.dead")
    site.start(mixed="db.dead 127.0.0.1")
    site.assert_serves("mixed", 20)
    assert site.names.asked()["db.dead"] == 1
    site.stop()


def test_dead_names_of_other_rules_do_not_starve_a_live_one(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than there are threads for all; clients ask for some of them."""
    monkeypatch.setenv("FORWARDER_TEST_TTL", "1")
    dead = [f"dead{i}.example" for i in range(100)]
    site.names.silence(*dead)
    site.names.give("live.example", "127.0.0.1")
    rules = {f"rule{i}": f"dead{i}.example" for i in range(6)}
    it = site.start(live="live.example", many=" ".join(dead[6:]), **rules)
    site.wait_known("live")
    with ExitStack() as clients:
        for rule in rules:
            clients.enter_context(connect(site.address(rule)))
        for number in range(2, 5):
            site.names.give("live.example", f"127.0.0.{number}")
            it.forwarder.wait_logged(f"name.moved host=live.example .*127.0.0.{number}")
    site.stop()


def test_one_name_that_fails_at_once_and_one_that_is_slow_serve_the_first_client(
    site: Site,
) -> None:
    site.names.silence("b.slow")
    site.start(both="x.nx b.slow")
    with connect(site.address("both")) as client:
        eventually(lambda: site.names.asked()["b.slow"] == 1 and site.names.asked()["x.nx"] >= 1)
        site.wait_failed("both", "x.nx")
        site.names.give("b.slow", "127.0.0.1")
        with accept(site.upstream) as far:
            carry(far, client, b"served")
    site.stop()


def test_a_client_of_the_first_moment_waits_for_the_name_when_the_address_beside_it_refuses(
    site: Site,
) -> None:
    site.names.silence("b.slow")
    site.start(both=f"{own_host(7)} b.slow")
    with connect(site.address("both")) as client:
        eventually(lambda: site.status()["rules"][0]["attempts_failed"] == 1)
        client.sendall(b"request")
        site.names.give("b.slow", "127.0.0.1")
        with accept(site.upstream) as far:
            assert receive_exactly(far, 7) == b"request"
            carry(far, client, b"served")
    assert site.status()["rules"][0]["connects_failed"] == 0
    site.stop()


def test_a_client_of_a_name_that_has_failed_is_reset_at_once_and_it_is_said_why(
    site: Site,
) -> None:
    it = site.start(web="no-such.example")
    site.wait_failed("web", "no-such.example")
    be_reset(site.address("web"))
    it.forwarder.wait_logged("connect.failed rule=web.*no-such.example: Name or service not known")
    site.names.give("no-such.example", "127.0.0.1")
    site.wait_known("web")
    site.assert_serves("web")
    site.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_does_not_wait_for_look_ups(site: Site, number: signal.Signals) -> None:
    """Nor for a client who waits for one."""
    site.names.silence(*(f"dead{i}.example" for i in range(30)))
    it = site.start(**{f"rule{i}": f"dead{i}.example" for i in range(30)})
    eventually(lambda: len(site.names.asked()) == 30)
    with connect(site.address("rule3")) as client:
        eventually(lambda: site.status()["totals"]["sessions"] == 1)
        it.forwarder.signal(number)
        # Within a second, where the look-up alone takes eight, and a drain may take thirty.
        eventually(lambda: it.forwarder.process.poll() is not None, within_s=7)
        assert it.forwarder.wait() == 0
        receive_to_reset(client)


# -- what was found once stays, and is refreshed


def test_a_name_that_moves_is_followed_though_nobody_comes(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first client after a quiet time is led to where the name leads by then."""
    monkeypatch.setenv("FORWARDER_TEST_TTL", "1")
    site.names.give("db.example", "127.0.0.1")
    site.start(web="db.example")
    site.wait_known("web")
    with listen("127.0.0.9", site.upstream.getsockname()[1]) as moved:
        site.names.give("db.example", "127.0.0.9")
        site.it.forwarder.wait_logged("name.moved host=db.example rules=web: 127.0.0.9")
        # The workers are told right after that.
        eventually(lambda: _reached(site, moved, site.upstream) is moved)
    assert site.logged("name.moved") == 1
    site.stop()


def _reached(site: Site, *upstreams: socket.socket) -> socket.socket:
    """Which of some upstreams a new client of ``web`` is led to."""
    with connect(site.address("web")):
        (found, *_), _, _ = select.select(upstreams, (), (), PATIENCE_S)
        accept(found).close()
        return found


def test_an_outage_is_told_once_and_so_is_its_end(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the status for as long as it lasts, with what is used instead."""
    monkeypatch.setenv("FORWARDER_TEST_TTL", "1")
    site.names.give("db.example", "127.0.0.1")
    it = site.start(web="db.example")
    site.wait_known("web")
    site.names.stop_server("refused")
    site.wait_failed("web", "db.example")
    trouble = site.troubles("web")["db.example"]
    assert trouble["addresses"] == ["127.0.0.1"]
    assert "Temporary failure" in trouble["why"]
    shown = run_command("status", "--control", str(site.control)).stdout
    assert "rule web: db.example unresolved for" in shown
    assert "; in use: 127.0.0.1" in shown
    asked = site.names.asked()["db.example"]
    eventually(lambda: site.names.asked()["db.example"] >= asked + 2)
    site.assert_serves("web")
    site.names.start_server()
    site.wait_known("web")
    it.forwarder.wait_logged("name.works host=db.example rules=web: 127.0.0.1")
    assert site.logged("name.failed") == 1
    site.stop()


def test_a_rule_may_lead_to_a_name_that_another_one_listens_on(site: Site) -> None:
    """It comes with a reload, when the name has long been known, or comes back with one."""
    site.hosts["web"] = "both.example"
    site.names.give("both.example", "127.0.0.1")
    site.start(web="127.0.0.1")
    site.assert_serves("web")
    for _ in range(2):
        site.reload(web="127.0.0.1", new="both.example")
        site.assert_serves("new")
        site.reload(web="127.0.0.1")
        eventually(lambda: listeners(site.address("new")) == 0)
    site.stop()


# -- the helper itself


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_helper_that_dies_or_hangs_is_replaced_and_nobody_notices(
    site: Site, number: signal.Signals
) -> None:
    site.names.give("db.example", "127.0.0.1")
    it = site.start("hang_timeout = 3", web="db.example")
    site.wait_known("web")
    old = site.helper()
    os.kill(old, number)
    site.assert_serves("web", 20)
    eventually(lambda: it.forwarder.helpers() not in ([], [old]))
    it.forwarder.wait_logged("helper.died name=checker")
    site.names.give("new.example", "127.0.0.1")
    site.reload("hang_timeout = 3", web="db.example", new="new.example")
    site.assert_serves("new")
    site.stop()


def test_while_an_instance_drains_its_helper_is_replaced_too(site: Site) -> None:
    """Flows that are left may last for hours, and follow names."""
    site.names.give("db.example", "127.0.0.1")
    it = site.start(web="db.example")
    site.wait_known("web")
    with connect(site.address("web")) as client, accept(site.upstream) as far:
        it.forwarder.signal(signal.SIGTERM)
        it.forwarder.wait_logged("master.stopping how=drain")
        old = site.helper()
        os.kill(old, signal.SIGKILL)
        eventually(lambda: it.forwarder.helpers() not in ([], [old]))
        carry(client, far, b"still there")
    assert it.forwarder.wait() == 0


def test_a_helper_is_there_while_a_rule_has_a_name(site: Site) -> None:
    """It has no listening socket, and takes nothing with it when it goes."""
    site.names.give("db.example", "127.0.0.1")
    it = site.start(plain="127.0.0.1")
    assert it.forwarder.helpers() == []
    site.reload(plain="127.0.0.1", web="db.example")
    helper = site.helper()
    site.assert_serves("web")
    eventually(lambda: procfs.socket_count(helper) == 1, lambda: str(procfs.descriptors(helper)))
    site.reload(plain="127.0.0.1")
    eventually(lambda: it.forwarder.helpers() == [])
    site.assert_serves("plain")
    assert site.logged("helper.died") == 0
    site.stop()


@pytest.mark.parametrize("is_stopped", [False, True])
def test_the_helper_of_a_killed_master_does_not_stay(site: Site, is_stopped: bool) -> None:
    site.names.give("db.example", "127.0.0.1")
    it = site.start(web="db.example")
    helper = site.helper()
    if is_stopped:
        os.kill(helper, signal.SIGSTOP)
    os.kill(it.forwarder.pid, signal.SIGKILL)
    eventually(lambda: not _lives(helper))


def _lives(pid: int) -> bool:
    try:
        return state(pid) not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run workers as somebody else")
def test_the_helper_has_the_rights_of_a_worker_and_less(site: Site) -> None:
    """Its user is theirs, it has no capability, and gets none back."""
    site.names.give("db.example", "127.0.0.1")
    it = site.start('user = "nobody"', web="db.example")
    worker, helper = it.forwarder.workers()[0], site.helper()
    eventually(lambda: procfs.credentials(helper)["Uid"] == procfs.credentials(worker)["Uid"])
    found = procfs.credentials(helper)
    assert found["Gid"] == procfs.credentials(worker)["Gid"]
    assert {int(found[kind], 16) for kind in ("CapEff", "CapPrm", "CapInh")} == {0}
    assert found["NoNewPrivs"] == "1"
    site.stop()


def test_five_hundred_names_are_known_to_all_workers(site: Site) -> None:
    """More than fits into one message; a worker that comes later knows them at once."""
    hosts = [f"server-{i}.a-rather-long-domain-name.example" for i in range(500)]
    for i, host in enumerate(hosts):
        site.names.give(host, "127.0.0.1", f"127.1.{i // 250}.{i % 250}")
    it = site.start(all=" ".join(hosts))
    site.wait_known("all")
    site.names.stop_server()
    before = it.forwarder.workers()
    os.kill(before[0], signal.SIGKILL)
    eventually(lambda: len(set(it.forwarder.workers()) - {before[0]}) == 2)
    eventually(lambda: all(w["state"] == "ready" for w in site.status()["workers"]))
    site.assert_serves("all", 20)
    site.stop()
