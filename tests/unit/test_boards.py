"""The failed connects of all workers, as the checker reads them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from forwarder.checker.boards import Boards
from forwarder.checker.checks import Server
from forwarder.checker.messages import Checked
from forwarder.checker.standing import first
from forwarder.config.address import parse_upstream
from forwarder.config.model import Group, SocketOptions, Upstream
from forwarder.stats.board import ROWS, Board
from forwarder.stats.rows import BYTES_U2C, CONNECT_MS, CONNECTS_FAILED, SESSIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

GROUP = Group()


def server(seat: int, *, is_udp: bool = False) -> Server:
    upstream = Upstream(parse_upstream(f"127.0.0.1:{8000 + seat}"))
    checked = Checked(
        name="g",
        group=GROUP,
        servers=((upstream, seat),),
        options=SocketOptions(),
        source=None,
        is_udp=is_udp,
    )
    return Server(upstream, seat, checked, first(GROUP, 0.0))


@dataclass
class Heard:
    """What is said of servers, in place of the checks."""

    servers: list[Server]
    said: list[tuple[int, int, int, bool]] = field(default_factory=list)
    is_interested: bool = True

    def watched(self) -> Iterator[Server]:
        return iter(self.servers)

    def on_connects(self, server: Server, failed: int, worked: int, *, is_first: bool) -> bool:
        self.said.append((server.seat, failed, worked, is_first))
        return self.is_interested

    def take(self) -> list[tuple[int, int, int, bool]]:
        said, self.said = sorted(self.said), []
        return said


class Worker:
    """What counts on a board."""

    def __init__(self) -> None:
        self.board = Board()

    def fail(self, seat: int, times: int = 1) -> None:
        self.board.row(ROWS + seat)[CONNECTS_FAILED] += times
        self.board.row(ROWS)[SESSIONS] += times

    def connect(self, seat: int, times: int = 1) -> None:
        self.board.row(ROWS + seat)[CONNECT_MS + seat % 3] += times

    def shown(self) -> Board:
        return Board.read_only(os.dup(self.board.fileno()))


@pytest.fixture
def workers() -> Iterator[tuple[Worker, Worker]]:
    both = Worker(), Worker()
    yield both
    for worker in both:
        worker.board.close()


def test_what_failed_is_put_together_over_all_workers(workers: tuple[Worker, Worker]) -> None:
    heard = Heard([server(1), server(2)])
    boards = Boards(heard)
    for pid, worker in enumerate(workers):
        boards.add(pid, worker.shown())
    workers[0].fail(1)
    workers[1].fail(1, 2)
    boards.look()
    assert heard.take() == [(1, 3, 0, True)]
    workers[1].fail(2)
    boards.look()
    assert heard.take() == [(1, 0, 0, False), (2, 1, 0, True)]


def test_nothing_is_read_while_nothing_fails(workers: tuple[Worker, Worker]) -> None:
    heard = Heard([server(1)])
    boards = Boards(heard)
    boards.add(1, workers[0].shown())
    workers[0].connect(1, 9)
    boards.look()
    assert heard.take() == []
    workers[0].fail(1)
    boards.look()
    assert heard.take() == [(1, 1, 9, True)]


def test_a_server_is_looked_at_as_long_as_that_matters(workers: tuple[Worker, Worker]) -> None:
    heard = Heard([server(1)])
    boards = Boards(heard)
    boards.add(1, workers[0].shown())
    workers[0].fail(1)
    boards.look()
    workers[0].connect(1)
    boards.look()
    heard.is_interested = False
    boards.look()
    boards.look()
    assert heard.take() == [(1, 0, 0, False), (1, 0, 1, False), (1, 1, 0, True)]


def test_a_new_checker_does_not_count_what_is_past(workers: tuple[Worker, Worker]) -> None:
    workers[0].fail(1, 5)
    workers[0].connect(1, 5)
    heard = Heard([server(1)])
    boards = Boards(heard)
    boards.add(1, workers[0].shown())
    boards.look()
    assert heard.take() == []
    workers[0].fail(1)
    boards.look()
    assert heard.take() == [(1, 1, 0, True)]


def test_a_new_server_does_not_get_what_another_one_has_left(
    workers: tuple[Worker, Worker],
) -> None:
    heard = Heard([server(1)])
    boards = Boards(heard)
    boards.add(1, workers[0].shown())
    workers[0].fail(1)
    boards.look()
    workers[0].fail(2, 5)  # its row has the counts of the one before it
    heard.servers = [server(2)]
    boards.on_other_servers()
    heard.take()
    boards.look()
    assert heard.take() == []
    workers[0].fail(2)
    boards.look()
    assert heard.take() == [(2, 1, 0, True)]


def test_a_worker_that_is_gone_is_not_read(workers: tuple[Worker, Worker]) -> None:
    heard = Heard([server(1)])
    boards = Boards(heard)
    boards.add(1, workers[0].shown())
    boards.remove(1)
    boards.remove(2)
    workers[0].fail(1)
    boards.look()
    assert heard.take() == []


def test_for_udp_only_what_comes_back_counts(workers: tuple[Worker, Worker]) -> None:
    heard = Heard([server(1, is_udp=True)])
    boards = Boards(heard)
    boards.add(1, workers[0].shown())
    workers[0].connect(1)
    workers[0].fail(1)
    boards.look()
    assert heard.take() == [(1, 1, 0, True)]
    workers[0].board.row(ROWS + 1)[BYTES_U2C] += 100
    boards.look()
    assert heard.take() == [(1, 0, 100, False)]
