"""What the master says of servers, as the checker has found them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from forwarder.balancing.table import DRAINS, HAS_ORDER, Standing
from forwarder.checker.messages import Checked, News, read_news, say_news
from forwarder.checker.standing import What
from forwarder.config.address import parse_upstream
from forwarder.config.model import Check, CheckKind, Group, SocketOptions, Upstream
from forwarder.ipc.channel import MAX_MESSAGE_BYTES
from forwarder.stats.ledger import Ledger
from forwarder.stats.rows import SESSIONS
from forwarder.supervision.findings import Findings
from forwarder.supervision.servers import Servers

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = ("10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80")


class Bench:
    """A group of three servers, one of which has 12 sessions."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.servers = Servers(self.ledger)
        self.findings = Findings(self.servers, self.ledger)
        row = self.ledger.server_row("pg", NAMES[0])
        self.ledger.open().row(row)[SESSIONS] = 12
        self.seats = [self.seat(name) for name in NAMES]
        self.use(*NAMES)

    def seat(self, name: str) -> int:
        self.ledger.server_row("pg", name)
        seat = self.servers.seat("pg", name)
        assert seat is not None
        return seat

    def use(self, *names: str) -> None:
        self.findings.use(
            [
                Checked(
                    name="pg",
                    group=Group(check=Check(kind=CheckKind.TCP)),
                    servers=tuple((Upstream(parse_upstream(one)), self.seat(one)) for one in names),
                    options=SocketOptions(),
                    source=None,
                    is_udp=False,
                )
            ]
        )

    def close(self) -> None:
        self.servers.close()
        self.ledger.end()


@pytest.fixture
def bench(caplog: pytest.LogCaptureFixture) -> Iterator[Bench]:
    caplog.set_level(logging.INFO)
    it = Bench()
    yield it
    it.close()


def news(what: What, why: str = "", after: int = 0, server: str = NAMES[0]) -> News:
    return News(what, "pg", server, why, after, 1.0)


def test_a_line_says_what_has_happened_why_and_what_is_left(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.servers.table.find(bench.seats[0], Standing.DOWN, 0, 1)
    bench.servers.table.order(bench.seats[1], HAS_ORDER | DRAINS)
    bench.findings.take([news(What.DOWN, "http 503", 3)], 0.0)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        'upstream.down group=pg server=10.0.0.1:80 why="http 503" after=3 sessions=12 left=1'
    )


def test_an_outage_of_many_servers_takes_few_lines(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """One after the other, as checks end. Their reasons are kept."""
    names = [f"10.0.1.{number}:80" for number in range(40)]
    bench.use(*names)
    for what, word in ((What.DOWN, "down"), (What.UP, "up")):
        caplog.clear()
        for number, name in enumerate(names):
            bench.findings.take([news(what, "refused", 3, name)], 100.0 + number / 100)
        bench.findings.turn(101.0)
        assert [line.split()[2] for line in caplog.messages] == [f"server={it}" for it in names[:5]]
        assert bench.findings.deadline == pytest.approx(102.39)
        bench.findings.turn(103.0)
        assert caplog.messages[5:] == [
            f"upstream.{word} group=pg and 35 more servers, left=40: `forwarder upstream list`"
        ]
        assert [bench.findings.of("pg", name) is not None for name in names] == [True] * 40
    assert bench.findings.deadline is None


def test_a_hint_is_a_short_line_and_no_reason(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.findings.take([news(What.FAILING, "refused", 1)], 0.0)
    assert caplog.messages == ["upstream.failing group=pg server=10.0.0.1:80 why=refused after=1"]
    assert bench.findings.of("pg", NAMES[0]) is None


def test_another_reason_is_kept_and_not_logged(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.findings.take([news(What.DOWN, "http 503", 3)], 0.0)
    caplog.clear()
    bench.findings.take([news(What.REASON, "refused")._replace(at=9.0)], 0.0)
    found = bench.findings.of("pg", NAMES[0])
    assert found is not None
    assert (found.what, found.why, found.at) == (What.DOWN, "refused", 1.0)
    assert caplog.messages == []


def test_a_remark_is_kept_and_not_logged(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.findings.take([news(What.REMARK, "29 days")], 0.0)
    bench.findings.take([news(What.REMARK, "28 days")._replace(at=9.0)], 0.0)
    found = bench.findings.of("pg", NAMES[0])
    assert found is not None
    assert (found.what, found.why, found.at) == (What.UP, "28 days", 1.0)
    assert caplog.messages == []


def test_what_is_gone_has_no_reason_and_no_line(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.findings.take([news(What.DOWN, server=NAMES[2])], 0.0)
    bench.use(*NAMES[:2])
    assert bench.findings.of("pg", NAMES[2]) is None
    bench.use(*NAMES)
    assert bench.findings.of("pg", NAMES[2]) is None
    caplog.clear()
    bench.findings.take([news(What.DOWN)._replace(group="other")], 0.0)
    assert caplog.messages == []


def test_a_reason_cannot_write_a_line_of_its_own(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.findings.take([news(What.DOWN, 'x"\n\x1b[2J upstream.up')], 0.0)
    assert caplog.messages[0].startswith(
        'upstream.down group=pg server=10.0.0.1:80 why="x\\"\\\\n\\\\x1b[2J upstream.up" '
    )


def test_much_news_comes_in_pieces_that_fit() -> None:
    many = [news(What.DOWN, "é" * 10_000, 3, f"10.0.{i // 250}.{i % 250}:80") for i in range(500)]
    pieces = list(say_news(many))
    assert len(pieces) > 1
    found = [one for piece in pieces for one in read_news(piece)]
    assert [one.server for one in found] == [one.server for one in many]
    assert all(len(str(piece)) < MAX_MESSAGE_BYTES for piece in pieces)
    assert not list(say_news([]))


@pytest.mark.parametrize(
    "events",
    [
        None,
        [["down", "g", "s", "why", 1]],
        [["up", "g", "s", 1, 1, 1.0]],
        [["elsewhere", "g", "s", "why", 1, 1.0]],
        [["up", "g", "s", "why", "1", 1.0]],
        ["up"],
    ],
    ids=range(6),
)
def test_nonsense_is_no_news(events: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        read_news({"events": events})
