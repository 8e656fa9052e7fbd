"""How long an answer is good: what DNS says of a name, beside what the system has found."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from forwarder.net.sockets import Target
from forwarder.upstream import ttl
from forwarder.upstream.answers import Answer
from forwarder.upstream.lookup import with_lifetime
from forwarder.upstream.ttl import Lifetime

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def answer(*hosts: str) -> Answer:
    return Answer(tuple(Target(socket.AF_INET, (host, 0)) for host in hosts))


def system(*answers: Answer) -> Callable[[str], Answer]:
    """What the system answers, each time it is asked."""
    left = list(answers)
    return lambda _: left.pop(0)


def dns(*addresses: str, seconds: float = 2.0) -> Callable[[str], Lifetime | None]:
    return lambda _: Lifetime(frozenset(addresses), seconds)


def test_an_answer_of_dns_is_good_for_its_ttl() -> None:
    found = with_lifetime(system(answer("192.0.2.1", "192.0.2.2")), dns("192.0.2.2"))("a.test")
    assert found == answer("192.0.2.1", "192.0.2.2")
    assert found.good_for_s == 2.0


def test_a_name_that_moves_between_the_questions_has_its_new_addresses() -> None:
    look = system(answer("192.0.2.1"), answer("192.0.2.2"))
    found = with_lifetime(look, dns("192.0.2.2"))("a.test")
    assert found == answer("192.0.2.2")
    assert found.good_for_s == 2.0


def test_where_it_is_not_dns_that_the_system_asks_its_ttl_says_nothing() -> None:
    look = system(answer("192.0.2.1"), answer("192.0.2.1"))
    assert with_lifetime(look, dns("192.0.2.9"))("a.test").good_for_s is None


def test_a_name_that_is_not_found_is_asked_for_once() -> None:
    def nobody(host: str) -> Lifetime | None:
        raise AssertionError(f"asked for {host}")

    assert with_lifetime(system(Answer((), "no")), nobody)("a.test").why == "no"


@pytest.mark.parametrize("host", ["localhost", "in.hosts.test", "IN.hosts.test."])
def test_what_is_no_name_of_dns_is_not_told_to_it(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n192.0.2.1\tother.test in.Hosts.test # comment.test\n")
    monkeypatch.setattr(ttl, "_HOSTS", hosts)
    resolver = pytest.importorskip("dns.resolver")
    monkeypatch.setattr(resolver, "Resolver", lambda: pytest.fail("DNS was asked"))
    assert ttl.lifetime(host) is None
