"""A closed port of this host that the kernel may choose for us: nobody is there, nor are we."""

from __future__ import annotations

import socket
from contextlib import closing
from dataclasses import replace

import pytest
from support.by_hand import RULE, Bench, StubPool
from support.ends import receive_to_reset
from support.forwarder import reserve_port

from forwarder.config.model import Protocol
from forwarder.net.sockets import Target
from forwarder.stats.rows import ATTEMPTS_FAILED, CONNECTS_FAILED


@pytest.mark.expects_log("connect.failed")
@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.TCP_TO_UDP])
def test_a_session_does_not_become_its_own_upstream(protocol: Protocol) -> None:
    """Its end would be sent back all that it says."""
    with reserve_port() as holder:
        closed = holder.getsockname()
    pool = StubPool(replace(RULE, protocol=protocol), (Target(socket.AF_INET, closed),))
    pool.bound = closed  # as the kernel may choose by itself
    with closing(Bench()) as bench, bench.open(pool) as client:
        bench.relay.poller.turn()
        assert receive_to_reset(client) == b""
        assert (pool.counts[ATTEMPTS_FAILED], pool.counts[CONNECTS_FAILED]) == (1, 1)
