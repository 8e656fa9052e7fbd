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
        rows = [self.ledger.server_row("pg", name) for name in NAMES]
        self.ledger.open().row(rows[0])[SESSIONS] = 12
        self.seats = [self.seat(name) for name in NAMES]
        self.use(*NAMES)

    def seat(self, name: str) -> int:
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
    bench.findings.take([news(What.DOWN, "http 503", 3)])
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        'upstream.down group=pg server=10.0.0.1:80 why="http 503" after=3 sessions=12 left=1'
    )


def test_a_hint_is_a_short_line_and_no_reason(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.findings.take([news(What.FAILING, "refused", 1)])
    assert caplog.messages == ["upstream.failing group=pg server=10.0.0.1:80 why=refused after=1"]
    assert bench.findings.of("pg", NAMES[0]) is None


def test_another_reason_is_kept_and_not_logged(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.findings.take([news(What.DOWN, "http 503", 3)])
    caplog.clear()
    bench.findings.take([news(What.REASON, "refused")._replace(at=9.0)])
    found = bench.findings.of("pg", NAMES[0])
    assert found is not None
    assert (found.what, found.why, found.at) == (What.DOWN, "refused", 1.0)
    assert caplog.messages == []


def test_a_remark_is_kept_and_not_logged(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.findings.take([news(What.REMARK, "29 days")])
    bench.findings.take([news(What.REMARK, "28 days")._replace(at=9.0)])
    found = bench.findings.of("pg", NAMES[0])
    assert found is not None
    assert (found.what, found.why, found.at) == (What.UP, "28 days", 1.0)
    assert caplog.messages == []


def test_what_is_gone_has_no_reason_and_no_line(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.findings.take([news(What.DOWN, server=NAMES[2])])
    bench.use(*NAMES[:2])
    assert bench.findings.of("pg", NAMES[2]) is None
    bench.use(*NAMES)
    assert bench.findings.of("pg", NAMES[2]) is None
    caplog.clear()
    bench.findings.take([news(What.DOWN)._replace(group="other")])
    assert caplog.messages == []


def test_a_reason_cannot_write_a_line_of_its_own(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.findings.take([news(What.DOWN, 'x"\n\x1b[2J upstream.up')])
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
