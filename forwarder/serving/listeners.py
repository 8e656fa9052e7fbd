"""The master's listening sockets: one per address and slot, open for as long as the rule lives.

The accept queue belongs to the socket, and closing a SO_REUSEPORT listener resets the clients
queued on it. So sockets are made here, before any worker exists, lent to workers, and outlive them.
Accepts nothing.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from forwarder.net import diverting, many, sockets, udp
from forwarder.net.listening import change_options, prepare_inherited
from forwarder.net.sockets import LentSocket
from forwarder.net.unixfile import SocketFile, file_of, listen_at
from forwarder.serving.addresses import address_of, bind_error, option_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from forwarder.config.model import Rule, SocketOptions
    from forwarder.serving.addresses import BindAddress


log = logging.getLogger(__name__)

# For the lock of a directory, held for microseconds; a reload must not wait for it. Arbitrary.
DIRECTORY_LOCK_S: Final = 0.1
# How long the sockets of a removed rule are still served after new handshakes are turned away:
# time for those under way to finish, one retransmission included.
CLOSE_GRACE_S: Final = 1.5


@dataclass(slots=True)
class Slotted:
    """The sockets of one address, by slot; each has an id that never names another socket.

    ``options`` are those that they have, all of them.
    ``is_single``: only the first slots have one, and no other can be made.
    ``joined``: interfaces on which the first one is in the group that is the address.
    """

    address: BindAddress
    options: SocketOptions
    sockets: list[socket.socket]
    ids: list[int]
    is_single: bool = False
    joined: tuple[int, ...] = ()


class ListenerTable:
    """All listening sockets of this instance, by address and slot. Owns them.

    Of a unix socket it owns the address, too: a file that is no longer served is removed, and a
    client that connects to a name is refused. An inherited address stays the giver's until
    :meth:`own`.
    """

    def __init__(self) -> None:
        self.owner: tuple[int, int] | None = None  # user and group of the workers, if not ours
        self._by_address: dict[BindAddress, Slotted] = {}
        self._inherited: dict[BindAddress, list[socket.socket]] = {}
        self._ids = itertools.count(1)
        self._apart: list[tuple[socket.socket, int]] = []  # with where to arrive: ``diverting``
        self._asides = itertools.count(1)
        self._ports: Counter[tuple[bool, int]] = Counter()  # how many addresses have that port
        self._owned: dict[BindAddress, SocketFile | None] = {}  # of unix sockets
        self._borrowed: dict[BindAddress, SocketFile | None] = {}
        self._total = 0  # of sockets that are bound to an address of a rule

    def __contains__(self, address: BindAddress) -> bool:
        return address in self._by_address

    def known(self, address: BindAddress) -> BindAddress:
        """The table's own copy of an address, so that a reload does not keep a second one."""
        slotted = self._by_address.get(address)
        return address if slotted is None else slotted.address

    def inherit(self, given: Iterable[socket.socket]) -> None:
        """Own listening sockets that another process has bound; :meth:`add` uses those that fit."""
        aside = next(self._asides)
        for sock in given:
            address = address_of(sock)
            if diverting.is_diverted(sock):
                address = replace(address, aside=aside)
            self._inherited.setdefault(address, []).append(sock)

    def unclaimed(self) -> list[BindAddress]:
        """Addresses of inherited sockets for which there is no rule."""
        return list(self._inherited)

    def refuse_unclaimed(self) -> None:
        """Turn new clients away from the sockets of :meth:`unclaimed`, which their giver serves.

        It will close them, too. Until :meth:`close_unclaimed` a rule can still get them.
        """
        for address in self.unclaimed():
            inherited = self._inherited[address]
            if address.target.is_unix:
                # The file is ours to remove now.
                for sock in self._reachable(address, self._inherited.pop(address)):
                    sock.close()
            elif _turn_away(inherited, address, is_served=self._ports[address.port] > 0):
                del self._inherited[address]
                self._inherited[replace(address, aside=next(self._asides))] = inherited

    def close_unclaimed(self) -> None:
        """Close our copies of the sockets of :meth:`unclaimed`."""
        for address in self.unclaimed():
            for sock in self._reachable(address, self._inherited.pop(address)):
                sock.close()

    def _close_inherited(self) -> None:
        for sock in itertools.chain(*self._inherited.values()):
            sock.close()
        self._inherited.clear()

    def most_slots(self) -> int:
        """The number of slots of the address that has most."""
        return max((len(slotted.sockets) for slotted in self._by_address.values()), default=0)

    def count(self, wanted: Iterable[BindAddress], slots: int) -> int:
        """How many sockets there will be when ``wanted`` has ``slots`` sockets each."""
        total = self._total
        for address in wanted:
            slotted = self._by_address.get(address)
            total += max(slots - len(slotted.sockets), 0) if slotted else slots
        return total

    def all_sockets(self) -> list[socket.socket]:
        """Every socket, in the order in which an heir would put them into slots again."""
        return [sock for slotted in self._by_address.values() for sock in slotted.sockets]

    def add(self, wanted: Mapping[BindAddress, Rule], slots: int) -> None:
        """Make ``slots`` sockets for each address that has none yet: all of them, or nothing.

        Raises StartupError naming the rule, its place, and what to do.
        """
        made: list[BindAddress] = []
        try:
            for address, rule in wanted.items():
                if address not in self._by_address:
                    made.append(address)
                    self._open(address, rule, slots)
                    self._arrive(address, rule)
        except BaseException:
            self.close(made)
            raise
        finally:
            self._apart.clear()

    def _arrive(self, address: BindAddress, rule: Rule) -> None:
        """Let the sockets of an address have clients, now that all of them listen as one group."""
        try:
            while self._apart:
                diverting.arrive(*self._apart.pop())
        except OSError as err:
            raise bind_error(address, rule, err) from err

    def grow(self, rules: Mapping[BindAddress, Rule], slots: int) -> None:
        """Give every address the options of its rule, and sockets for ``slots`` slots, or nothing.

        Never takes any away. Raises StartupError.
        """
        grown: list[Slotted] = []
        adapted: list[tuple[Slotted, SocketOptions]] = []
        try:
            for address, rule in rules.items():
                slotted = self._by_address[address]
                if slotted.options != rule.options:
                    adapted.append((slotted, rule.options))
                    self._adapt(slotted, rule)
            for address, rule in rules.items():
                slotted = self._by_address[address]
                while len(slotted.sockets) < slots and not slotted.is_single:
                    if self._open_one(address, rule, slotted):
                        grown.append(slotted)
                self._arrive(address, rule)
        except BaseException:
            for slotted in reversed(grown):  # no worker would serve these
                slotted.ids.pop()
                slotted.sockets.pop().close()
                self._total -= 1
            for slotted, options in adapted:
                with suppress(OSError):  # they had these; if that is impossible now, nothing helps
                    change_options(slotted.sockets, options, slotted.options)
            raise
        for slotted, options in adapted:
            slotted.options = options

    def descriptors(self, address: BindAddress, slots: Iterable[int]) -> dict[int, int]:
        """Id to descriptor of the sockets of an address in some slots, as far as it has any there.

        An address that came after the number of slots had shrunk has fewer than the others.
        """
        slotted = self._by_address[address]
        made = len(slotted.sockets)
        return {slotted.ids[i]: slotted.sockets[i].fileno() for i in slots if i < made}

    def ids(self, addresses: Iterable[BindAddress]) -> list[int]:
        """The ids of all sockets of some addresses, as far as there are any."""
        found = (self._by_address.get(address) for address in addresses)
        return [number for slotted in found if slotted for number in slotted.ids]

    def queue(self, addresses: Iterable[BindAddress]) -> dict[str, int]:
        """The sums of the queues of some addresses, by the fields of ``sockets.Queue``."""
        waiting = limit = dropped = 0
        for address in addresses:
            slotted = self._by_address.get(address)
            for sock in slotted.sockets if slotted else ():
                queue = sockets.queue_of(sock)
                waiting += queue.waiting
                limit += queue.limit
                dropped += queue.dropped
        return {"waiting": waiting, "limit": limit, "dropped": dropped}

    def turn_away(self, address: BindAddress, *, is_served: bool) -> BindAddress:
        """Let no new handshake begin on an address; what is queued or under way can be accepted.

        ``is_served``: other sockets have its port and get new clients. Returns the address under
        which these are found from now on: they may have been set aside. A unix socket has no
        handshakes: a client that connects is queued at once, and served until the socket is closed.
        Nor has UDP.
        """
        listeners = self._by_address[address].sockets
        is_aside = _turn_away(listeners, address, is_served=is_served)
        return self.set_aside(address) if is_aside else address

    def is_in_the_way(self, closing: BindAddress) -> bool:
        """Whether an address that was set aside takes clients from those that have its place now.

        Then they are one group, and these clients get no answer before it is closed: ``diverting``.
        """
        is_grouped = replace(closing, aside=0).twin in self._by_address
        return is_grouped and any(map(diverting.is_for_good, self._by_address[closing].sockets))

    def set_aside(self, address: BindAddress) -> BindAddress:
        """Make room for other sockets at an address whose sockets get no new clients.

        Returns the address under which these are found from now on.
        """
        slotted = self._by_address[address]
        slotted.address = replace(address, aside=next(self._asides))
        self._by_address[slotted.address] = self._by_address.pop(address)
        self._owned.pop(address, None)
        return slotted.address

    def why_deaf(self, address: BindAddress, interface: str) -> str:
        """Why no client can reach an address any more; "" if they can, or it is unknown.

        ``interface`` is what it is bound to, by name, or "".
        """
        target = address.target
        file = self._owned.get(address)
        if file is not None and not file.is_there:
            return f"cannot be reached at {target}: its file has gone"
        slotted = self._by_address[address]
        if not slotted.sockets:
            return ""
        if interface:
            what = diverting.why_unreachable(slotted.sockets[0], interface)
        else:
            what = many.why_left(slotted.joined)
        return what and f"cannot be reached at {target}: {what}"

    def accept_handshakes(self, address: BindAddress) -> None:
        """Undo :meth:`turn_away`, of sockets that were not set aside; harmless otherwise."""
        for sock in self._by_address[address].sockets if address.has_handshakes else ():
            sockets.pass_syn(sock)

    def own(self, rules: Mapping[BindAddress, Rule]) -> None:
        """No other process will go on serving our unix sockets: their addresses are ours alone.

        Removes the file of one that no rule has any more.
        """
        for address, file in self._borrowed.items():
            if address in self._by_address:
                self._owned[address] = file
            elif file is not None:
                file.remove()
        self._borrowed.clear()
        self.set_modes(rules)

    def set_modes(self, rules: Mapping[BindAddress, Rule]) -> None:
        """Give the files of unix sockets that are ours the permissions of their rules."""
        for address, file in self._owned.items():
            if file is not None and address in rules:
                file.set_mode(rules[address].unix_mode)

    def disown(self) -> None:
        """Another master serves our unix sockets from now on: leave their addresses alone."""
        self._owned.clear()

    def close(self, addresses: Iterable[BindAddress] | None = None) -> None:
        """Close the sockets of some addresses, or of all, and give the addresses up."""
        if addresses is None:
            self._close_inherited()
        for address in list(self._by_address if addresses is None else addresses):
            slotted = self._by_address.pop(address, None)
            if address in self._owned:
                file = self._owned.pop(address)
                if file is not None:
                    file.remove()
                if slotted and slotted.sockets:
                    # Workers can accept the clients that are queued; a client that comes now is
                    # refused.
                    with suppress(OSError):
                        slotted.sockets[0].shutdown(socket.SHUT_RD)
            if slotted and slotted.sockets:
                self._ports[address.port] -= 1
            for sock in slotted.sockets if slotted else ():
                sock.close()
                self._total -= 1

    def release(self) -> None:
        """Close our copies of all sockets and nothing more: others may serve them."""
        for sock in self.all_sockets():
            sock.close()
        self._by_address.clear()
        self._close_inherited()

    def remove_files(self) -> None:
        """Remove the files of unix sockets that are still ours."""
        for file in self._owned.values():
            if file is not None:
                file.remove()

    def _open(self, address: BindAddress, rule: Rule, slots: int) -> None:
        slotted = self._by_address[address] = Slotted(address, rule.options, [], [])
        try:
            for sock in self._reachable(address, self._inherited.pop(address, [])):
                self._put(address, sock, slotted)
                self._prepare(sock, address, rule.options)
                if address.is_udp:
                    is_taker = sock is slotted.sockets[0]
                    many.share(sock, address.target, rule.options.device, is_taker=is_taker)
        except OSError as err:
            raise bind_error(address, rule, err) from err
        if slotted.sockets:
            # A service manager may have bound it without ReusePort=. Of such a UDP socket only one
            # worker can receive, or the datagrams of a client would go to several.
            slotted.is_single = address.is_udp and not _is_shareable(slotted.sockets[0])
        elif not (address.target.is_unix or self._has_port(address.port)):
            probe = udp.probe_bind if address.is_udp else sockets.probe_bind
            try:
                probe(address.target, v6only=address.v6only)
            except OSError as err:
                raise bind_error(address, rule, err) from err
        while len(slotted.sockets) < slots and not slotted.is_single:
            self._open_one(address, rule, slotted)
        if address.is_udp and slotted.sockets:
            slotted.joined = many.joined_on(slotted.sockets[0], address.target)

    def _has_port(self, port: tuple[bool, int]) -> bool:
        """Whether we listen on a port at any address, where a probe would meet ourselves."""
        return self._ports[port] > 0 or any(other.port == port for other in self._inherited)

    def _prepare(self, sock: socket.socket, address: BindAddress, options: SocketOptions) -> None:
        """Set up a socket that another process has bound. Raises OSError."""
        if address.is_udp and self.owner is not None:
            os.fchown(sock.fileno(), *self.owner)
        prepare_inherited(sock, str(address.target.sockaddr[0]), options)

    def _adapt(self, slotted: Slotted, rule: Rule) -> None:
        try:
            change_options(slotted.sockets, slotted.options, rule.options)
            if slotted.address.is_udp:  # on another device the group is joined again
                first, target = slotted.sockets[0], slotted.address.target
                many.join(first, target, rule.options.device)
                slotted.joined = many.joined_on(first, target)
        except OSError as err:
            raise option_error(slotted.address, rule, err) from err

    def _reachable(self, address: BindAddress, given: list[socket.socket]) -> list[socket.socket]:
        """Those of the inherited sockets that clients can reach; the others are closed.

        A unix socket whose file was removed, perhaps with its directory, is of no use.
        """
        if not address.target.is_unix or any(isinstance(sock, LentSocket) for sock in given):
            return given  # a service manager removes the file of its socket itself
        found = []
        for sock in given:
            file = None if address.target.is_abstract else file_of(sock)
            if file or address.target.is_abstract:
                self._borrowed[address] = file
                found.append(sock)
            else:
                sock.close()
        return found

    def _open_one(self, address: BindAddress, rule: Rule, slotted: Slotted) -> bool:
        """Make a socket for the next slot. False: none can be made, as ``is_single`` says now."""
        first = slotted.sockets[0] if slotted.sockets else None
        try:
            sock = self._bind(address, rule, first)
        except OSError as err:
            # Beside the socket of a service manager only its user may bind (socket(7), the rule
            # about user ids), and at a low port only a process with the capability. Then its queue
            # is shared; datagrams of a flow must not go to several workers.
            if not isinstance(first, LentSocket):
                raise bind_error(address, rule, err) from err
            if address.is_udp:
                slotted.is_single = True
                return False
            try:
                sock = first.dup()
            except OSError as dup_err:
                raise bind_error(address, rule, dup_err) from dup_err
        self._put(address, sock, slotted)
        return True

    def _bind(self, address: BindAddress, rule: Rule, first: socket.socket | None) -> socket.socket:
        if address.is_udp:
            sock = udp.listen_udp(
                address.target, v6only=address.v6only, options=rule.options, owner=self.owner
            )
            try:
                many.share(sock, address.target, rule.options.device, is_taker=first is None)
            except BaseException:
                sock.close()
                raise
            return sock
        if first and not _is_shareable(first):
            # A service manager bound it without ReusePort=, or it is a unix socket, which knows
            # nothing of it: no second one can be bound beside it, so all slots share this one and
            # its queue.
            return first.dup()
        if address.target.is_unix:
            return self._listen_unix(address, rule)
        is_apart = address.twin in self._by_address or address.twin in self._inherited
        apart = self._apart if is_apart else None
        return sockets.listen_tcp(
            address.target, v6only=address.v6only, options=rule.options, apart=apart
        )

    def _listen_unix(self, address: BindAddress, rule: Rule) -> socket.socket:
        path = address.target.sockaddr
        if address.target.is_abstract or not isinstance(path, str):
            sock, file = sockets.listen_abstract(address.target, rule.options.backlog), None
        else:
            sock, file = listen_at(
                Path(path),
                mode=rule.unix_mode,
                backlog=rule.options.backlog,
                lock_timeout_s=DIRECTORY_LOCK_S,
            )
        self._owned[address] = file
        return sock

    def _put(self, address: BindAddress, sock: socket.socket, slotted: Slotted) -> None:
        if not slotted.sockets:
            self._ports[address.port] += 1
        slotted.sockets.append(sock)
        self._total += 1
        slotted.ids.append(next(self._ids))


def _turn_away(
    listeners: Sequence[socket.socket], address: BindAddress, *, is_served: bool
) -> bool:
    """See :meth:`ListenerTable.turn_away`. Returns whether they are lost for good."""
    if not address.has_handshakes:
        return False
    is_lent = any(isinstance(sock, LentSocket) for sock in listeners)
    # Filters do nothing for MPTCP. A process without the right to one does without: then a few
    # clients are reset that come between the last accept and the close of a lent socket.
    if not (is_served or address.is_mptcp) and all(map(sockets.drop_syn, listeners)):
        return False
    return not is_lent and all(map(diverting.divert, listeners))


def _is_shareable(sock: socket.socket) -> bool:
    """Whether other sockets can be bound beside it."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT))
