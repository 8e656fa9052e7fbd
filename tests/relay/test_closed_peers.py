"""The other end of a socket that is closed already, as adoption has to know it."""

from __future__ import annotations

import socket
import struct

import pytest

from forwarder.relay.moving.adopting import _peer


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_a_socket_that_was_reset_still_knows_its_peer(family: int, host: str) -> None:
    with socket.create_server((host, 0), family=family) as listener:
        address = listener.getsockname()
        with socket.create_connection(address[:2]) as ours:
            theirs, _ = listener.accept()
            assert _peer(ours) == address
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            theirs.close()
            with pytest.raises(ConnectionResetError):
                ours.recv(1)
            assert _peer(ours) == address
