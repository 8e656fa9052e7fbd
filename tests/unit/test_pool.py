"""Where the sessions of a rule go: by turns, by the port that was asked, by name."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest

from forwarder.addr import parse_listen
from forwarder.config.model import Rule
from forwarder.errors import Place
from forwarder.stats import new_row
from forwarder.upstream.pool import Pool
from forwarder.upstream.resolver import Resolver

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forwarder.net.sockets import Target


def rule(listen: str, *upstreams: str) -> Rule:
    return Rule(
        name="rule",
        listen=parse_listen(listen),
        upstreams=tuple(map(parse_listen, upstreams)),
        place=Place("file", 1),
    )


class Answers:
    """A loop that answers look-ups, and counts them."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._loop = asyncio.new_event_loop()

    def time(self) -> float:
        return self._loop.time()

    async def getaddrinfo(
        self,
        host: str,
        port: int | None,  # noqa: ARG002 - as the loop's
        *,
        type: int,  # noqa: A002, ARG002
    ) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        self.asked.append(host)
        return [(socket.AF_INET, 1, 6, "", ("192.0.2.1", 0))]

    def create_task(self, work: object) -> asyncio.Task[None]:
        return self._loop.create_task(work)  # type: ignore[arg-type]  # a coroutine of the resolver

    def settle(self) -> None:
        """Let all look-ups end."""
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.run_until_complete(asyncio.sleep(0))

    def close(self) -> None:
        self._loop.close()


@pytest.fixture
def answers() -> Iterator[Answers]:
    it = Answers()
    yield it
    it.close()


def pool(answers: Answers, listen: str, *upstreams: str) -> Pool:
    resolver = Resolver(answers)  # type: ignore[arg-type]  # all it uses
    return Pool(rule(listen, *upstreams), resolver, 1, new_row())


def texts(targets: tuple[Target, ...] | None) -> list[str]:
    assert targets is not None
    return [str(target) for target in targets]


def test_each_port_of_a_range_leads_to_its_own(answers: Answers) -> None:
    whole = pool(answers, "a:80-89", "10.0.0.1:180-189", "[::1]:7", "unix:/run/x")
    assert texts(whole.targets()) == ["10.0.0.1:180", "[::1]:7", "unix:/run/x"]
    third = whole.at(3)
    assert texts(third.targets()) == ["10.0.0.1:183", "[::1]:7", "unix:/run/x"]
    assert texts(third.targets()) == ["[::1]:7", "unix:/run/x", "10.0.0.1:183"]
    assert (third.rule, third.counts, third.origin) == (whole.rule, whole.counts, whole)
    assert third.at(4).origin is whole
    assert texts(third.at(4).targets())[0] == "10.0.0.1:184"


def test_the_first_port_and_a_range_to_one_port_need_no_pool_of_their_own(
    answers: Answers,
) -> None:
    whole = pool(answers, "a:80-89", "10.0.0.1:180-189")
    assert whole.at(0) is whole
    many_to_one = pool(answers, "a:80-89", "10.0.0.1:7", "b:8", "unix:@x")
    assert many_to_one.at(5) is many_to_one
    assert many_to_one.origin is many_to_one


def test_a_name_with_many_ports_is_looked_up_once(answers: Answers) -> None:
    whole = pool(answers, "a:1-10000", "some.example:20001-30000")
    found: list[list[str]] = []
    for offset in range(10_000):
        one = whole.at(offset)
        if one.targets() is None:
            one.wait_for_targets(lambda targets: found.append(texts(targets)))
    answers.settle()
    assert answers.asked == ["some.example"]
    assert sorted(found) == sorted([f"192.0.2.1:{port}"] for port in range(20_001, 30_001))
    assert texts(whole.at(7).targets()) == ["192.0.2.1:20008"]
    whole.at(7).on_failure()
    answers.settle()
    assert answers.asked == ["some.example"] * 2


def test_names_and_addresses_mix(answers: Answers) -> None:
    """Only names are asked for. Result: the turn goes over all of them."""
    mixed = pool(answers, "a:1", "some.example:7", "10.0.0.1:8", "unix:@x")
    assert mixed.targets() is None
    mixed.wait_for_targets(lambda _: None)
    answers.settle()
    assert texts(mixed.targets()) == ["unix:@x", "192.0.2.1:7", "10.0.0.1:8"]
    assert answers.asked == ["some.example"]


def test_who_fails_when_a_name_is_resolved_does_not_keep_it_from_the_others(
    answers: Answers,
) -> None:
    named = pool(answers, "a:1", "some.example:7")
    found: list[list[str]] = []

    def fail(_targets: tuple[Target, ...]) -> None:
        raise ZeroDivisionError

    named.wait_for_targets(fail)
    named.wait_for_targets(lambda targets: found.append(texts(targets)))
    answers.settle()
    assert found == [["192.0.2.1:7"]]
