"""A bug when workers put a configuration in force: the reload fails, and what ran goes on."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
from support.configured import rule
from support.control import ask
from support.ends import accept, carry, connect, listen
from support.forwarder import reserve_port
from support.processes import run_command
from support.waiting import eventually

if TYPE_CHECKING:
    from contextlib import ExitStack
    from pathlib import Path

    from conftest import StartForwarder

pytestmark = pytest.mark.process

# What fails for a rule that is called broken: before anything has changed, halfway, or at the end.
PLANTED = {
    "at the beginning": """
from forwarder import worker
access_of = worker.access_of
def planted(config, rule):
    if rule.name == "broken":
        raise RuntimeError("planted")
    return access_of(config, rule)
worker.access_of = planted
""",
    "halfway": """
from forwarder import worker
listener_class = worker.listener_class
def planted(rule):
    if rule.name == "broken":
        raise RuntimeError("planted")
    return listener_class(rule)
worker.listener_class = planted
""",
    "and the worker with it": """
import os
from forwarder import worker
listener_class = worker.listener_class
def planted(rule):
    if rule.name == "broken":
        os._exit(1)
    return listener_class(rule)
worker.listener_class = planted
""",
}


@pytest.mark.expects_log
@pytest.mark.parametrize("where", PLANTED)
def test_a_reload_that_workers_cannot_serve_fails_and_what_ran_goes_on(
    start_forwarder: StartForwarder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stack: ExitStack,
    where: str,
) -> None:
    """*Result*: who asked is told; sessions live, clients are served, the new address is not."""
    (tmp_path / "sitecustomize.py").write_text(PLANTED[where])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    one, two = (stack.enter_context(reserve_port()).getsockname() for _ in range(2))
    upstream = stack.enter_context(listen())
    path, control = tmp_path / "forwarder.toml", tmp_path / "control"
    good = rule(one, upstream.getsockname(), 'name = "good"')
    path.write_text("workers = 2\n" + good)
    it = start_forwarder("-c", str(path), "--control", str(control))
    workers = sorted(it.workers())
    client, far = stack.enter_context(connect(one)), stack.enter_context(accept(upstream))

    path.write_text("workers = 2\n" + rule(two, upstream.getsockname(), 'name = "broken"') + good)
    answer = ask(control, "reload")
    assert not answer["ok"]
    assert "the workers cannot serve it" in str(answer)
    if where != "and the worker with it":
        assert "RuntimeError: planted" in str(answer)
        # What has read the configuration may be there for a moment yet.
        eventually(lambda: sorted(it.workers()) == workers)
        carry(client, far, b"still there")
    for _ in range(10):
        with connect(one) as sock, accept(upstream) as peer:
            carry(sock, peer, b"served")

    def is_refused() -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(two) != 0

    eventually(is_refused)
    path.write_text("workers = 2\n" + good + rule(two, upstream.getsockname(), 'name = "better"'))
    assert ask(control, "reload")["ok"]
    with connect(two) as sock, accept(upstream) as peer:
        carry(sock, peer, b"served")


# What fails in workers that serve already, while there is such a file; halfway.
PLANTED_FOR_NOW = """
import os
from forwarder import worker
put_in_force = worker.Worker._put_in_force
def planted(self, assignment):
    put_in_force(self, assignment)
    if self._in_force not in (None, assignment) and os.path.exists({!r}):
        raise RuntimeError("planted")
worker.Worker._put_in_force = planted
"""


class Site:
    """A forwarder whose workers refuse what they are told for as long as the test wants."""

    def __init__(self, start: StartForwarder, path: Path, stack: ExitStack) -> None:
        (path / "sitecustomize.py").write_text(PLANTED_FOR_NOW.format(str(path / "refuse")))
        self._flag = path / "refuse"
        self.control = path / "control"
        self.upstream = stack.enter_context(listen())
        self.one, two = (reserve_port() for _ in range(2))
        stack.enter_context(self.one)
        self.address = self.one.getsockname()
        with two:
            self.later = two.getsockname()
        self.holder = stack.enter_context(listen(*self.later))
        file = path / "forwarder.toml"
        to = self.upstream.getsockname()
        file.write_text(
            "workers = 2\n"
            + rule(self.address, to, 'name = "good"')
            + rule(self.later, to, 'name = "late"\nbind = "retry"')
        )
        self.it = start("-c", str(file), "--control", str(self.control))

    def refuse(self, *, does: bool) -> None:
        """Have the workers refuse what they are told from now on, or not any more."""
        if does:
            self._flag.touch()
        else:
            self._flag.unlink()

    def rule(self, name: str) -> dict[str, object]:
        """A rule as in the status."""
        rules = ask(self.control, "status")["rules"]
        assert isinstance(rules, list)
        (found,) = (one for one in rules if one["name"] == name)
        assert isinstance(found, dict)
        return found

    def refusals(self) -> list[str]:
        """Why workers refuse, as in the status."""
        workers = ask(self.control, "status")["workers"]
        assert isinstance(workers, list)
        return [worker["refusal"] for worker in workers]

    def assert_serves(self, address: tuple[str, int]) -> None:
        """Each of some clients gets through, whichever worker they meet."""
        for _ in range(20):
            with connect(address) as sock, accept(self.upstream) as peer:
                carry(sock, peer, b"served")


@pytest.fixture
def site(
    start_forwarder: StartForwarder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stack: ExitStack,
) -> Site:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Site(start_forwarder, tmp_path, stack)


@pytest.mark.expects_log
def test_an_address_that_comes_later_and_that_workers_refuse_is_seen_and_tried_again(
    site: Site,
) -> None:
    site.refuse(does=True)
    site.holder.close()
    why = "RuntimeError: planted"
    eventually(lambda: site.refusals() == [why, why], lambda: str(site.refusals()))
    assert site.rule("late")["unserved"] == 2
    assert site.rule("good")["unserved"] == 0
    shown = run_command("status", "--control", str(site.control)).stdout
    assert f"worker 1 cannot serve its assignment, and goes on as before: {why}" in shown
    assert "rule late: no worker accepts on 2 of its sockets" in shown
    site.assert_serves(site.address)
    site.refuse(does=False)
    eventually(lambda: site.rule("late")["unserved"] == 0)
    assert site.refusals() == ["", ""]
    site.assert_serves(site.later)


@pytest.mark.expects_log
@pytest.mark.parametrize("count", ["1", "3"])
def test_a_number_of_workers_that_they_refuse_is_told_to_who_asked_and_loses_nobody(
    site: Site, count: str
) -> None:
    """A worker that shall go serves until the others have what it had."""
    site.refuse(does=True)
    answer = ask(site.control, "workers", count=count)
    assert not answer["ok"]
    assert "RuntimeError: planted; please report it; it is tried again" in str(answer)
    site.assert_serves(site.address)
    assert site.rule("good")["unserved"] == 0
    site.refuse(does=False)
    eventually(lambda: len(site.it.workers()) == int(count))
    eventually(lambda: set(site.refusals()) == {""})
    site.assert_serves(site.address)
    assert site.rule("good")["unserved"] == 0
