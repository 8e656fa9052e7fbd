"""What travels of a session and of its rule is what was there; nonsense is refused as nonsense."""

from __future__ import annotations

import json
import math
import os
import resource
import socket
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import procfs

from forwarder.config.address import Address, UnixAddress
from forwarder.config.model import (
    AccessRule,
    Answers,
    Framing,
    Group,
    Limits,
    Protocol,
    Rule,
    Sides,
    SocketOptions,
    Upstream,
    Verdict,
)
from forwarder.errors import Place
from forwarder.ipc import consignment as messages
from forwarder.ipc.channel import Received, channel_pair, to_memory_file
from forwarder.ipc.consignment import MAX_SESSIONS, Consignment, read_taken
from forwarder.relay.moving.parcel import FILE, PIPE, Parcel, ServerShare, Way
from forwarder.relay.moving.terms import have_other_members, rule_of, terms_of

if TYPE_CHECKING:
    from collections.abc import Iterator

PLACE = Place("test")
TIMES = st.floats(0, 1e9)
COUNTS = st.integers(0, 2**64 - 1)
ADDRESSES = st.one_of(
    st.tuples(st.text(max_size=40), st.integers(0, 65535)),
    st.tuples(
        st.text(max_size=40), st.integers(0, 65535), st.integers(0, 2**20), st.integers(0, 99)
    ),
    st.text(max_size=100),
)
WAYS = st.builds(
    Way,
    moved=COUNTS,
    is_done=st.booleans(),
    is_sink=st.booleans(),
    can_splice=st.booleans(),
    waiting=st.sampled_from(["", FILE, PIPE]),
)
PARCELS = st.builds(
    Parcel,
    kind=st.text(max_size=9),
    id=COUNTS,
    terms=st.integers(0, 99),
    client=ADDRESSES,
    state=st.text(max_size=9),
    offset=st.integers(0, 65535),
    family=st.integers(0, 44),
    target=st.none() | ADDRESSES,
    started_at=TIMES,
    connected_at=TIMES,
    active_at=TIMES,
    deadline=TIMES | st.just(math.inf),
    held_as=st.none() | COUNTS,
    server=st.none()
    | st.builds(ServerShare, name=st.text(max_size=9), row=st.integers(), is_counted=st.booleans()),
    cut_at=TIMES,
    due_at=TIMES,
    adoptions=st.integers(0, 9),
    ending=st.none() | st.tuples(st.text(), st.text(), st.text(), st.booleans()),
    unsent=COUNTS,
    c2u=WAYS,
    u2c=WAYS,
    more=st.dictionaries(st.text(max_size=9), st.integers() | st.text() | st.none(), max_size=3),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)


def over_the_wire(content: object) -> Any:  # noqa: ANN401 - anything
    """What becomes of it on its way."""
    return json.loads(json.dumps(content).encode())


@given(PARCELS)
def test_a_parcel_arrives_as_it_was(parcel: Parcel) -> None:
    assert Parcel.from_json(over_the_wire(parcel.as_json())) == parcel


@given(PARCELS, JSON)
def test_what_only_a_newer_version_knows_is_ignored(parcel: Parcel, more: object) -> None:
    content = parcel.as_json() | {"of tomorrow": more}
    content["c2u"] = {**parcel.c2u.as_json(), "of tomorrow": more}
    assert Parcel.from_json(over_the_wire(content)) == parcel


@given(PARCELS, st.sampled_from([one.name for one in fields(Parcel)]), JSON)
def test_nonsense_in_a_field_is_a_value_error_or_a_value(
    parcel: Parcel, key: str, value: object
) -> None:
    content = over_the_wire(parcel.as_json()) | {key: value}
    try:
        found = Parcel.from_json(content)
    except ValueError:
        return
    assert Parcel.from_json(over_the_wire(found.as_json())) == found


@pytest.mark.parametrize("value", [10**400, -1, True, "1", None, [], 2**64])
def test_a_number_that_is_none_is_a_value_error(value: object) -> None:
    content = Parcel(kind="", id=1, terms=0, client="", state="").as_json()
    for key in ("id", "connected_at", "c2u"):
        if key == "connected_at" and value == -1:
            continue
        spoilt = {"moved": value} if key == "c2u" else value
        with pytest.raises(ValueError):  # noqa: PT011 - whatever is wrong with it
            Parcel.from_json({**content, key: spoilt})


@given(JSON)
def test_anything_is_a_value_error_or_a_parcel(content: object) -> None:
    try:
        Parcel.from_json(content)
    except ValueError:
        return


