"""Every byte arrives, once and in order, in every variant of the relay."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
from conftest import EVERY_VARIANT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.ends import Talker, carry, receive_exactly, seeded, talk

if TYPE_CHECKING:
    from conftest import Tunnel

pytestmark = EVERY_VARIANT

MIB = 1 << 20
# Around what one read of a message takes, what bulk takes at once, and what a turn may move.
EDGES = [16 * 1024, 20 * 1024, 64 * 1024, 256 * 1024, MIB]
SIZES = st.one_of(
    st.integers(0, 3000),
    st.integers(0, 700_000),
    st.sampled_from([edge + off for edge in EDGES for off in (-1, 0, 1)]),
)
CHUNKS = st.lists(
    st.one_of(st.integers(1, 40), st.integers(1, 200_000), st.sampled_from(EDGES)),
    min_size=1,
    max_size=6,
).filter(lambda sizes: sum(sizes) / len(sizes) > 200)


def exchange(tunnel: Tunnel, up: Talker, down: Talker) -> None:
    talk(up, down)
    assert down.received == up.outgoing
    assert up.received == down.outgoing
    tunnel.close_links()


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(SIZES, SIZES, CHUNKS, CHUNKS, st.sampled_from(["none", "client", "upstream"]))
def test_any_sizes_in_any_chunks_arrive_both_ways_at_once(
    tunnel: Tunnel, up: int, down: int, up_chunks: list[int], down_chunks: list[int], waits: str
) -> None:
    link = tunnel.link()
    exchange(
        tunnel,
        Talker(link.client, seeded(up, up), up_chunks, after_eof=waits == "client"),
        Talker(link.upstream, seeded(down, down + 1), down_chunks, after_eof=waits == "upstream"),
    )


@pytest.mark.parametrize(("up", "down"), [(64 * MIB, 0), (0, 64 * MIB), (24 * MIB, 24 * MIB)])
def test_bulk_arrives_exactly(tunnel: Tunnel, up: int, down: int) -> None:
    link = tunnel.link()
    exchange(tunnel, Talker(link.client, seeded(up, 1)), Talker(link.upstream, seeded(down, 2)))


def test_single_bytes_arrive_while_the_other_way_is_bulk(tunnel: Tunnel) -> None:
    link = tunnel.link()
    exchange(
        tunnel,
        Talker(link.client, seeded(3000, 3), [1]),
        Talker(link.upstream, seeded(8 * MIB, 4), [100_003]),
    )


def test_requests_and_replies_of_one_byte(tunnel: Tunnel) -> None:
    link = tunnel.link()
    for number in range(200):
        byte = bytes([number])
        link.client.sendall(byte)
        assert receive_exactly(link.upstream, 1) == byte
        link.upstream.sendall(byte)
        assert receive_exactly(link.client, 1) == byte


@pytest.mark.parametrize("size", [edge + off for edge in EDGES for off in (-1, 0, 1)])
def test_a_message_of_exactly_a_buffer_does_not_wait_for_more(tunnel: Tunnel, size: int) -> None:
    """The reply shows that all of a message arrived although nothing follows it."""
    client, upstream = tunnel.link()
    carry(client, upstream, seeded(size, size))
    carry(upstream, client, seeded(size, size + 1))


def test_switching_between_messages_and_bulk(tunnel: Tunnel) -> None:
    """The same session alternates, so each way takes over from the other without a gap."""
    link = tunnel.link()
    up = b"".join(seeded(size, size) for size in (1, 3 * MIB, 7, 20_000, 2 * MIB, 5, 65_536, 1))
    chunks = [1, 3 * MIB, 7, 20_000, 2 * MIB, 5, 65_536, 1]
    exchange(tunnel, Talker(link.client, up, chunks), Talker(link.upstream, up[::-1], chunks[::-1]))


def test_many_sessions_at_once_keep_their_bytes_apart(tunnel: Tunnel) -> None:
    """200 sessions, each with content of its own in both directions."""
    talkers = []
    for number in range(200):
        link = tunnel.link()
        sizes = (number * 997 % 60_000, number * 3001 % 90_000)
        talkers.append(Talker(link.client, seeded(sizes[0], number), [1 + number * 37]))
        talkers.append(Talker(link.upstream, seeded(sizes[1], 1000 + number), [1 + number * 53]))
    talk(*talkers)
    for up, down in zip(talkers[::2], talkers[1::2], strict=True):
        assert down.received == up.outgoing
        assert up.received == down.outgoing


def test_sessions_opened_and_closed_in_turn_get_their_own_bytes(tunnel: Tunnel) -> None:
    """Descriptor numbers are used again and again; no event may reach the wrong session."""
    for number in range(150):
        link = tunnel.link()
        message = seeded(50, number)
        link.client.sendall(message)
        link.client.shutdown(socket.SHUT_WR)
        assert receive_exactly(link.upstream, 50) == message
        link.upstream.sendall(message[::-1])
        if number % 2:
            link.upstream.close()
        assert receive_exactly(link.client, 50) == message[::-1]
        tunnel.close_links()
