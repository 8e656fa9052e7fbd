"""What the master says of the names that its helper has looked up."""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING

import pytest

from forwarder.net.sockets import Target
from forwarder.supervision.naming import Naming
from forwarder.upstream.answers import Answer
from forwarder.upstream.known import KnownNames
from forwarder.upstream.messages import say_answers

if TYPE_CHECKING:
    from forwarder.ipc.channel import Message


class Nobody:
    """No helper: the test says what that would say."""

    is_started = is_free = False

    def send(self, message: Message) -> None:
        raise AssertionError(message)


@pytest.fixture
def naming() -> Naming:
    return Naming(KnownNames(), Nobody(), lambda _: None)


def hear(naming: Naming, host: str, answer: Answer) -> None:
    (message,) = say_answers("found", {host: answer})
    naming.on_found(message, 0.0)


def test_a_line_about_a_name_has_some_of_its_rules(
    naming: Naming, caplog: pytest.LogCaptureFixture
) -> None:
    """Thousands may lead to one."""
    caplog.set_level(logging.INFO)
    naming.use({"db.example": [f"rule{i}" for i in range(10_000)], "few.example": ["one"]}, 0.0)
    for host in ("db.example", "few.example"):
        hear(naming, host, Answer((), "no such name", since=1.0))
        hear(naming, host, Answer((Target(socket.AF_INET, ("192.0.2.1", 0)),), since=2.0))
    many, _, few, _ = (record.getMessage() for record in caplog.records)
    assert many.endswith("rules=rule0,rule1,rule2,rule3,rule4 and 9995 more: no such name")
    assert few == "name.failed host=few.example rules=one: no such name"


def test_names_that_fail_one_after_the_other_take_few_lines(
    naming: Naming, caplog: pytest.LogCaptureFixture
) -> None:
    """Each answer comes alone, when its name server has been waited for."""
    caplog.set_level(logging.INFO)
    hosts = [f"host{number}.example" for number in range(12)]
    naming.use({host: ["one"] for host in hosts}, 0.0)
    for host in hosts:
        hear(naming, host, Answer((), "no answer", since=1.0))
    assert len(caplog.messages) == 5
    deadline = naming.deadline
    assert deadline is not None
    naming.turn(deadline)
    assert caplog.messages[5:] == ["name.failed and 7 more names: `forwarder status`"]


@pytest.mark.parametrize("since", [10**400, float("inf"), float("nan"), -1], ids=range(4))
def test_an_answer_of_no_time_is_nonsense(naming: Naming, since: float) -> None:
    naming.use({"db.example": ["web"]}, 0.0)
    with pytest.raises(TypeError):
        hear(naming, "db.example", Answer((), "no such name", since=since))
