"""A TCP client whose upstream is reached by UDP: what it sends becomes datagrams, and back.

It goes on for as long as the client's connection does, however silent the upstream is. When the
client has sent its FIN, answers may still come: it ends when none has come for ``udp_timeout_s``.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from forwarder.net import sockets
from forwarder.net.datagrams import Destination
from forwarder.relay.udp.directions import DatagramToStream, StreamToDatagram
from forwarder.relay.udp.flow import Flow
from forwarder.stats.reasons import CloseReason, Phase, Who

if TYPE_CHECKING:
    import socket

    from forwarder.net.sockets import SockAddr, Target
    from forwarder.relay.udp.flow import UdpHome
    from forwarder.upstream.pool import Pool


class Bridge(Flow):
    """Owns ``client``, an accepted connection, from the constructor on."""

    __slots__ = ()

    c2u: StreamToDatagram
    u2c: DatagramToStream

    def __init__(
        self, relay: UdpHome, pool: Pool, client: socket.SocketType, client_address: SockAddr
    ) -> None:
        super().__init__(relay, pool, client_address)
        self.client = client
        bench, framing = relay.bench, pool.rule.framing
        self.join(StreamToDatagram(bench, self, framing), DatagramToStream(bench, self, framing))

    def local(self) -> Target:
        """The address of ours that the client is connected to. Raises OSError if it is closed."""
        if self.client is None:
            raise OSError(errno.ENOTCONN, "no client")
        return self.pool.local or sockets.bound_to(self.client)

    def on_dialing(self) -> None:
        """Watch the client, which may go while it waits. What it has sent is reported at once."""
        client = self.client
        if client is None:
            raise OSError(errno.ENOTCONN, "the client has gone")
        if self.c2u.src is None:  # else it is watched already
            self.relay.poller.register(client.fileno(), self.c2u)
            self.c2u.src = client

    def connect(self, upstream: socket.SocketType, target: Target) -> int:
        """Watch the client as well."""
        error = super().connect(upstream, target)
        try:
            self.on_dialing()
        except OSError:
            self.relay.poller.unregister(upstream.fileno())  # the dialer closes it
            raise
        return error

    def on_connected(self, upstream: socket.SocketType, mask: int) -> None:
        """Both sides are there, for the first time or with another upstream."""
        del mask
        is_first = not self.connected_at
        self.join_upstream(upstream, Destination(upstream.fileno()))
        client = self.client
        assert client is not None  # noqa: S101 - it was when this connected, just now
        self.on_open()
        if is_first:
            self.u2c.open(client)
        self.c2u.resume()

    @property
    def silence_limit_s(self) -> float:
        """While the client may still send: the rule's limit for idle sessions; then UDP's."""
        rule = self.pool.rule
        return rule.udp_timeout_s if self.c2u.is_ended else rule.idle_timeout_s

    @property
    def ends_by_silence(self) -> bool:
        """Whether the client has ended, so that only answers are waited for."""
        return self.c2u.is_ended

    def on_stream_ended(self) -> None:
        """The client has sent its FIN: wait for answers to what it has asked."""
        self.touch()
        self.arm(self.silence_limit_s)

    def on_stream_broken(self, why: str) -> None:
        """The client has reset the connection."""
        phase = Phase.DATA if self.connected_at else Phase.CONNECT
        self.abort(CloseReason(Who.CLIENT, phase, why, is_reset=True))

    @property
    def to_stream(self) -> DatagramToStream:
        """To the client."""
        return self.u2c
