"""The servers that names stand for, in place of these."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest
from support.configured import rule as rule_text

from forwarder.config.address import Address, AddressError, parse_service
from forwarder.config.loading import parse
from forwarder.config.model import Dialect, Rule, Upstream
from forwarder.errors import Place
from forwarder.net.sockets import Target
from forwarder.serving.moving import REST_S, Moving
from forwarder.serving.service import Service
from forwarder.upstream import srv
from forwarder.upstream.answers import Answer, Record
from forwarder.upstream.lookup import look_up
from forwarder.upstream.members import as_written, differ_by_members, effective
from forwarder.upstream.wanted import all_names, sought_names

SERVICE = "srv:_pg._tcp.db.example"
PG = Upstream(parse_service(SERVICE))
WEB = Upstream(Address("web.example", 80), expands=True)


def addresses(*hosts: str) -> Answer:
    return Answer(
        tuple(
            Target(socket.AF_INET6, (host, 0, 0, 0))
            if ":" in host
            else Target(socket.AF_INET, (host, 0))
            for host in hosts
        )
    )


def records(*found: tuple[int, int, str, int]) -> Answer:
    return Answer((), records=tuple(Record(*one) for one in found))


def servers(upstreams: tuple[Upstream, ...]) -> list[tuple[str, int, bool]]:
    return [(str(one), one.weight, one.is_backup) for one in upstreams]


def a_rule(*upstreams: Upstream) -> Rule:
    return Rule(name="r", listen=Address("127.0.0.1", 1), upstreams=upstreams, place=Place("here"))


# -- services


def test_the_lowest_priority_has_the_primaries_and_all_others_are_backups() -> None:
    known = {
        SERVICE: records(
            (20, 1, "c.example", 1),
            (10, 5, "b.example", 2),
            (10, 7, "a.example", 3),
            (30, 1, "d", 4),
        )
    }
    assert servers(effective([PG], known)) == [
        ("b.example:2", 5, False),
        ("a.example:3", 7, False),
        ("c.example:1", 1, True),
        ("d:4", 1, True),
    ]


def test_the_order_of_an_answer_does_not_matter() -> None:
    found = [(1, 1, "a.example", 1), (1, 1, "b.example", 1), (2, 0, "c.example", 1)]
    forth, back = records(*found), records(*reversed(found))
    assert effective([PG], {SERVICE: forth}) == effective([PG], {SERVICE: back})


def test_a_weight_of_0_is_little_and_large_weights_keep_their_relation() -> None:
    known = {SERVICE: records((1, 0, "a", 1), (1, 65535, "b", 1), (1, 32768, "c", 1))}
    assert servers(effective([PG], known)) == [
        ("a:1", 1, False),
        ("c:1", 128, False),
        ("b:1", 256, False),
    ]


def test_a_service_that_is_a_backup_has_only_backups() -> None:
    known = {SERVICE: records((1, 1, "a", 1), (2, 1, "b", 1))}
    members = effective([replace(PG, is_backup=True)], known)
    assert [one.is_backup for one in members] == [True, True]


def test_a_server_that_two_records_have_is_there_once_as_the_better_one() -> None:
    known = {SERVICE: records((2, 9, "a", 1), (1, 3, "a", 1))}
    assert servers(effective([PG], known)) == [("a:1", 3, False)]


# -- addresses


def test_each_address_of_a_name_is_a_server_with_its_part_of_the_weight() -> None:
    known = {"web.example": addresses("10.0.0.2", "2001:db8::1", "10.0.0.1")}
    assert servers(effective([replace(WEB, weight=7, max_sessions=5)], known)) == [
        ("10.0.0.1:80", 2, False),
        ("10.0.0.2:80", 2, False),
        ("[2001:db8::1]:80", 2, False),
    ]
    assert {one.weight for one in effective([WEB], known)} == {1}
    assert {one.weight for one in effective([replace(WEB, weight=0)], known)} == {0}


def test_the_other_keys_of_a_server_are_those_of_each_member() -> None:
    known = {"web.example": addresses("10.0.0.2", "10.0.0.1")}
    written = replace(WEB, max_sessions=5, is_backup=True)
    assert {(one.max_sessions, one.is_backup) for one in effective([written], known)} == {(5, True)}


def test_a_server_that_stands_there_already_is_there_once() -> None:
    plain = Upstream(Address("10.0.0.1", 80), weight=9)
    known = {"web.example": addresses("10.0.0.1", "10.0.0.2")}
    assert servers(effective([plain, WEB], known)) == [
        ("10.0.0.1:80", 9, False),
        ("10.0.0.2:80", 1, False),
    ]


def test_an_address_of_an_interface_keeps_it() -> None:
    known = {"web.example": Answer((Target(socket.AF_INET6, ("fe80::1", 0, 0, 3)),))}
    assert [str(one) for one in effective([WEB], known)] == ["[fe80::1%3]:80"]


# -- nothing known


@pytest.mark.parametrize("written", [PG, WEB])
@pytest.mark.parametrize(
    "answer", [None, Answer((), "no such name"), Answer((), "none", records=())]
)
def test_what_has_no_members_stays_as_it_is_written(
    written: Upstream, answer: Answer | None
) -> None:
    host = written.end.host if isinstance(written.end, Address) else ""
    known = {host: answer} if answer is not None else {}
    plain = Upstream(Address("10.0.0.9", 80))
    assert effective([written, plain], known) == (written, plain)


def test_a_failure_keeps_the_records_and_a_service_that_is_no_more_has_none() -> None:
    found = records((1, 1, "a", 1))
    assert Answer((), "timed out").after(found).records == found.records
    assert Answer((), "no such name", is_final=True).after(found).records == found.records
    assert Answer((), srv.NOT_OFFERED, records=()).after(found).records == ()
    assert records((1, 1, "b", 1)).after(found).records == (Record(1, 1, "b", 1),)


@pytest.mark.parametrize(
    "answer", [records((1, 2, "a.example", 3)), Answer((), "no", records=()), addresses("10.0.0.1")]
)
def test_an_answer_travels_with_its_records(answer: Answer) -> None:
    assert Answer.from_json(answer.as_json()) == answer


@pytest.mark.parametrize(
    "record", [[1, 2, "a"], [1, 2, 3, 4], [1, 2, "a", 0], [-1, 2, "a", 3], "a"]
)
def test_a_record_that_makes_no_sense_is_refused(record: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        Answer.from_json([[], "", False, 0.0, [record]])


# -- what is told to whom


def test_members_differ_only_where_the_rule_as_written_is_the_same() -> None:
    one = a_rule(*effective([PG], {SERVICE: records((1, 1, "a", 1))}))
    other = a_rule(*effective([PG], {SERVICE: records((1, 1, "b", 1), (2, 1, "c", 1))}))
    assert as_written(other.upstreams) == (PG,)
    assert differ_by_members(one, other)
    assert differ_by_members(a_rule(PG), one)
    assert not differ_by_members(one, replace(other, connect_timeout_s=1.0))
    assert not differ_by_members(one, a_rule(Upstream(Address("a", 1))))
    assert not differ_by_members(
        a_rule(Upstream(Address("a", 1))), a_rule(Upstream(Address("b", 1)))
    )


def test_workers_are_told_the_names_of_members_and_the_service_is_looked_up_as_well() -> None:
    rule = a_rule(*effective([PG, WEB], {SERVICE: records((1, 1, "a.example", 1))}))
    assert all_names([rule]).keys() == {"a.example", "web.example"}
    assert sought_names([rule]) == {name: ["r"] for name in ("a.example", "web.example", SERVICE)}


def test_a_rule_has_something_to_choose_however_many_members_there_are() -> None:
    assert a_rule(PG).is_balanced
    assert a_rule(*effective([PG], {SERVICE: records((1, 1, "a", 1))})).is_balanced


def test_a_service_serves_members_and_keeps_its_configuration_as_written() -> None:
    text = rule_text(("127.0.0.1", 8000), ("127.0.0.2", 1))
    text += (
        f'[[forwarding_rules]]\nname = "pg"\nlisten = "127.0.0.1:8001"\nupstream = "{SERVICE}"\n'
    )
    config = parse(text, "f", Dialect.TOML).config
    known: dict[str, Answer] = {}
    service = Service(config, lambda: None, lambda: known)
    other, before = service.serving().config.rules
    assert before.upstreams == (PG,)
    assert not service.has_other_members()
    known[SERVICE] = records((1, 1, "a.example", 1))
    assert service.has_other_members()
    still, after = service.serving().config.rules
    assert [str(one) for one in after.upstreams] == ["a.example:1"]
    assert still is other
    assert service.config == config
    assert not service.has_other_members()
    known["elsewhere.example"] = addresses("10.0.0.1")
    known[SERVICE] = replace(known[SERVICE], why="timed out")
    assert not service.has_other_members()


# -- looking up


def test_records_are_sorted_and_what_cannot_be_used_is_left_out() -> None:
    found = srv._answer(
        [(2, 1, 80, "B.example."), (1, 1, 80, "a.example."), (1, 1, 0, "no-port.example.")], 5.0
    )
    assert found.records == (Record(1, 1, "a.example", 80), Record(2, 1, "b.example", 80))
    assert (found.why, found.good_for_s) == ("", 5.0)


def test_the_root_as_a_target_is_no_service() -> None:
    found = srv._answer([(0, 0, 0, ".")], 5.0)
    assert (found.records, found.why) == ((), srv.NOT_OFFERED)


def test_records_without_a_host_are_a_failure() -> None:
    assert srv._answer([(1, 1, 0, "a.example.")], 5.0).records is None


def test_without_dnspython_a_look_up_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dns.resolver", None)
    assert "dnspython" in look_up(SERVICE).why


@pytest.mark.parametrize(
    "text", ["srv:", "srv:a b", "srv:_pg._tcp.db.example:5432", "srv:10.0.0.1"]
)
def test_what_is_no_name_of_a_service_is_refused(text: str) -> None:
    with pytest.raises(AddressError):
        parse_service(text)


# -- when others are told


class Told:
    """What moves, and what became of it."""

    def __init__(self) -> None:
        self.has_moved = True
        self.may = True
        self.count = 0
        self.moving = Moving(self, lambda: self.may, self.change)

    def has_other_members(self) -> bool:
        return self.has_moved

    def change(self) -> None:
        self.count += 1


def test_nothing_is_told_without_an_answer_and_where_no_member_is_another() -> None:
    it = Told()
    it.moving.turn(1.0)
    assert (it.count, it.moving.deadline) == (0, None)
    it.has_moved = False
    it.moving.note()
    it.moving.turn(2.0)
    assert (it.count, it.moving.deadline) == (0, None)


def test_answers_one_after_the_other_are_told_together_after_a_rest() -> None:
    it = Told()
    it.moving.note()
    it.moving.turn(10.0)
    assert it.count == 1
    it.moving.note()
    it.moving.turn(10.0 + REST_S / 2)
    it.moving.note()
    assert (it.count, it.moving.deadline) == (1, 10.0 + REST_S)
    it.moving.turn(10.0 + REST_S)
    assert (it.count, it.moving.deadline) == (2, None)


def test_what_comes_during_an_upgrade_is_told_when_that_has_failed() -> None:
    it = Told()
    it.may = False
    it.moving.note()
    it.moving.turn(1.0)
    assert (it.count, it.moving.deadline) == (0, None)
    it.may = True
    it.moving.turn(2.0)
    assert it.count == 1
    it.moving.note()
    it.moving.cancel()
    it.moving.turn(9.0)
    assert it.count == 1
