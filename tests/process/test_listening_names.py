"""Names to listen on: they hold up nobody else, and what is bound stays so without them."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from support.ends import accept, carry, connect
from support.processes import listeners, run_command
from support.waiting import eventually

if TYPE_CHECKING:
    from support.named import Named as Site

pytestmark = pytest.mark.process


@pytest.fixture
def site(named: Site) -> Site:
    """One of whose rules ``web`` listens on a name."""
    named.hosts["web"] = "web.example"
    named.names.give("web.example", "127.0.0.1")
    return named


def rule_of(site: Site, name: str) -> dict[str, object]:
    """A rule as in the status."""
    (found,) = (rule for rule in site.status()["rules"] if rule["name"] == name)
    assert isinstance(found, dict)
    return found


def test_a_rule_on_a_name_listens_when_it_is_ready(site: Site) -> None:
    it = site.start(plain="127.0.0.1", web="127.0.0.1")
    assert rule_of(site, "web")["state"] == "listening"
    site.assert_serves("web")
    assert not it.forwarder.trouble()
    site.stop()


@pytest.mark.parametrize("how", ["silent", "refused"])
def test_a_start_in_an_outage_serves_the_rest_at_once_and_the_name_when_that_is_over(
    site: Site, how: str
) -> None:
    site.names.stop_server(how)
    it = site.begin(plain="127.0.0.1", web="127.0.0.1")
    it.forwarder.wait_logged("worker.ready slot=1")
    site.assert_serves("plain")
    it.forwarder.wait_notified("READY=1")
    assert rule_of(site, "web")["state"] == "waiting"
    assert listeners(site.address("web")) == 0
    site.names.start_server()
    eventually(lambda: listeners(site.address("web")) == 2)
    site.assert_serves("web")
    assert rule_of(site, "web")["state"] == "listening"
    site.stop()


def test_a_name_that_means_nothing_is_an_error_of_the_start(site: Site) -> None:
    """Nothing is left of it."""
    site.names.forget("web.example")
    it = site.begin(plain="127.0.0.1", web="127.0.0.1")
    assert it.forwarder.wait() == 69
    assert "cannot listen on web.example:" in it.forwarder.lines[-1]
    assert "Name or service not known" in it.forwarder.lines[-1]
    assert listeners(site.address("plain")) == 0


def test_so_is_a_name_whose_address_is_taken(site: Site) -> None:
    with site.taken("web"):
        it = site.begin(plain="127.0.0.1", web="127.0.0.1")
        assert it.forwarder.wait() == 69
        assert "Address already in use" in it.forwarder.lines[-1]


def test_a_rule_that_may_wait_does(site: Site) -> None:
    site.names.forget("web.example")
    it = site.begin("--keep-going", plain="127.0.0.1", web="127.0.0.1")
    it.forwarder.wait_notified("READY=1")
    site.assert_serves("plain")
    assert "Name or service not known" in str(rule_of(site, "web")["why"])
    site.names.give("web.example", "127.0.0.1")
    eventually(lambda: listeners(site.address("web")) == 2)
    site.stop()


@pytest.mark.parametrize("how", ["silent", "refused", "gone"])
def test_a_reload_leaves_what_is_bound_however_its_name_fares(site: Site, how: str) -> None:
    """It adds another rule, and then changes this one."""
    site.start(web="127.0.0.1")
    with connect(site.address("web")) as client, accept(site.upstream) as far:
        if how == "gone":
            site.names.forget("web.example")
        else:
            site.names.stop_server(how)
        assert "+1 -0 ~0 =1" in site.reload(web="127.0.0.1", plain="127.0.0.1")
        site.assert_serves("web")
        assert "+0 -0 ~1 =1" in site.reload(web="127.0.0.1 127.0.0.2", plain="127.0.0.1")
        site.assert_serves("web")
        carry(client, far, b"still there")
    assert rule_of(site, "web")["state"] == "listening"
    site.stop()


def test_an_upgrade_in_an_outage_listens_where_the_old_one_does(site: Site) -> None:
    it = site.start(web="127.0.0.1")
    site.names.stop_server()
    assert run_command("upgrade", "--control", str(site.control)).returncode == 0
    assert it.forwarder.process.wait(30) == 0
    site.assert_serves("web", 20)
    assert run_command("stop", "--control", str(site.control)).returncode == 0


def test_a_reload_follows_a_name_that_has_moved(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORWARDER_TEST_TTL", "1")
    it = site.start(web="127.0.0.1")
    here = site.address("web")
    there = (f"127.93.{os.getpid() % 250}.1", here[1])
    site.names.give("web.example", there[0])
    it.forwarder.wait_logged("name.moved host=web.example")
    site.assert_serves("web")
    site.reload(web="127.0.0.1")
    assert listeners(there) == 2
    eventually(lambda: listeners(here) == 0)
    site.stop()


def test_a_reload_with_a_new_name_that_means_nothing_is_rejected(site: Site) -> None:
    it = site.start(web="127.0.0.1")
    site.hosts["new"] = "no-such.example"
    assert "stays in force" in site.reload(web="127.0.0.1", new="127.0.0.1")
    it.forwarder.wait_logged("reload.rejected.*cannot listen on no-such.example")
    site.assert_serves("web")
    site.stop()


def test_a_reload_with_a_new_name_in_an_outage_serves_it_later(site: Site) -> None:
    site.start(web="127.0.0.1")
    site.hosts["new"] = "new.example"
    site.names.give("new.example", "127.0.0.1")
    site.names.stop_server("refused")
    assert "waiting for an address: new" in site.reload(web="127.0.0.1", new="127.0.0.1")
    site.assert_serves("web")
    site.names.start_server()
    eventually(lambda: listeners(site.address("new")) == 2)
    site.assert_serves("new")
    site.stop()


def test_a_stop_does_not_wait_for_the_name_of_a_listener(site: Site) -> None:
    site.names.stop_server()
    it = site.begin(plain="127.0.0.1", web="127.0.0.1")
    it.forwarder.wait_logged("worker.ready slot=1")
    it.forwarder.signal(signal.SIGTERM)
    assert it.forwarder.wait() == 0
