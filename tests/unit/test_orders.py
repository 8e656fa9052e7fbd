"""Orders: what follows from one after another, their text, and which servers a word means."""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.balancing.table import CUTS, DISABLED, DRAINS, HAS_ORDER, HAS_WEIGHT, ServerTable
from forwarder.control.orders import (
    Action,
    NonsenseError,
    Order,
    Orders,
    Stay,
    find,
    follow,
    host_of,
    read_json,
    read_text,
)

SERVER = ("pg", "10.0.0.1:5432")


def after(
    before: Order | None,
    action: Action,
    *,
    cuts: bool = False,
    weight: int | None = None,
    by: str = "alice",
    at: float = 2.0,
) -> Order:
    return follow(before, action, cuts=cuts, weight=weight, by=by, at=at)


DRAINED = Order(stay=Stay.DRAINED, by="root", at=1.0)
DISABLED_CUT = Order(stay=Stay.DISABLED, cuts=True, by="root", at=1.0)
WEIGHED = Order(weight=7, by="root", at=1.0)


@pytest.mark.parametrize(
    ("order", "word"),
    [
        (Order(), 0),
        (Order(cuts=True), 0),
        (DRAINED, HAS_ORDER | DRAINS),
        (DISABLED_CUT, HAS_ORDER | DRAINS | DISABLED | CUTS),
        (WEIGHED, HAS_ORDER | HAS_WEIGHT | 7),
        (Order(weight=0), HAS_ORDER | HAS_WEIGHT),
        (Order(stay=Stay.DRAINED, weight=256), HAS_ORDER | HAS_WEIGHT | DRAINS | 256),
    ],
)
def test_what_the_table_has_for_an_order(order: Order, word: int) -> None:
    assert order.word == word
    assert order.is_void == (word == 0)


def test_a_table_reads_an_order_as_it_was_meant() -> None:
    table = ServerTable()
    try:
        for weight, stay in product((None, 0, 1, 256), Stay):
            table.order(1, Order(weight=weight, stay=stay).word)
            assert table.orders(1, 3) == (3 if weight is None else weight, stay is not Stay.USED)
    finally:
        table.close()


def test_drain_and_disable_replace_each_other_and_leave_the_weight() -> None:
    order = after(WEIGHED, Action.DRAIN, cuts=True)
    assert (order.stay, order.cuts, order.weight, order.by) == (Stay.DRAINED, True, 7, "alice")
    order = after(order, Action.DISABLE)
    assert (order.stay, order.cuts, order.weight) == (Stay.DISABLED, False, 7)
    assert after(order, Action.DRAIN).stay is Stay.DRAINED


def test_a_weight_leaves_a_drained_server_drained() -> None:
    order = after(DISABLED_CUT, Action.WEIGHT, weight=0)
    assert (order.stay, order.cuts, order.weight) == (Stay.DISABLED, True, 0)


@pytest.mark.parametrize("before", [None, DRAINED, DISABLED_CUT, WEIGHED])
def test_enable_takes_everything_back(before: Order | None) -> None:
    assert after(before, Action.ENABLE).is_void


def test_what_orders_nothing_new_keeps_who_ordered_it_and_when() -> None:
    assert after(DRAINED, Action.DRAIN) is DRAINED
    assert after(WEIGHED, Action.WEIGHT, weight=7) is WEIGHED
    assert after(DRAINED, Action.DRAIN, cuts=True).by == "alice"


def test_orders_know_whether_they_change_something() -> None:
    orders = Orders()
    assert orders.put(SERVER, DRAINED)
    assert not orders.put(SERVER, DRAINED)
    assert orders.word(SERVER) == DRAINED.word
    assert orders.put(SERVER, Order())
    assert not orders.put(SERVER, Order())
    assert orders.given == {}
    assert orders.word(SERVER) == 0


texts = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=40)
some_orders = st.builds(
    Order,
    stay=st.sampled_from(Stay),
    weight=st.none() | st.integers(0, 256),
    by=texts,
    at=st.integers(0, 10**10).map(float),
).filter(lambda order: not order.is_void)


