"""Listening sockets that are set aside: whether they are in the way of those in their place."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from support.ends import has_mptcp
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


def is_in_the_way(host: str = "127.0.0.1") -> bool:
    """Whether the sockets of ``host`` are, when the port is had by MPTCP on 127.0.0.1 instead."""
    if not has_mptcp():
        pytest.skip("this kernel has no MPTCP")
    table = ListenerTable()
    with reserve_port("0.0.0.0") as holder:
        port = holder.getsockname()[1]
        old = BindAddress(Target(holder.family, (host, port)))
        new = BindAddress(Target(holder.family, ("127.0.0.1", port)), is_mptcp=True)
        try:
            for address, more in ((old, ""), (new, 'mptcp = "listen"')):
                head = f'[[forwarding_rules]]\nlisten = "{address.target}"\n'
                text = f'{head}upstream = "a:1"\n{more}'
                (rule,) = parse(text, "a.toml", Dialect.TOML).config.rules
                table.add({address: rule}, 2)
            return table.is_in_the_way(table.turn_away(old, is_served=True))
        finally:
            table.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can listen apart")
def test_with_rights_nothing_is_in_the_way() -> None:
    assert not is_in_the_way()


@pytest.mark.usefixtures("no_rights")
def test_without_rights_the_same_address_is_in_the_way_and_no_other_is() -> None:
    assert is_in_the_way()
    assert not is_in_the_way("0.0.0.0")
