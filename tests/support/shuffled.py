"""Relays in one process among which all sessions are moved at random, all the time."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import traceback
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import uvloop

from forwarder.config.loading import parse
from forwarder.config.model import Dialect, RelayMode, SocketOptions
from forwarder.ipc.consignment import Consignment, ask, confirm, read_taken
from forwarder.limits.gate import STUCK_S
from forwarder.net.sockets import Target, listen_abstract, listen_tcp
from forwarder.relay.access import AccessList
from forwarder.relay.tcp_listener import Listener
from forwarder.upstream.pool import Pool
from support import procfs
from support.by_hand import Shared, no_names
from support.dialogue_routes import RULES, open_route, written_rules
from support.dialogues import Carrier
from support.moving import Side

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from forwarder.config.model import Rule
    from support.dialogue_driver import Route

# How long sessions are left alone, and how long they are nobody's, at most.
REST_S = 0.004
AWAY_S = 0.004
# Of these relays, some copy: data that waits goes from a pipe into memory, and back.
MODES = (RelayMode.AUTO, RelayMode.COPY, RelayMode.AUTO)


class Shuffler:
    """The relays, and the master that moves sessions between them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, rules: Sequence[Rule], seed: int) -> None:
        self.shared = Shared()
        self.sides = [Side(loop, self.shared, mode, slot) for slot, mode in enumerate(MODES)]
        self.moved = self.returned = 0
        self.idle = asyncio.Event()  # once the test is over
        self._loop = loop
        self._random = random.Random(seed)
        self._number = 0
        for side in self.sides:
            pools = [
                Pool(rule, no_names(), row, side.row(row)) for row, rule in enumerate(rules, 1)
            ]
            side.pools.in_force = {pool.rule.name: pool for pool in pools}
            side.relay.restrictions.apply(pools, 0, ())
            side.relay.servers.apply(side.pools.in_force, ())

    def shuffle(self) -> None:
        """Take some sessions from a relay, now and again."""
        self._number += 1
        giver, taker = self._random.sample(self.sides, 2)
        limit = self._random.choice((1, 3, 100))
        ask(giver.channel, self._number, limit, {})
        giver.hear()
        (received,) = giver.answers()
        given = Consignment.read(received)
        if given.sessions:
            away_s = self._random.choice((0.0, 0.0, self._random.random() * AWAY_S))
            self._loop.call_later(away_s, self._deliver, given, giver, taker)
        else:
            self._go_on()

    def _deliver(self, given: Consignment, giver: Side, taker: Side) -> None:
        if self._random.random() < 0.2:
            confirm(giver.channel, given.number, is_back=True)
            self.returned += len(given)
        else:
            given.send(taker.channel)
            taker.hear()
            (received,) = taker.answers()
            assert read_taken(received.message) == (given.number, [], "")
            confirm(giver.channel, given.number)
            self.moved += len(given)
        given.close()
        giver.hear()
        assert not giver.mover.is_out
        self._go_on()

    def _go_on(self) -> None:
        if not any(side.relay.sessions for side in self.sides):
            self.idle.set()
        self._loop.call_later(self._random.random() * REST_S, self.shuffle)

    def check(self) -> None:
        """Nothing is left of sessions that have ended: no place, no pipe, no time."""
        for side in self.sides:
            pipes = side.relay.bench.pipes.statistics()
            assert pipes.made == pipes.idle, pipes
            assert not side.relay.bench.wheel
            for number, row in side.rows.items():
                assert row[0] == 0, (number, list(row))
        assert self.moved > 100
        assert self.returned > 10


async def _serve(sockets: Sequence[socket.socket], rules: Sequence[Rule], seed: int) -> None:
    loop = asyncio.get_running_loop()
    shuffler = Shuffler(loop, rules, seed)
    one = shuffler.sides[0]
    for sock, rule in zip(sockets, rules, strict=True):
        pool = one.pools.in_force[rule.name]
        Listener(loop, one.relay, sock, pool, AccessList(())).start()
    descriptors = len(procfs.descriptors(os.getpid()))
    over = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, over.set)
    loop.set_exception_handler(_fail)
    shuffler.shuffle()
    await over.wait()
    shuffler.idle.clear()
    await shuffler.idle.wait()  # the test has a limit
    await asyncio.sleep(2 * STUCK_S)  # for what is counted later
    shuffler.check()
    for side in shuffler.sides:
        side.relay.bench.pipes.close()
    assert len(procfs.descriptors(os.getpid())) <= descriptors


def _fail(_: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    error = context.get("exception")
    if isinstance(error, BaseException):
        traceback.print_exception(error)
    os._exit(1)


@contextmanager
def shuffled_routes(directory: Path, seed: int) -> Iterator[list[Route]]:
    """Routes for dialogues through such relays; at the end nothing may be left in them."""
    with ExitStack() as stack:
        carriers = [Carrier(f"shuffled-{name}", rule[:2]) for name, rule in RULES.items()]
        routes = [open_route(stack, directory / one.name, one) for one in carriers]
        text = written_rules("splice", routes, 0)
        config = parse(text, "shuffled.toml", Dialect.TOML).config
        sockets = [_listen(route) for route in routes]
        pid = os.fork()
        if not pid:
            status = 1
            try:
                uvloop.run(_serve(sockets, config.rules, seed))
                status = 0
            except BaseException:  # noqa: BLE001 - the process ends here, whatever it was
                traceback.print_exc()
            finally:
                os._exit(status)
        for sock in sockets:
            sock.close()
        is_done = False
        try:
            yield routes
            is_done = True
        finally:
            os.kill(pid, signal.SIGTERM if is_done else signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0


def _listen(route: Route) -> socket.socket:
    if isinstance(route.address, str):
        return listen_abstract(Target(1, route.address), 4096)  # a path will do as well
    return listen_tcp(Target(2, route.address), v6only=False, options=SocketOptions())
