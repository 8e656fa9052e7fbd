"""How long sessions may go on after what they belong to has gone: drain_timeout."""

from __future__ import annotations

import json
import os
import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from support.configured import Configured, rule
from support.ends import Link, accept, carry, connect, listen, receive_to_reset
from support.forwarder import reserve_port
from support.logged import places

from process.conftest import stop

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from process.conftest import Launch, Logging, Serve

pytestmark = pytest.mark.process

TERM = signal.SIGTERM
HEAD = 'workers = 2\ndrain_timeout = "500ms"\n'


def assert_alive(link: Link) -> None:
    carry(link.client, link.upstream, b"x" * 1000)
    carry(link.upstream, link.client, b"y" * 1000)


def assert_reset(link: Link) -> None:
    assert receive_to_reset(link.client) == b""
    assert receive_to_reset(link.upstream) == b""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closed at the end."""
    with ExitStack() as it:
        yield it


@pytest.mark.parametrize("how", ["changed", "removed"])
def test_sessions_of_a_rule_that_is_no_more_are_reset_others_are_not(
    launch: Launch, tmp_path: Path, stack: ExitStack, how: str
) -> None:
    upstream, other = stack.enter_context(listen()), stack.enter_context(listen())
    doomed, kept = (stack.enter_context(reserve_port()).getsockname() for _ in range(2))
    path = tmp_path / "forwarder.toml"
    keep = rule(kept, upstream.getsockname())
    path.write_text(HEAD + rule(doomed, upstream.getsockname()) + keep)
    it = Configured(launch("-c", str(path)), path)

    def link(address: tuple[str, int]) -> Link:
        client = stack.enter_context(connect(address))
        return Link(client, stack.enter_context(accept(upstream)))

    doomed_links = [link(doomed) for _ in range(4)]
    kept_links = [link(kept) for _ in range(4)]
    changed = rule(doomed, other.getsockname()) if how == "changed" else ""
    it.reload(HEAD + changed + keep)
    for one in doomed_links:
        assert_reset(one)
    for one in kept_links:
        assert_alive(one)
    if changed:
        with connect(doomed) as client, accept(other) as peer:
            carry(client, peer, b"there")
    for one in kept_links:
        one.close()
    assert it.forwarder.stop() == 0


def test_a_stop_resets_what_is_left_after_it(serve: Serve) -> None:
    service = serve("--drain-timeout", "0.3", workers=2)
    links = [service.link() for _ in range(4)]
    assert service.stop() == 0
    for link in links:
        assert_reset(link)
    service.assert_nothing_left()


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [([TERM], "us/drain"), ([TERM, TERM], "us/shutdown"), ([TERM, signal.SIGINT], "us/shutdown")],
    ids=str,
)
def test_the_reason_of_the_end_says_whether_time_was_over(
    logged: Logging, tmp_path: Path, numbers: list[signal.Signals], reason: str
) -> None:
    """Sessions that had their time, or not. Result: so in the log, and the log of the program."""
    limit_s = 1 if len(numbers) == 1 else 60
    path = tmp_path / "sessions"
    it = logged(places((path, "json")), top=f"drain_timeout = {limit_s}", workers=2)
    with ExitStack() as stack:
        for _ in range(4):
            stack.callback(it.link().close)
        for number in numbers:  # two of a kind would be one while the first is not taken yet
            it.forwarder.signal(number)
            it.forwarder.wait_logged("master.stopping how=drain")
        assert it.forwarder.wait() == 0
    assert [json.loads(line)["end"] for line in path.read_text().splitlines()] == [reason] * 4
    lines = [line.rpartition("INFO ")[2] for line in it.forwarder.lines]
    assert f"master.stopping how=drain sessions=4 limit_s={limit_s}" in lines
    assert any(line.startswith("master.stopped ended=0 cut=4 after_s=") for line in lines)


def test_a_stop_says_now_and_then_how_many_are_left(serve: Serve) -> None:
    service = serve("--drain-timeout", "60", workers=2)
    links = [service.link() for _ in range(3)]
    service.forwarder.signal(TERM)
    service.forwarder.wait_logged(r"master\.draining sessions=3 left_s=5[0-9]")
    for link in links:
        link.close()
    assert service.forwarder.wait() == 0
    assert any("master.stopped ended=3 cut=0" in line for line in service.forwarder.lines)


def test_a_worker_that_is_killed_amid_a_stop_has_cut_its_sessions(serve: Serve) -> None:
    service = serve("--drain-timeout", "60")
    links = [service.link() for _ in range(3)]
    (worker,) = service.forwarder.workers()
    service.forwarder.signal(TERM)
    service.forwarder.wait_logged("master.stopping how=drain sessions=3")
    os.kill(worker, signal.SIGKILL)
    assert service.forwarder.wait() == 0
    assert any("master.stopped ended=0 cut=3" in line for line in service.forwarder.lines)
    for link in links:
        link.close()


def test_a_stop_without_limit_waits_until_hurried(serve: Serve) -> None:
    service = serve("--drain-timeout", "0", workers=2)
    links = [service.link() for _ in range(4)]
    service.forwarder.signal(signal.SIGTERM)
    service.forwarder.wait_logged("master.stopping how=drain")
    for link in links:
        assert_alive(link)
    assert service.forwarder.process.poll() is None
    assert stop(service.forwarder, signal.SIGTERM) == 0
    for link in links:
        assert_reset(link)
    service.assert_nothing_left()
