"""What two ends say to each other, and how they end it, is seen through us as it is directly.

The dialogues are written at random; ``FORWARDER_DIALOGUES`` says how many, 3000 if unset. A failure
is made small and printed as code, to be added to ``NAMED``. What must hold, and what may differ:
``support.dialogues``. ``python -m support.dialogue_peers`` shows what others make of them.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from support.control import ask
from support.dialogue_routes import Site, direct_routes, forwarder_site
from support.dialogue_runs import (
    Failure,
    Judge,
    complaints_at_once,
    report,
    written_dialogues,
)
from support.dialogues import (
    Buffers,
    Close,
    Dialogue,
    HalfClose,
    Linger,
    Meet,
    Op,
    Pause,
    Read,
    ReadAll,
    Reset,
    Send,
)
from support.restless import Restless
from support.shuffled import shuffled_routes
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


COUNT: Final = int(os.environ.get("FORWARDER_DIALOGUES", "3000"))
AT_A_TIME: Final = 2000
AGAIN: Final = 4
"""How often a dialogue with a name is held over each route: some show a fault only now and then."""


class Place:
    """Two forwarders, one for each way of moving bytes, and direct ways to compare with."""

    def __init__(self, direct_ways: Judge, sites: list[Site]) -> None:
        self.judge = direct_ways
        self.sites = sites
        self.routes = [route for site in sites for route in site.routes]

    def failures(self, dialogues: Sequence[Dialogue]) -> list[Failure]:
        """Hold each over one of the routes, in turn."""
        routes = [self.routes[number % len(self.routes)] for number in range(len(dialogues))]
        found = self.judge.failures(list(zip(dialogues, routes, strict=True)))
        self._nothing_is_left()
        return found

    def failures_anywhere(self, dialogue: Dialogue) -> list[Failure]:
        """Hold one over each of the routes, both ways round."""
        both = (dialogue, dialogue.mirrored())
        times = range(1 if dialogue.pauses_s() > 1 else AGAIN)
        pairs = [(one, route) for one in both for route in self.routes for _ in times]
        found = self.judge.failures(pairs)
        self._nothing_is_left()
        return found

    def _nothing_is_left(self) -> None:
        for site in self.sites:
            site.nothing_is_left()


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """See :class:`Place`. At its end the forwarders must have nothing to complain about."""
    with ExitStack() as stack:
        names = [stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(3)]
        direct, *others = map(Path, names)
        judge = Judge(stack.enter_context(direct_routes(direct)))
        relays = zip(others, ("splice", "copy"), strict=True)
        sites = [stack.enter_context(forwarder_site(*relay)) for relay in relays]
        yield Place(judge, sites)
        for site in sites:
            assert site.forwarder.stop() == 0, site.forwarder.lines
            assert not site.forwarder.trouble(), site.forwarder.trouble()


def test_dialogues_are_seen_as_they_are_directly(place: Place) -> None:
    seed = random.getrandbits(32)
    dialogues = written_dialogues(COUNT, seed)
    for first in range(0, COUNT, AT_A_TIME):
        failures = place.failures(dialogues[first : first + AT_A_TIME])
        assert not failures, f"seed {seed}\n{report(place.judge, failures)}"


@pytest.mark.parametrize("relay", ["splice", "copy"])
@pytest.mark.parametrize("acts", [("reload", "more", "fewer"), ("upgrade",)], ids="-".join)
def test_nobody_sees_what_the_operator_does_meanwhile(
    relay: str, acts: tuple[str, ...], tmp_path: Path
) -> None:
    """Reloads that change the bandwidth of open sessions, workers that come and go, upgrades."""
    seed = random.getrandbits(32)
    (tmp_path / "direct").mkdir()
    (tmp_path / "site").mkdir()
    with ExitStack() as stack:
        judge = Judge(stack.enter_context(direct_routes(tmp_path / "direct")))
        site = stack.enter_context(forwarder_site(tmp_path / "site", relay))
        routes = itertools.cycle(site.routes)
        dialogues = written_dialogues(COUNT // 6, seed)
        with Restless(site, *acts) as restless:
            failures = judge.failures(list(zip(dialogues, routes, strict=False)))
        assert not failures, f"seed {seed}\n" + "\n\n".join(map(str, failures))
        assert restless.done
        assert not restless.refused
        eventually(lambda: site.sessions() == 0, lambda: f"{site.sessions()} sessions are left")
        assert ask(site.control, "stop")["ok"]
        assert site.forwarder.wait() == 0, site.forwarder.lines
        assert not site.forwarder.trouble(), site.forwarder.trouble()


def test_nobody_sees_that_sessions_move_all_the_time(tmp_path: Path) -> None:
    """Among relays that splice and that copy, several times in each dialogue."""
    seed = random.getrandbits(32)
    (tmp_path / "direct").mkdir()
    (tmp_path / "site").mkdir()
    with ExitStack() as stack:
        judge = Judge(stack.enter_context(direct_routes(tmp_path / "direct")))
        routes = stack.enter_context(shuffled_routes(tmp_path / "site", seed))
        dialogues = written_dialogues(COUNT // 6, seed)
        failures = judge.failures(list(zip(dialogues, itertools.cycle(routes), strict=False)))
        assert not failures, f"seed {seed}\n{report(judge, failures)}"


@pytest.mark.parametrize("relay", ["splice", "copy"])
def test_nobody_sees_that_the_instance_stops(relay: str, tmp_path: Path) -> None:
    """All of it is said in workers that drain."""
    seed = random.getrandbits(32)
    with ExitStack() as stack:
        site = stack.enter_context(forwarder_site(tmp_path, relay))
        dialogues = written_dialogues(COUNT // 6, seed)
        pairs = list(zip(dialogues, itertools.cycle(site.routes), strict=False))

        def stop() -> None:
            eventually(lambda: site.sessions() == len(pairs), site.sessions)
            site.forwarder.signal(signal.SIGTERM)

        failures = complaints_at_once(pairs, stop)
        assert not failures, f"seed {seed}\n" + "\n\n".join(map(str, failures))
        assert site.forwarder.wait() == 0, site.forwarder.lines
        assert not site.forwarder.trouble(), site.forwarder.trouble()


def answers(said: int, size: int, stall_ms: int, go: Op, buffers: Buffers) -> Dialogue:
    """A whole answer that ends by FIN; then the reader says something, and its writer goes away."""
    return Dialogue(
        client=(Send(3), Read(min(500, size)), Meet(), Send(said), Pause(stall_ms), ReadAll()),
        upstream=(Read(3), Send(size), HalfClose(), Linger(), Meet(), Pause(5), go),
        client_buffers=buffers,
    )


NAMED: Final = {
    "a remark after the answer, read at once": answers(1, 1_000_000, 20, Close(), Buffers()),
    "a remark after the answer, read late": answers(1, 1_000_000, 6500, Close(), Buffers(65_536)),
    "a remark after the answer, then a reset": answers(1, 1_000_000, 6500, Reset(), Buffers()),
    "a speech after the answer": answers(300_000, 60_000, 20, Reset(), Buffers(65_536)),
    "a speech after the answer, read late": answers(300_000, 500_000, 6500, Close(), Buffers()),
    "an answer and a reset, while the other side says nothing": Dialogue(
        client=(ReadAll(pause_ms=1),),
        upstream=(Linger(), Send(664_038), HalfClose(), Linger(), Reset()),
        client_buffers=Buffers(receive=65_536),
        upstream_buffers=Buffers(receive=65_536, send=65_536),
    ),
    "an answer and a reset, while nobody reads": Dialogue(
        client=(Read(3), Meet(), ReadAll(pause_ms=10)),
        upstream=(Pause(20), Send(131_072), Meet(), HalfClose(), Reset()),
    ),
    "an end and a reset in one turn": Dialogue(
        client=(Send(8), Pause(50), HalfClose(), Linger(), Meet()),
        upstream=(HalfClose(), Linger(), Pause(1), Reset()),
    ),
    "an end and a reset in the middle of a speech": Dialogue(
        client=(Meet(), Send(300_000, piece=5000)),
        upstream=(HalfClose(), Linger(), Meet(), Reset()),
    ),
    "an end and a reset while bulk goes the other way": Dialogue(
        client=(Send(4), Send(300_000), Send(262_145)), upstream=(HalfClose(), Reset())
    ),
    "bulk both ways, one side goes with input unread": Dialogue(
        client=(Send(322_937), Send(1796), Linger(), HalfClose(), Pause(1)),
        upstream=(Send(1_074_411), HalfClose(), Linger(), Close()),
    ),
    "closing at once, and the other side talks": Dialogue(
        client=(Close(),), upstream=(Pause(10), Send(958_398))
    ),
    "closing at once, and the other side talks byte by byte": Dialogue(
        client=(Close(),), upstream=(Send(268, piece=1), HalfClose())
    ),
    "closing while the first bytes come": Dialogue(
        client=(Meet(), Close()), upstream=(Meet(), Send(3, piece=1))
    ),
    "a reset at once": Dialogue(client=(Reset(),), upstream=()),
    "an answer and a reset, acknowledged before": Dialogue(
        client=(Pause(50), ReadAll()), upstream=(Send(20_480), Linger(), Reset())
    ),
    "a word and a reset at once": Dialogue(client=(Send(1), Reset()), upstream=()),
    "an end and a reset at once": Dialogue(
        client=(HalfClose(), Reset()), upstream=(Pause(50), Send(9))
    ),
    "a speech that waits longer than directly, as the kernel tries a full buffer again": Dialogue(
        client=(ReadAll(), Send(60_000, piece=20_480), Reset()),
        upstream=(HalfClose(), Pause(3500)),
        upstream_buffers=Buffers(receive=4096, send=4608),
    ),
}
"""What was found once, and what is too particular to be found at random every time."""


@pytest.mark.parametrize("name", NAMED)
def test_a_dialogue_with_a_name_is_seen_as_it_is_directly(place: Place, name: str) -> None:
    """Over every route, both ways round."""
    failures = place.failures_anywhere(NAMED[name])
    assert not failures, "\n\n".join(map(str, failures))