RULES = [
    Rule(
        name="plain",
        listen=Address("127.0.0.1", 80),
        upstreams=(Upstream(Address("10.0.0.1", 81)),),
        place=PLACE,
    ),
    Rule(
        name="everything",
        listen=Address("::", 8000, 100),
        upstreams=(
            Upstream(Address("fe80::1%eth0", 8000, 100), weight=3),
            Upstream(Address("web.example", 8000, 100), is_backup=True, max_sessions=9),
        ),
        group=Group(name="shared", retries=2),
        protocol=Protocol.UDP_TO_TCP,
        source="192.0.2.1",
        access=(
            AccessRule(verdict=Verdict.ALLOW, pattern="10.0.0.0/8", place=PLACE),
            AccessRule(verdict=Verdict.DENY, pattern="10.1.*", place=PLACE),
        ),
        connect_timeout_s=1.5,
        half_close_timeout_s=2.0,
        idle_timeout_s=3.0,
        udp_timeout_s=4.0,
        max_flows=5,
        framing=Framing.LENGTH,
        answers=Answers.ONE,
        limits=Limits(bandwidth=1e6),
        options=SocketOptions(
            keepalive=False,
            keepalive_idle_s=7,
            fast_open=Sides.CONNECT,
            congestion="reno",
            mark=8,
            transparent=True,
        ),
        place=PLACE,
    ),
    Rule(
        name="unix",
        listen=UnixAddress("/run/some socket"),
        upstreams=(Upstream(UnixAddress("@name")),),
        place=PLACE,
    ),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_has_the_same_terms_when_it_has_arrived(rule: Rule) -> None:
    terms = over_the_wire(terms_of(rule))
    again = rule_of(terms)
    assert terms_of(again) == terms == terms_of(rule)
    assert again.upstream_ends == rule.upstream_ends
    for key in ("name", "listen", "protocol", "source", "access", "options", "framing", "answers"):
        assert getattr(again, key) == getattr(rule, key)


def test_every_option_of_sockets_travels() -> None:
    values = {bool: True, int: 7, str: "x"}
    for one in fields(SocketOptions):
        if one.name == "places":
            continue
        value: object = Sides.BOTH if isinstance(one.default, Sides) else None
        if value is None:
            kind = str(one.type).split(" ")[0]
            value = not one.default if kind == "bool" else values[{"int": int, "str": str}[kind]]
        options = replace(SocketOptions(), **{one.name: value})  # type: ignore[arg-type]  # by name
        rule = replace(RULES[0], options=options)
        assert rule_of(over_the_wire(terms_of(rule))).options == options


def test_members_of_a_name_may_be_others_under_the_same_terms() -> None:
    written = Upstream(Address("web.example", 80), expands=True)
    members = [Upstream(Address(f"10.0.0.{n}", 80), origin=written) for n in range(3)]
    one = terms_of(replace(RULES[0], upstreams=tuple(members[:2])))
    other = terms_of(replace(RULES[0], upstreams=tuple(members[1:])))
    assert one != other
    assert have_other_members(one, other)
    assert not have_other_members(one, {**other, "idle_timeout_s": 5.0})
    plain = terms_of(RULES[0])
    assert not have_other_members(plain, {**plain, "upstreams": ["10.9.9.9:1"]})


@given(st.sampled_from(RULES), st.sampled_from(sorted(terms_of(RULES[1]))), JSON)
def test_nonsense_in_terms_is_a_value_error_or_a_rule(rule: Rule, key: str, value: object) -> None:
    try:
        found = rule_of({**terms_of(rule), key: value})
    except ValueError:
        return
    assert isinstance(found, Rule)


# -- consignments


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Two descriptors."""
    ends = os.pipe2(os.O_CLOEXEC)
    yield ends
    for fd in ends:
        os.close(fd)


def received(message: dict[str, object], count: int) -> Received:
    """A message with so many descriptors, of memory files."""
    return Received(over_the_wire(message), [to_memory_file(b"{}") for _ in range(count)])


GOOD: dict[str, object] = {
    "op": "parcels",
    "number": 1,
    "version": 1,
    "left": 0,
    "busy": 0,
    "sessions": [[0, 2], [1, 3]],
}


def open_descriptors() -> int:
    """How many this process has."""
    return len(procfs.descriptors(os.getpid()))


def test_a_consignment_arrives_with_all_its_descriptors(pipe: tuple[int, int]) -> None:
    ours, theirs = channel_pair()
    fds = [[os.dup(pipe[0])], [os.dup(pipe[1]), os.dup(pipe[0])]]
    sent = Consignment.of(7, {"sessions": ["a", "b"]}, fds)
    sent.left, sent.busy, sent.is_foreign = 3, 4, True
    sent.send(ours)
    found = Consignment.read(theirs.receive()[0])
    assert (found.number, found.left, found.busy, found.is_foreign) == (7, 3, 4, True)
    assert [(place, len(fds)) for place, fds in found.sessions] == [(0, 1), (1, 2)]
    assert found.read_content() == {"sessions": ["a", "b"]}
    os.write(found.sessions[1][1][0], b"x")
    assert os.read(sent.sessions[0][1][0], 9) == b"x"
    assert found.claim()
    assert not sent.claim()
    for one in (sent, found):
        one.close()
    ours.close()
    theirs.close()


@pytest.mark.parametrize("refused", [(0,), (1,), (1, 2)])
def test_what_was_refused_is_a_consignment_of_its_own(
    pipe: tuple[int, int], refused: tuple[int, ...]
) -> None:
    before = open_descriptors()
    fds = [[os.dup(pipe[0])] for _ in range(3)]
    whole = Consignment.of(7, {"sessions": ["a", "b", "c"]}, fds)
    assert whole.claim()
    rest = whole.only(refused)
    assert [place for place, _ in rest.sessions] == [*refused]
    assert not whole.sessions
    assert rest.claim()
    assert rest.read_content()["sessions"] == ["a", "b", "c"]
    rest.close()
    assert open_descriptors() == before


def test_all_refused_is_the_same_one_whose_token_is_good(pipe: tuple[int, int]) -> None:
    whole = Consignment.of(7, {}, [[os.dup(pipe[0])]])
    assert whole.only([0]) is whole
    assert whole.claim()
    whole.close()


def test_sessions_that_nobody_goes_on_with_are_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        sock, _ = server.accept()
    given = Consignment.of(1, {}, [[sock.detach()]])
    given.abort()
    with client, pytest.raises(ConnectionResetError):
        client.recv(1)


def test_what_is_no_socket_of_them_is_closed_as_well(pipe: tuple[int, int]) -> None:
    before = open_descriptors()
    Consignment.of(1, {}, [[os.dup(pipe[0]), os.dup(pipe[1])]]).abort()
    assert open_descriptors() == before


def test_a_memory_file_that_may_not_be_so_long_is_closed() -> None:
    """Sessions whose data does not fit are tried again and again."""
    before = open_descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="large"):
            to_memory_file(bytes(8192))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert open_descriptors() == before


def test_what_was_read_can_be_sent_on() -> None:
    """With numbers as long as they may be, though they were written without a space."""
    most = (1 << 63) - 1
    ours, theirs = channel_pair()
    whole = dict.fromkeys(("number", "version", "left", "busy"), most)
    shares = [[most, 2]] * MAX_SESSIONS
    one = Consignment.read(received(GOOD | whole | {"sessions": shares}, 2 * MAX_SESSIONS + 2))
    one.send(ours)
    Consignment.read(theirs.receive()[0]).close()
    one.close()
    ours.close()
    theirs.close()
    with pytest.raises(ValueError, match="number"):
        Consignment.read(received(GOOD | {"sessions": [[most + 1, 0]]}, 2))


@given(
    st.sampled_from(sorted(GOOD)) | st.just("foreign"),
    JSON | st.lists(st.lists(st.integers(-1, 300), max_size=3), max_size=120),
    st.integers(0, 9),
)
def test_a_hostile_consignment_is_refused_and_leaves_no_descriptor(
    key: str, value: object, count: int
) -> None:
    before = open_descriptors()
    try:
        found = Consignment.read(received(GOOD | {key: value}, count))
    except ValueError:
        pass
    else:
        assert len(found.fds) in (0, count)
        found.close()
    assert open_descriptors() == before


@pytest.mark.parametrize("count", [6, 8])
def test_too_few_and_too_many_descriptors_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="descriptors"):
        Consignment.read(received(GOOD, count))
    Consignment.read(received(GOOD, 7)).close()


def test_descriptors_that_ran_out_are_refused() -> None:
    one = received(GOOD, 7)
    one.is_truncated = True
    with pytest.raises(ValueError, match="descriptors"):
        Consignment.read(one)
    assert not one.fds


@pytest.mark.parametrize("content", [b"", b"[]", b"1", b"{", b"[" * 10_000, b"\xff"])
def test_content_that_is_none_is_a_value_error(content: bytes) -> None:
    given = Consignment(1, content=to_memory_file(content))
    with pytest.raises(ValueError):  # noqa: PT011 - whatever is wrong with it
        given.read_content()
    given.close()


def test_content_that_would_block_is_not_read(pipe: tuple[int, int]) -> None:
    given = Consignment(1, content=os.dup(pipe[0]))
    with pytest.raises(ValueError, match="memory file"):
        given.read_content()
    given.close()


@given(JSON, JSON, JSON)
def test_a_hostile_answer_is_a_value_error(number: object, refused: object, why: object) -> None:
    try:
        found = read_taken({"number": number, "refused": refused, "why": why})
    except ValueError:
        return
    assert all(type(one) is int and one >= 0 for one in (found[0], *found[1]))


def test_what_is_asked_and_settled_is_what_the_worker_reads() -> None:
    choice = {"rule": "web"}
    assert messages.move(5, 9, choice) == {"op": "move", "number": 5, "limit": 9, "rule": "web"}
    assert messages.moved(5, refused=[1])["refused"] == [1]