@given(st.dictionaries(st.tuples(texts, texts), some_orders, max_size=5), st.booleans())
def test_orders_survive_being_text(given: dict[tuple[str, str], Order], cuts: bool) -> None:
    orders = Orders()
    for server, order in given.items():
        is_cut = cuts and order.stay is not Stay.USED
        orders.put(
            server,
            Order(stay=order.stay, weight=order.weight, by=order.by, at=order.at, cuts=is_cut),
        )
    assert read_text(orders.as_text()) == orders.given
    assert read_json(orders.as_json()) == orders.given


def one_order(**changes: object) -> str:
    """A file with one order, right but for the changes."""
    one = {"group": "a", "server": "b", "by": "c", "what": "drain", "reset": False}
    return json.dumps({"version": 1, "orders": [{**one, "weight": None, "at": 1, **changes}]})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "line 1, column 1: Expecting value"),
        ('{"version": 1,\n "orders": [}', "line 2, column 13: Expecting value"),
        ("[" * 100_000, "nested too deeply"),
        ("7", 'not an object with "version": 1'),
        ('{"version": 2, "orders": []}', 'not an object with "version": 1'),
        ('{"version": 1}', "orders: not a list of at most 10000"),
        (json.dumps({"version": 1, "orders": [0] * 10_001}), "orders: not a list of at most 10000"),
        ('{"version": 1, "orders": [7]}', "orders[0]: not an object"),
        (one_order(server=7), "orders[0].server: not a text of at most 512 characters"),
        (one_order(by="\x1b[31m"), "orders[0].by: not a text of at most 512 characters"),
        (one_order(group="x" * 513), "orders[0].group: not a text of at most 512 characters"),
        (one_order(what="stop"), "orders[0].what: 'stop' is none of drain, disable, weight"),
        (one_order(what=["drain"]), "orders[0].what: ['drain'] is none of drain, disable, weight"),
        (one_order(reset=1), "orders[0].reset: 1 is neither true nor false"),
        (one_order(weight=257), "orders[0].weight: 257 is no number from 0 to 256"),
        (one_order(weight=True), "orders[0].weight: True is no number from 0 to 256"),
        (one_order(weight=1.5), "orders[0].weight: 1.5 is no number from 0 to 256"),
        (one_order(at="now"), "orders[0].at: 'now' is no time in seconds since 1970"),
        (one_order(at=-1), "orders[0].at: -1 is no time in seconds since 1970"),
        (one_order(at=float("nan")), "orders[0].at: nan is no time in seconds since 1970"),
        (one_order(what="weight"), "orders[0]: what is weight, and there is none"),
        (
            json.dumps({"version": 1, "orders": json.loads(one_order())["orders"] * 2}),
            "orders[1]: another order for 'b' of 'a'",
        ),
    ],
)
def test_nonsense_is_refused_with_its_place(text: str, why: str) -> None:
    with pytest.raises(NonsenseError) as caught:
        read_text(text.encode())
    assert str(caught.value) == why


def test_bytes_that_are_no_text_are_refused_with_their_place() -> None:
    with pytest.raises(NonsenseError, match="byte 3: not UTF-8"):
        read_text(b'{"\xff"}')


@given(st.binary(max_size=200))
def test_whatever_is_in_a_file_is_orders_or_nonsense(text: bytes) -> None:
    with suppress(NonsenseError):
        assert read_text(text) == {}


KNOWN = ["10.0.0.12:80", "10.0.0.2:80", "10.0.0.2:81", "db1.example:5432", "[2001:db8::1]:80"]


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("10.0.0.2:80", ["10.0.0.2:80"]),
        ("10.0.0.12", ["10.0.0.12:80"]),
        ("10.0.0.1", []),
        ("10.0.0.2", ["10.0.0.2:80", "10.0.0.2:81"]),
        ("2001:db8::1", ["[2001:db8::1]:80"]),
        ("db1", ["db1.example:5432"]),
        ("db", []),
        ("5432", ["db1.example:5432"]),
        (".2:81", ["10.0.0.2:81"]),
        ("80", ["10.0.0.12:80", "10.0.0.2:80", "[2001:db8::1]:80"]),
        ("nobody", []),
    ],
)
def test_which_server_a_word_means(word: str, meant: list[str]) -> None:
    assert find(word, KNOWN) == meant


@pytest.mark.parametrize(
    ("server", "host"),
    [("a:1", "a"), ("[::1]:80-90", "::1"), ("unix:/run/x", "unix"), ("alone", "alone")],
)
def test_the_host_of_a_server(server: str, host: str) -> None:
    assert host_of(server) == host
