"""A bug when workers put a configuration in force: the reload fails, and what ran goes on."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
from support.configured import rule
from support.control import ask
from support.ends import accept, carry, connect, listen
from support.forwarder import reserve_port
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
        assert sorted(it.workers()) == workers
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
