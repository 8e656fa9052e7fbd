"""Receiving from UDP clients that have no socket of their own, above all from new ones.

Does not bind and does not own the socket: the worker does. ``udp.client_flow`` says when a flow
settles.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
from typing import TYPE_CHECKING, Final

from forwarder.limits.admission import client_host
from forwarder.limits.gate import Busy
from forwarder.net import many, peers, sockets, udp
from forwarder.net.datagrams import SLOTS
from forwarder.relay import pauses
from forwarder.relay.access import Decision
from forwarder.relay.poller import READABLE, WRITABLE
from forwarder.relay.udp.answers import flow_class
from forwarder.relay.udp.client_flow import local_of
from forwarder.stats.reasons import CloseReason, Phase, Who
from forwarder.system.printable import field

if TYPE_CHECKING:
    from forwarder.net.sockets import IpSockAddr, Target
    from forwarder.relay.access import AccessList
    from forwarder.relay.relay import Relay
    from forwarder.relay.udp.client_flow import UdpFlow
    from forwarder.relay.udp.directions import FlowDirection
    from forwarder.system.loop import Clock, Timer
    from forwarder.upstream.pool import Pool

log = logging.getLogger(__name__)

# Receives per event. The poll is level-triggered, so the rest is reported by the next one.
_BATCHES: Final = 4
# Receives after the listener has to stop: queued datagrams are questions of clients. As many are
# made before new sockets of flows are read: more than a queue of the default size (425,984 bytes,
# at least 768 for a datagram) holds.
_LAST_BATCHES: Final = 16
# Addresses of ours remembered with whether they are for many. Arbitrary.
_MANY_KNOWN: Final = 256
# How often in a row flows settle that became ripe while others did.
_SETTLE_ROUNDS: Final = 4


class UdpListener:
    """Hands the clients of one UDP socket to flows. Never dies of an error."""

    __slots__ = (
        "_blocked",
        "_flows",
        "_is_flat",
        "_is_on_wildcard",
        "_loop",
        "_many",
        "_name_bytes",
        "_own",
        "_relay",
        "_ripe",
        "_settled",
        "_settles",
        "_strays_to",
        "_timer",
        "access",
        "bound",
        "pool",
        "sock",
    )

    def __init__(
        self,
        loop: Clock,
        relay: Relay,
        sock: socket.socket,
        pool: Pool,
        access: AccessList,
    ) -> None:
        """``sock`` is bound, non-blocking. Clients that ``access`` allows get a flow to ``pool``.

        Of a rule with a range of ports, ``pool`` is that of the whole rule until a client comes.
        """
        self.sock = sock
        self._loop = loop
        self._timer: Timer | None = None  # while the poller does not take it
        self.bound = sockets.bound_to(sock)  # flows outlive the socket
        self.pool = pool
        self.access = access
        self._relay = relay
        self._own: Pool | None = None
        self._flows: dict[bytes, UdpFlow] = {}
        self._settled = 0
        self._settles = True
        # While what came to a new socket is read: our address that it was sent to, as in a peer.
        self._strays_to: bytes | None = None
        self._is_flat = udp.has_flat_lookup(sock)
        self._is_on_wildcard = udp.is_on_wildcard(sock)
        self._ripe: set[UdpFlow] = set()  # to settle when the batch at hand is dealt with
        self._blocked: dict[FlowDirection, None] = {}  # until the socket takes more
        self._name_bytes = peers.SOCKADDR_BYTES[sock.family]
        self._many: dict[bytes, bool] = {}  # what is_for_many has found, by our address

    def start(self) -> None:
        """Begin to receive."""
        self._relay.udp_listeners.setdefault(self.bound, []).append(self)
        if self._is_on_wildcard and self.sock.family == socket.AF_INET6:
            self._relay.wildcard_ports[self.bound.port] += 1
        self._watch()

    def _watch(self) -> None:
        """Let the poller watch the socket, now or when it takes one more."""
        self._timer = None
        try:
            self._relay.poller.register(self.sock.fileno(), self, select.EPOLLIN)
        except OSError as err:
            self._relay.pauses.note(err.errno or pauses.BUG)
            self._timer = self._loop.call_later(pauses.PAUSE_S, self._watch)

    def stop(self) -> None:
        """Take what is queued, then no more; flows settle now, or end. The socket stays open."""
        self._receive(self.sock.fileno(), _LAST_BATCHES)
        beside = self._relay.udp_listeners[self.bound]
        beside.remove(self)
        if not beside:
            del self._relay.udp_listeners[self.bound]
        if self._timer is None:
            self._relay.poller.unregister(self.sock.fileno())
        else:
            self._timer.cancel()
        if self._is_on_wildcard and self.sock.family == socket.AF_INET6:
            self._relay.wildcard_ports[self.bound.port] -= 1
        for flow in tuple(self._flows.values()):
            if not flow.is_settled:
                self._ripe.add(flow)
        self._settle_ripe()
        for flow in tuple(self._flows.values()):
            if not flow.is_settled:
                flow.close(CloseReason(Who.US, Phase.DRAIN, "its listener has gone"))

    def on_events(self, mask: int) -> None:
        """Receive what is there, within the budget; let flows send that had to wait."""
        if mask & WRITABLE:  # also when all that waited for it have ended meanwhile
            blocked, self._blocked = self._blocked, {}
            self._relay.poller.modify(self.sock.fileno(), select.EPOLLIN)
            for direction in blocked:
                try:
                    direction.resume()
                except Exception:  # as in Poller: a bug must cost one flow
                    log.exception("relay.bug while resuming")
                    direction.on_bug()
        if mask & READABLE:
            self._receive(self.sock.fileno(), _BATCHES)

    def on_bug(self) -> None:
        """Receiving met a bug; the next event tries again."""

    def resume_when_writable(self, direction: FlowDirection) -> None:
        """Call ``direction.resume`` when the listener's socket takes more."""
        if not self._blocked:
            self._relay.poller.modify(self.sock.fileno(), select.EPOLLIN | select.EPOLLOUT)
        self._blocked[direction] = None

    def local(self, peer: bytes) -> Target:
        """The address of ours that a client uses."""
        return local_of(self.bound, peer)

    def adopt(self, flow: UdpFlow) -> None:
        """A settled flow of a client of our address has come from another worker.

        What may still come through our socket is its; if there is another flow of that client here,
        which was so before, that one's.
        """
        flow.listener = self
        self._flows.setdefault(flow.peer, flow)
        self._settled += 1

    def forget(self, flow: UdpFlow) -> None:
        """A flow of ours has ended, or goes on in another worker."""
        if self._flows.get(flow.peer) is flow:
            del self._flows[flow.peer]
        self._blocked.pop(flow.u2c, None)
        if flow.is_settled:
            self._settled -= 1

    def _receive(self, fd: int, batches: int) -> None:
        """Receive and hand out, then settle what has become ripe by it."""
        self._read(fd, batches)
        if self._ripe:
            self._settle_ripe()

    def _read(self, fd: int, batches: int) -> None:
        """Receive and hand out, up to ``batches`` times or until there is nothing more."""
        batch = self._relay.bench.batch
        for _ in range(batches):
            count = batch.receive_from(fd)
            self._hand_out(count)
            if count < SLOTS:
                return

    def _hand_out(self, count: int) -> None:
        """Give each run of datagrams of one client to its flow."""
        batch = self._relay.bench.batch
        local = self._strays_to or b""
        first = 0
        peer = batch.peer(0) if count else b""
        while first < count:
            last = first + 1
            next_peer = peer
            while last < count:
                next_peer = batch.peer(last)
                if next_peer != peer:
                    break
                last += 1
            try:
                self._take(peer + local, first, last)
            except Exception:  # as in Poller: it must not cost the others of this batch
                log.exception("relay.bug while taking datagrams")
                self._on_bug_of(peer + local)
            first, peer = last, next_peer

    def _on_bug_of(self, peer: bytes) -> None:
        flow = self._flows.get(peer)
        if flow is not None:
            flow.on_bug()

    def _take(self, peer: bytes, first: int, last: int) -> None:
        flow = self._flows.get(peer)
        if flow is None:
            if self._many.get(peer[self._name_bytes :]) is not False and self._is_copy(peer):
                return  # another listener of the group has it, too, and forwards it
            flow = self._open(peer)
            if flow is None:
                self._relay.books.drop_datagrams(self.pool, last - first)
                return
            # The next datagram of a stray goes where the kernel sends it, perhaps to another
            # worker.
            is_ripe = last - first > 1 or self._strays_to is not None
        else:
            flow.touch()
            is_ripe = True
        flow.c2u.take(first, last)
        if is_ripe and self._settles and flow.lasts and not flow.is_settled:
            self._ripe.add(flow)

    def is_for_many(self, peer: bytes) -> bool:
        """Whether a client writes to a group or a broadcast address: others get that, too.

        A socket connected to the client would get nothing of that, or what others get as well.
        """
        asked = peer[self._name_bytes :]
        is_many = self._many.get(asked)
        if is_many is None:
            try:
                is_many = many.is_for_many(asked or self._bound_host())
            except OSError:  # no descriptor to ask the kernel with; as nearly always
                return False
            if len(self._many) >= _MANY_KNOWN:
                self._many.clear()
            self._many[asked] = is_many
        return is_many

    def answer_to(self, peer: bytes) -> bytes:
        """The peer to send answers to, with our address to send from unless that is for many."""
        return peer[: self._name_bytes] if self.is_for_many(peer) else peer

    def _is_copy(self, peer: bytes) -> bool:
        """Whether the listener of another slot takes what this new client has sent."""
        if not self.is_for_many(peer) or many.is_appointed(self.sock):
            return False
        return many.is_copied(peer[self._name_bytes :] or self._bound_host())

    def _bound_host(self) -> bytes:
        host = str(self.bound.sockaddr[0]).partition("%")[0]
        return socket.inet_pton(self.bound.family, host)

    def _open(self, peer: bytes) -> UdpFlow | None:
        """Begin a flow; None if the client may not have one, or cannot be answered."""
        address = peers.address_of(peer)
        if not peers.is_answerable(peer) or self._is_ours(peer, address):
            return None
        decision = Decision.ALLOWED if self.access.is_empty else self.access.decide(address[0])
        if decision is not Decision.ALLOWED:
            self._relay.books.on_refused(self.pool, address, lambda: self.local(peer), decision)
            return None
        if self.pool is not self._own:
            self.pool = self._own = self.pool.at_port(self.bound.port)
        relay = self._relay
        held_as = None
        if relay.admissions and self.pool.row in relay.admissions:
            admission = relay.admissions[self.pool.row]
            try:
                held_as = admission.admit(client_host(address))
            except Busy:
                return None
            if held_as is None:
                relay.books.on_limited(self.pool, address, lambda: self.local(peer), admission)
                return None
        relay.flows.make_room_in(self.pool)
        flow = flow_class(self.pool.rule)(relay, self, peer, address)
        flow.held_as = held_as
        self._flows[peer] = flow
        relay.begin(flow)
        return self._flows.get(peer)  # None if it has ended, as without an upstream

    def _is_ours(self, peer: bytes, address: IpSockAddr) -> bool:
        """Whether a datagram claims to come from where it went: its answer would, too."""
        if address[1] != self.bound.port:
            return False
        return str(self.local(peer).sockaddr[0]).partition("%")[0] == address[0]

    def _settle_ripe(self) -> None:
        """Give ripe flows sockets of their own, as far as they may have them and there are any.

        What a client has sent before it had one is in the queue of the listener, and comes first.
        """
        for _ in range(_SETTLE_ROUNDS):
            ripe, self._ripe = self._ripe, set()
            made = [(flow, own) for flow in ripe if (own := self._own_socket(flow)) is not None]
            if not made:
                return
            self._read(self.sock.fileno(), _LAST_BATCHES)
            for flow, (sock, has_others) in made:
                if has_others:
                    self._strays_to = peers.split(flow.peer)[1]
                    self._read(sock.fileno(), _LAST_BATCHES)
                    self._strays_to = None
                # It may have ended by what was read.
                if self._flows.get(flow.peer) is not flow or not flow.settle(sock):
                    sock.close()
                    self._settled -= 1
                self._ripe.discard(flow)

    def _own_socket(self, flow: UdpFlow) -> tuple[socket.SocketType, bool] | None:
        """As ``udp.flow_socket``; None if the flow must do without."""
        if flow.is_settled or self._flows.get(flow.peer) is not flow or not self._settles:
            return None
        if self.is_for_many(flow.peer):
            return None
        if self._settled >= self._relay.flows.settled_limit(is_flat=self._is_flat):
            return None
        try:
            how = self.pool.client_how(self.sock.family)
            shuns = not self._is_on_wildcard and self._relay.wildcard_ports[self.bound.port] > 0
            own = udp.flow_socket(self.sock, flow.peer, how, shuns_wildcard=shuns)
        except OSError as err:
            self._on_unsettled(err)
            return None
        self._settled += 1
        return own

    def _on_unsettled(self, err: OSError) -> None:
        """Go on without; if rights are missing, trying again is pointless.

        EADDRINUSE: the listener is of another user, or was bound without SO_REUSEPORT.
        """
        if self._settles and err.errno in (errno.EACCES, errno.EPERM, errno.EADDRINUSE):
            self._settles = False
            name = self.pool.rule.name
            self._relay.bench.warn_rarely(
                f"unsettled {name}",
                f"udp.unsettled rule={field(name)}: flows cannot have sockets of their own: "
                f"{os.strerror(err.errno)}; they are served, but start over when the number of "
                "workers changes; hint: a port that every user may bind, "
                "net.ipv4.ip_unprivileged_port_start or above",
            )
