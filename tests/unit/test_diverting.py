"""Listening sockets that are set aside: whether they are in the way of those in their place."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import pytest
from support.ends import connect, has_mptcp
from support.forwarder import reserve_port
from support.processes import NOBODY

from forwarder.config import Dialect, parse
from forwarder.net.sockets import Target
from forwarder.serving.addresses import BindAddress
from forwarder.serving.listeners import ListenerTable

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def no_rights() -> Iterator[None]:
    """Be an ordinary user for a while."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(NOBODY)
    yield
    os.seteuid(mine)


def address_of(host: str, port: int, *, is_mptcp: bool = False) -> BindAddress:
    return BindAddress(Target(socket.AF_INET, (host, port)), is_mptcp=is_mptcp)


def add(table: ListenerTable, address: BindAddress) -> None:
    """Make two sockets for an address."""
    more = 'mptcp = "listen"' if address.is_mptcp else ""
    head = f'[[forwarding_rules]]\nlisten = "{address.target}"\n'
    text = f'{head}upstream = "a:1"\n{more}'
    (rule,) = parse(text, "a.toml", Dialect.TOML).config.rules
    table.add({address: rule}, 2)


@pytest.fixture
def table() -> Iterator[ListenerTable]:
    """A table without any socket."""
    if not has_mptcp():
        pytest.skip("this kernel has no MPTCP")
    found = ListenerTable()
    yield found
    found.close()


@pytest.fixture
def port() -> Iterator[int]:
    """A port that nobody else gets."""
    with reserve_port("0.0.0.0") as holder:
        yield holder.getsockname()[1]


def is_in_the_way(table: ListenerTable, host: str, port: int) -> bool:
    """Whether the sockets of ``host`` are, when the port is had by MPTCP on 127.0.0.1 instead."""
    old = address_of(host, port)
    add(table, old)
    add(table, address_of("127.0.0.1", port, is_mptcp=True))
    return table.is_in_the_way(table.turn_away(old, is_served=True))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can listen apart")
def test_with_rights_nothing_is_in_the_way(table: ListenerTable, port: int) -> None:
    assert not is_in_the_way(table, "127.0.0.1", port)


@pytest.mark.usefixtures("no_rights")
@pytest.mark.parametrize(("host", "is_so"), [("127.0.0.1", True), ("0.0.0.0", False)])
def test_without_rights_the_same_address_is_in_the_way_and_no_other_is(
    table: ListenerTable, port: int, host: str, is_so: bool
) -> None:
    assert is_in_the_way(table, host, port) == is_so


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can listen apart")
def test_all_new_sockets_get_clients_however_often_they_change(
    table: ListenerTable, port: int
) -> None:
    """To MPTCP and back while the first ones are not closed yet; a hundred clients each time."""
    for number in range(4):
        address = address_of("127.0.0.1", port, is_mptcp=number % 2 == 1)
        add(table, address)
        if number:
            table.turn_away(address.twin, is_served=True)
        with ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(connect(("127.0.0.1", port)))
            served = [accepted(sock) for sock in table._by_address[address].sockets]
            assert sum(served) == 100
            assert min(served) > 0


def accepted(listener: socket.socket) -> int:
    """How many clients wait in a queue; they are taken."""
    count = 0
    with suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()
            count += 1
    return count
