"""Where the sessions of a rule go: by turns, by the port that was asked, by name."""

from __future__ import annotations

import json
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.config.address import parse_listen
from forwarder.config.model import Rule, Upstream
from forwarder.errors import Place
from forwarder.net.sockets import Target
from forwarder.stats.rows import new_row
from forwarder.upstream.answers import Answer
from forwarder.upstream.names import REFRESH_S, Names
from forwarder.upstream.pool import Pool


def rule(listen: str, *upstreams: str) -> Rule:
    return Rule(
        name="rule",
        listen=parse_listen(listen),
        upstreams=tuple(Upstream(parse_listen(upstream)) for upstream in upstreams),
        place=Place("file", 1),
    )


class Answers:
    """The names of a worker that are answered when the test says so. ``asked``: in which order."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.now = 0.0
        self.names = Names(self.asked.append, lambda: self.now)

    def give(self, host: str, *addresses: str, why: str = "") -> None:
        """A look-up has ended."""
        found = tuple(Target(socket.AF_INET, (address, 0)) for address in addresses)
        self.names.update({host: Answer(found, why)})


@pytest.fixture
def answers() -> Answers:
    return Answers()


def pool(answers: Answers, listen: str, *upstreams: str) -> Pool:
    return Pool(rule(listen, *upstreams), answers.names, 1, new_row())


class Client:
    """Who waits for an address; ``found`` once there is an outcome."""

    def __init__(self, pool: Pool) -> None:
        self.found: list[str] | None = None
        assert pool.targets() is None
        pool.wait_for_targets(self.on_targets)

    @property
    def is_waiting(self) -> bool:
        return self.found is None

    def on_targets(self, targets: tuple[Target, ...]) -> None:
        assert self.is_waiting, "called twice"
        self.found = texts(targets)


def texts(targets: tuple[Target, ...] | None) -> list[str]:
    assert targets is not None
    return [str(target) for target in targets]


def test_each_port_of_a_range_leads_to_its_own(answers: Answers) -> None:
    whole = pool(answers, "a:80-89", "10.0.0.1:180-189", "[::1]:7", "unix:/run/x")
    assert texts(whole.targets()) == ["10.0.0.1:180", "[::1]:7", "unix:/run/x"]
    third = whole.at(3)
    assert texts(third.targets()) == ["10.0.0.1:183", "[::1]:7", "unix:/run/x"]
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


def test_a_name_with_many_ports_is_asked_for_once(answers: Answers) -> None:
    whole = pool(answers, "a:1-10000", "some.example:20001-30000")
    clients = [Client(whole.at(offset)) for offset in range(10_000)]
    answers.give("some.example", "192.0.2.1")
    assert answers.asked == ["some.example"]
    assert [client.found for client in clients] == [
        [f"192.0.2.1:{port}"] for port in range(20_001, 30_001)
    ]
    assert texts(whole.at(7).targets()) == ["192.0.2.1:20008"]
    answers.now += 2 * REFRESH_S
    whole.at(7).on_failure()
    assert answers.asked == ["some.example"] * 2


def test_a_name_is_not_asked_for_again_for_every_session_that_fails(answers: Answers) -> None:
    named = pool(answers, "a:1", "some.example:7")
    for _ in range(1000):
        named.on_failure()
    assert answers.asked == ["some.example"]
    answers.now += REFRESH_S
    named.on_failure()
    assert answers.asked == ["some.example"] * 2


def test_names_and_addresses_stand_in_the_order_of_the_configuration(answers: Answers) -> None:
    """A balancer takes turns; the pool has the addresses of each upstream for it."""
    mixed = pool(answers, "a:1", "some.example:7", "10.0.0.1:8", "unix:@x")
    answers.give("some.example", "192.0.2.1", "192.0.2.2")
    assert texts(mixed.targets()) == ["192.0.2.1:7", "192.0.2.2:7", "10.0.0.1:8", "unix:@x"]
    answers.give("some.example", "192.0.2.3")
    assert texts(mixed.targets()) == ["192.0.2.3:7", "10.0.0.1:8", "unix:@x"]
    assert [texts(mixed.addresses[index]) for index in range(3)] == [
        ["192.0.2.3:7"],
        ["10.0.0.1:8"],
        ["unix:@x"],
    ]


@pytest.mark.parametrize("why", ["", "no answer within 8 s"], ids=["unanswered", "failed"])
def test_a_name_without_address_holds_up_nobody_who_has_another_upstream(
    answers: Answers, why: str
) -> None:
    """It adds nothing, until it has an address; a balancer knows which ones have none."""
    mixed = pool(answers, "a:1", "10.0.0.1:8", "db.dead:9", "some.example:7")
    if why:
        answers.give("db.dead", why=why)
    assert texts(mixed.targets()) == ["10.0.0.1:8"]
    assert mixed.without_address == 0b110
    answers.give("some.example", "192.0.2.1")
    assert texts(mixed.targets()) == ["10.0.0.1:8", "192.0.2.1:7"]
    assert mixed.without_address == 0b010


def test_a_pool_tells_whether_addresses_may_still_come(answers: Answers) -> None:
    """Until every name was answered once, with or without an address."""
    assert not pool(answers, "a:1", "10.0.0.1:8").has_unanswered
    mixed = pool(answers, "a:1", "10.0.0.1:8", "db.dead:9", "some.example:7")
    found = []
    for host in ("", "db.dead", "some.example"):
        if host:
            answers.give(host, why="Name or service not known")
        mixed.targets()
        found.append(mixed.has_unanswered)
    assert found == [True, True, False]


@given(st.permutations(["x.nx", "b.slow", "c.dead"]))
def test_who_waits_goes_on_with_the_first_address_that_there_is(order: list[str]) -> None:
    """However many of the names have none, and in whichever order they are answered."""
    answers = Answers()
    named = pool(answers, "a:1", "x.nx:1", "b.slow:2", "c.dead:3")
    client = Client(named)
    for host in order:
        if host == "b.slow":
            answers.give(host, "192.0.2.1")
            break
        answers.give(host, why="Name or service not known")
        assert client.is_waiting
    assert client.found == ["192.0.2.1:2"]
    for host in order:
        answers.give(host, "192.0.2.2")
    assert client.found == ["192.0.2.1:2"]


def test_who_waits_hears_when_all_names_have_failed(answers: Answers) -> None:
    """Who comes later hears it at once, and why; the names are asked for again."""
    named = pool(answers, "a:1", "x.nx:1", "c.dead:3")
    client = Client(named)
    answers.give("x.nx", why="Name or service not known")
    assert client.is_waiting
    answers.give("c.dead", why="no answer within 8 s")
    assert client.found == []
    assert named.targets() == ()
    assert named.why_no_target() == "x.nx: Name or service not known; c.dead: no answer within 8 s"
    answers.give("c.dead", "192.0.2.1")
    assert texts(named.targets()) == ["192.0.2.1:3"]


def test_a_name_that_no_rule_has_any_more_keeps_nobody_waiting(answers: Answers) -> None:
    client = Client(pool(answers, "a:1", "some.example:7"))
    answers.names.keep(["other.example"])
    assert client.found == []
    assert answers.names.at("some.example", 1) is None


def test_who_fails_when_a_name_is_answered_does_not_keep_it_from_the_others(
    answers: Answers,
) -> None:
    named = pool(answers, "a:1", "some.example:7")

    def fail(_targets: tuple[Target, ...]) -> None:
        raise ZeroDivisionError

    named.wait_for_targets(fail)
    client = Client(named)
    answers.give("some.example", "192.0.2.1")
    assert client.found == ["192.0.2.1:7"]


def test_an_answer_travels_as_it_is() -> None:
    found = (
        Target(socket.AF_INET, ("192.0.2.1", 0)),
        Target(socket.AF_INET6, ("fe80::1", 0, 0, 3)),
    )
    for answer in (Answer(found, since=1.5), Answer((), "no such name", is_final=True, since=7.0)):
        assert Answer.from_json(json.loads(json.dumps(answer.as_json()))) == answer


@pytest.mark.parametrize(
    "nonsense",
    [
        None,
        {},
        [],
        [[], "", False],
        [[], "", 0, 0.0],
        [[], None, False, 0.0],
        [[[2, "localhost", 0]], "", False, 0.0],
        [[[2, "::1", 0]], "", False, 0.0],
        [[[1, "192.0.2.1", 0]], "", False, 0.0],
        [[[10, "::1", -1]], "", False, 0.0],
        [[[10, "::1", 1 << 40]], "", False, 0.0],
        [["192.0.2.1"], "", False, 0.0],
    ],
)
def test_nonsense_is_no_answer(nonsense: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        Answer.from_json(nonsense)


def test_what_was_found_once_stays_and_is_as_old_as_it_is() -> None:
    one, other = (Target(socket.AF_INET, (f"192.0.2.{i}", 0)) for i in (1, 2))
    first = Answer((one,), since=1.0).after(None)
    assert first == Answer((one,), since=1.0)
    assert Answer((one,), since=2.0).after(first) == first
    failed = Answer((), "silent", since=3.0).after(first)
    assert failed == Answer((one,), "silent", since=3.0)
    assert Answer((), "refused", since=4.0).after(failed) == Answer((one,), "refused", since=3.0)
    assert Answer((one,), since=5.0).after(failed) == Answer((one,), since=5.0)
    assert Answer((other,), since=6.0).after(first) == Answer((other,), since=6.0)


def test_a_pool_tells_whether_it_leads_to_an_address_still(answers: Answers) -> None:
    """Also where nothing is known, or no more: then it may."""
    named = pool(answers, "a:1", "some.example:7", "10.0.0.1:8")
    one, two = (Target(socket.AF_INET, (f"192.0.2.{n}", 7)) for n in (1, 2))
    literal = Target(socket.AF_INET, ("10.0.0.1", 8))
    answers.give("some.example", "192.0.2.1")
    assert [named.leads_to(target) for target in (one, two, literal)] == [True, False, True]
    answers.give("some.example", "192.0.2.2")
    assert [named.leads_to(target) for target in (one, two, literal)] == [False, True, True]
    unknown = pool(answers, "a:1", "other.example:7")
    assert unknown.leads_to(one)
