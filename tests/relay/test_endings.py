"""Half-close, close and reset arrive at the other side as what they were."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

import pytest
from conftest import EVERY_VARIANT
from support.ends import (
    Talker,
    fill,
    receive_exactly,
    receive_to_end,
    receive_to_reset,
    reset,
    seeded,
    send_to_reset,
    talk,
)
from support.waiting import eventually

from forwarder.net.sockets import unsent_bytes

if TYPE_CHECKING:
    from conftest import Tunnel

pytestmark = EVERY_VARIANT

MIB = 1 << 20
BOTH = pytest.mark.parametrize("first", ["client", "upstream"])


@BOTH
@pytest.mark.parametrize("size", [0, 1, 3 * MIB])
def test_a_reply_after_the_end_of_the_request_arrives(
    tunnel: Tunnel, first: str, size: int
) -> None:
    near, far = tunnel.link().end(first)
    near.sendall(b"request")
    near.shutdown(socket.SHUT_WR)
    assert receive_to_end(far) == b"request"
    reply = Talker(far, seeded(size, 5))
    listener = Talker(near, b"")
    listener._is_shut = True
    talk(reply_end(reply), listener)
    assert listener.received == reply.outgoing


def receive_cut(sock: socket.socket, other: socket.socket) -> bytes:
    """Receive until the session is cut by the other end; returns what came before.

    A reset, unless one of the two is a unix socket: those know none (docs/configuration.md), so an
    end of file will do. What exactly becomes of it is tested in ``test_unix``.
    """
    if socket.AF_UNIX not in (sock.family, other.family):
        return receive_to_reset(sock)
    received = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(1 << 20):
            received += part
    return bytes(received)


def reply_end(talker: Talker) -> Talker:
    talker._at_eof = True  # it has been read above
    return talker


@BOTH
def test_a_half_closed_session_goes_on_for_many_messages(tunnel: Tunnel, first: str) -> None:
    near, far = tunnel.link().end(first)
    near.shutdown(socket.SHUT_WR)
    assert receive_to_end(far) == b""
    for number in range(50):
        far.sendall(bytes([number]))
        assert receive_exactly(near, 1) == bytes([number])
    far.shutdown(socket.SHUT_WR)
    assert receive_to_end(near) == b""


@BOTH
def test_close_with_bytes_in_flight_delivers_them(tunnel: Tunnel, first: str) -> None:
    """The far side reads nothing until the near one has sent its part and closed."""
    near, far = tunnel.link().end(first)
    data = seeded(24 * MIB, 6)
    taken = fill(near, data)
    near.close()
    assert receive_to_end(far) == data[:taken]


@BOTH
def test_closing_at_once_is_an_end_of_file(tunnel: Tunnel, first: str) -> None:
    near, far = tunnel.link().end(first)
    near.close()
    assert receive_to_end(far) == b""


@BOTH
def test_a_reset_is_a_reset(tunnel: Tunnel, first: str) -> None:
    near, far = tunnel.link().end(first)
    reset(near)
    assert receive_cut(far, near) == b""


@BOTH
@pytest.mark.parametrize("size", [1, 1000, 100_000])
def test_what_was_read_before_a_reset_stays_read(tunnel: Tunnel, first: str, size: int) -> None:
    near, far = tunnel.link().end(first)
    data = seeded(size, 7)
    near.sendall(data)
    assert receive_exactly(far, size) == data
    reset(near)
    assert receive_cut(far, near) == b""


@BOTH
def test_a_response_and_then_a_reset_arrive_in_this_order(tunnel: Tunnel, first: str) -> None:
    """Closing with unread input sends RST after the response; directly, both would arrive.

    Linux does this whenever a server answers without having read the whole request.
    """
    near, far = tunnel.link().end(first)
    near.sendall(b"not read by the other side")
    response = seeded(5000, 8)
    eventually(lambda: _readable(far), "the request has arrived")
    far.sendall(response)
    far.close()
    assert receive_cut(near, far) == response


def _readable(sock: socket.socket) -> bool:
    return bool(sock.recv(1, socket.MSG_PEEK))


@BOTH
def test_a_reset_in_the_middle_of_bulk_is_a_reset(tunnel: Tunnel, first: str) -> None:
    near, far = tunnel.link().end(first)
    data = seeded(16 * MIB, 9)
    taken = fill(near, data)
    assert receive_exactly(far, 100_000) == data[:100_000]
    reset(near)
    rest = receive_cut(far, near)
    assert data[100_000:taken].startswith(rest)


@BOTH
def test_a_reader_that_resets_stops_the_sender(tunnel: Tunnel, first: str) -> None:
    """A clogged sink goes away: the sender learns of it, and nothing stays behind."""
    near, far = tunnel.link().end(first)
    fill(near, seeded(24 * MIB, 10))
    reset(far)
    send_to_reset(near)


@BOTH
def test_a_reset_of_a_half_closed_side_is_a_reset(tunnel: Tunnel, first: str) -> None:
    near, far = tunnel.link().end(first)
    near.sendall(b"request")
    near.shutdown(socket.SHUT_WR)
    assert receive_to_end(far) == b"request"
    reset(near)
    send_to_reset(far)


@BOTH
def test_a_reset_after_the_other_side_half_closed_is_a_reset(tunnel: Tunnel, first: str) -> None:
    near, far = tunnel.link().end(first)
    near.shutdown(socket.SHUT_WR)
    assert receive_to_end(far) == b""
    far.sendall(b"part of a reply")
    assert receive_exactly(near, 15) == b"part of a reply"
    reset(far)
    assert receive_cut(near, far) == b""


@BOTH
def test_a_cut_stream_does_not_look_whole_when_its_reader_half_closes(
    tunnel: Tunnel, first: str
) -> None:
    """The sender resets while its reader is slow, then the reader sends its own end of file.

    *Result*: the reader gets everything or a reset, not a part that ends as if it were all.
    """
    near, far = tunnel.link().end(first)
    data = seeded(64 * MIB, 11)
    taken = fill(near, data)
    assert taken < len(data), "not clogged"
    reset(near)
    far.shutdown(socket.SHUT_WR)
    receive_cut(far, near)


@BOTH
def test_both_sides_closing_at_once_end_the_session(tunnel: Tunnel, first: str) -> None:
    near, far = tunnel.link().end(first)
    near.shutdown(socket.SHUT_WR)
    far.shutdown(socket.SHUT_WR)
    assert receive_to_end(near) == b""
    assert receive_to_end(far) == b""


# -- a side that sends its FIN and is reset afterwards has cut nothing


def hand_over(near: socket.socket, far: socket.socket, data: bytes) -> tuple[bytes, bytearray]:
    """Send as much as goes and FIN, and have the forwarder take in both.

    Returns what was sent, and what ``far`` had to read for that: nothing, or enough to leave the
    forwarder as full as it gets.
    """
    sent = data[: fill(near, data)]
    near.shutdown(socket.SHUT_WR)
    received = bytearray()
    if len(sent) == len(data) < MIB:
        eventually(lambda: not unsent_bytes(near), "the forwarder has taken in the FIN")
    while unsent_bytes(near):
        received += far.recv(16 * 1024)
    return sent, received


def be_reset_after_fin(near: socket.socket, far: socket.socket, how: str) -> None:
    """Reset the connection of ``near``, which has sent its FIN.

    ``how``: at once, or because the other side says one thing more to a socket that is closed.
    """
    if how == "at once":
        reset(near)
        return
    if near.family == socket.AF_UNIX:
        far.sendall(b"not read")
        eventually(lambda: _readable(near), "what is never read has arrived")
    near.close()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a unix socket needs no more
        far.sendall(b"one thing more")


HOW = pytest.mark.parametrize("how", ["at once", "by one thing more"])
# Less than the send queue of the forwarder takes, so that its direction is done when the reset
# comes; and more than all its queues take, so that it is still at work then.
SIZES = pytest.mark.parametrize("size", [0, 1, 100_000, 24 * MIB])


@BOTH
@HOW
@SIZES
def test_what_was_ended_by_fin_arrives_though_a_reset_follows(
    tunnel: Tunnel, first: str, how: str, size: int
) -> None:
    """A server answers, ends, and goes; its slow client says one thing more meanwhile.

    *Result*: every byte and the end of file, as without a forwarder.
    """
    near, far = tunnel.link(receive_buffer=4096).end(first)
    data, received = hand_over(near, far, seeded(size, 12))
    be_reset_after_fin(near, far, how)
    assert received + receive_to_end(far) == data


@BOTH
def test_a_reader_that_takes_its_time_gets_all_after_a_reset(tunnel: Tunnel, first: str) -> None:
    """Little by little, and it goes on talking: what it says is dropped and stops nothing."""
    near, far = tunnel.link(receive_buffer=4096).end(first)
    data, received = hand_over(near, far, seeded(24 * MIB, 13))
    be_reset_after_fin(near, far, "by one thing more")
    while part := far.recv(16 * 1024):
        received += part
        with contextlib.suppress(BrokenPipeError):  # what is left is with its reader already
            far.sendall(b"and more")
    assert received == data


@BOTH
def test_who_writes_before_it_reads_comes_to_read_after_a_reset(tunnel: Tunnel, first: str) -> None:
    """Its words have nobody to go to any more; waiting for room it would never read the answer."""
    near, far = tunnel.link(receive_buffer=4096).end(first)
    data, received = hand_over(near, far, seeded(24 * MIB, 14))
    reset(near)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        far.sendall(seeded(24 * MIB, 15))
    assert received + receive_to_end(far) == data


@BOTH
def test_a_reset_without_a_fin_is_a_cut_though_a_send_has_found_it_first(
    tunnel: Tunnel, first: str
) -> None:
    """The kernel tells an error once: reads after that say end of file, which it is not."""
    near, far = tunnel.link(receive_buffer=4096).end(first)
    data = seeded(100_000, 16)
    near.sendall(data)
    assert receive_exactly(far, len(data)) == data
    fill(far, seeded(24 * MIB, 17))  # so that the forwarder has something to send when it comes
    reset(near)
    assert receive_cut(far, near) == b""
