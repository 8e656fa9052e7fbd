"""Room 2: one process, one loop, the listeners assigned to its slot, and their sessions.

Does what its master says over the channel and decides nothing about other workers. Opens no
listening socket itself.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import time
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Final

import setproctitle
import uvloop

from forwarder.balancing.balancers import Balancers
from forwarder.connlog.log import FLUSH_S
from forwarder.ipc.channel import ChannelClosed, Received
from forwarder.ipc.heartbeat import BEAT_S
from forwarder.ipc.messages import Op, read_access, read_assignment, read_logs, send_answer
from forwarder.limits.gate import Holder
from forwarder.relay import listing
from forwarder.relay.access import AccessList, access_of
from forwarder.relay.cuts import Cuts
from forwarder.relay.denials import Denials
from forwarder.relay.moving.mover import Mover
from forwarder.relay.pools import Pools
from forwarder.relay.relay import Relay
from forwarder.relay.session import SessionState
from forwarder.relay.tcp_listener import listener_class
from forwarder.stats.board import ROWS
from forwarder.stats.reasons import Phase
from forwarder.succession.orphans import OrphanDoor, places_of
from forwarder.system import privileges
from forwarder.system.daemonlog import warn_rarely
from forwarder.system.signals import leave_to_the_master
from forwarder.upstream.failing import of_pools
from forwarder.upstream.messages import read_answers
from forwarder.upstream.names import Names
from forwarder.upstream.wanted import all_names

if TYPE_CHECKING:
    from forwarder.config.model import Rule
    from forwarder.ipc.channel import Channel, Message
    from forwarder.ipc.messages import Assignment
    from forwarder.ipc.workerspec import WorkerSpec
    from forwarder.relay.tcp_listener import AnyListener

log = logging.getLogger(__name__)

# Sessions are freed by reference counts (Stream.unlink); the collector is only for what bugs and
# tracebacks leave behind. With its default of 700 it ran in the middle of every burst of sessions.
_GC_THRESHOLD: Final = 50_000
# When the instance stops, a flow silent for this long no longer delays it, nor does a client whose
# upstream has no address by then; a later answer is lost. Arbitrary.
LAST_SILENCE_S: Final = 1.0
# Ids in one acknowledgement, so that it fits into a message; what is missing beyond stays missing
# until the next change.
MAX_MISSING: Final = 1000
# Characters of the text of a bug, for the client that asked for a reload. Arbitrary.
_MAX_REFUSAL: Final = 200
# How long workers without a master go on accepting. A service manager restarts a killed master
# within a second; a person needs longer. Arbitrary.
ORPHAN_GRACE_S: Final = 30.0


class WorkerExit(Enum):
    """Exit status of a worker, as the master reads it."""

    STOPPED = 0
    CRASHED = 70


def main(spec: WorkerSpec) -> WorkerExit:
    """Run a worker in a freshly forked process until it has nothing more to do."""
    leave_to_the_master(but=(signal.SIGTERM, signal.SIGCHLD))
    setproctitle.setproctitle(f"forwarder: worker {spec.slot}")
    privileges.drop(spec.identity, spec.capabilities)
    gc.set_threshold(_GC_THRESHOLD)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(spec))


async def _serve(spec: WorkerSpec) -> WorkerExit:
    worker = Worker(spec, asyncio.get_running_loop())
    try:
        return await worker.run()
    finally:
        worker.close()


class Worker:
    """The state of one worker process.

    ::

        BOOTING --APPLY--> READY --DRAIN--> DRAINING --no session left--> stopped
    """

    def __init__(self, spec: WorkerSpec, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._channel = spec.channel
        self._heartbeats = spec.heartbeats
        self._slot = spec.slot
        self._cell = spec.cell
        holder = Holder(spec.gate, spec.holdings)
        self._relay = Relay(loop, spec.relay, holder, slot=spec.slot)
        self._is_flushing = False
        self._names = Names(self._ask_for_name, loop.time)
        self._pools = Pools(self._names, spec.board.row)
        self._cuts = Cuts(loop, partial(self._relay.abort_sessions, Phase.DRAIN, "drain_timeout"))
        self._balancers = Balancers(
            spec.table, spec.board.row, holder, self._relay.restrictions.settle_soon
        )
        self._relay.deposits.join(spec.channel, spec.deposit, self._pools.terms)
        self._mover = Mover(self._relay, self._pools, self._cuts, spec.board.row)
        self._listeners: dict[int, AnyListener] = {}
        self._sockets: dict[int, socket.socket] = {}
        self._unreceived: list[int] = []  # ids of sockets for which there was no descriptor
        self._in_force: Assignment | None = None
        self._has_said_failing = False
        self._denials = Denials(self._relay)
        self._board = spec.board
        self._relay.servers.alarm = spec.board.row(ROWS)
        self._done: asyncio.Future[WorkerExit] = loop.create_future()
        self._is_draining = False
        self._last_phase = Phase.SHUTDOWN  # why sessions end that are left when we leave
        self._door: OrphanDoor | None = None
        self._places: list[str] = []  # where we listened before we began to drain

    async def run(self) -> WorkerExit:
        """Serve until stopped, drained, or left alone by the master."""
        self._loop.add_reader(self._channel.fileno(), self._on_channel)
        self._loop.add_signal_handler(signal.SIGTERM, self.drain)
        self._beat()
        return await self._done

    def close(self) -> None:
        """Give back everything. Sessions that are left are reset, or go on elsewhere."""
        if self._channel.fileno() >= 0:  # else the one to a new master, which has gone, too
            self._loop.remove_reader(self._channel.fileno())
        self._stop_listening()
        self._mover.close()
        self._relay.end_all(self._last_phase)
        self._relay.count(self._board.row(0))
        self._relay.close()
        self._channel.close()

    # -- messages of the master

    def _on_channel(self) -> None:
        try:
            for received in self._channel.receive():
                self._handle(received)
        except ChannelClosed:
            # The master is gone. A new one may be serving beside us already.
            self._loop.remove_reader(self._channel.fileno())
            self._become_orphan()
        except Exception:  # half an assignment applied is no state to serve in
            log.exception("worker.bug: cannot handle a message of the master; giving up")
            self._last_phase = Phase.ERROR
            self._done.set_result(WorkerExit.CRASHED)

    def _handle(self, received: Received) -> None:
        op = received.message["op"]
        if op == Op.SOCKETS:
            self._take_sockets(received)
        elif op == Op.LOGS:
            self._take_logs(received)
        elif op == Op.NAMES:
            self._take_names(received)
        elif op == Op.APPLY:
            if received.is_truncated:
                self._acknowledge(0)
            else:
                self.apply(read_assignment(received))
        elif op == Op.DRAIN:
            self.drain()
            if received.message["is_last"]:
                self._end_silent_flows()
                self._loop.call_later(LAST_SILENCE_S, self._end_unresolved)
            self._end_after(received.message["limit_s"])
        elif op == Op.STOP:
            self._last_phase = Phase(received.message["phase"])
            self._finish()
        else:
            self._handle_about_sessions(received)

    def _handle_about_sessions(self, received: Received) -> None:
        op = received.message["op"]
        if op in (Op.LIST, Op.KILL):
            self._answer(received.message)
        elif op == Op.ACCESS:
            self._on_access(received)
        elif op in (Op.MOVE, Op.PARCELS, Op.MOVED):
            self._move(received)

    def _move(self, received: Received) -> None:
        """Give sessions up, or take some in.

        What ends sessions is looked at before they go, and again when they have come: the other
        worker may have looked already.
        """
        op = received.message["op"]
        if op == Op.PARCELS and self._done.done():
            received.close()  # we leave, and would end them; so another worker gets them
            return
        if op == Op.MOVE:
            self._relay.look_at_servers(self._balancers, self._balancers.revision)
        self._mover.on_message(received, self._channel)
        if op == Op.PARCELS:
            self._denials.look()

    def _take_sockets(self, received: Received) -> None:
        """Own listening sockets, for assignments to come."""
        ids = received.message["ids"]
        assert isinstance(ids, list)  # noqa: S101 - our own master wrote it
        if received.is_truncated:
            # Keeping the part that came would leave none for sessions and further messages.
            self._unreceived += ids
            received.close()
            return
        for socket_id, fd in zip(ids, received.fds, strict=True):
            if socket_id in self._sockets:  # kept when an assignment was refused
                os.close(fd)
            else:
                self._sockets[socket_id] = socket.socket(fileno=fd)

    def _take_names(self, received: Received) -> None:
        """Take in answers about names; flows follow those that have moved."""
        before = self._names.revision
        self._names.update(read_answers(received.message))
        if self._names.revision != before:
            self._relay.follow_names()

    def _take_logs(self, received: Received) -> None:
        """Write the connection log there from now on."""
        if received.is_truncated:
            what = "log: no descriptors left for the files of the connection log"
            warn_rarely(log, what, what, logging.ERROR)
            received.close()
            self._say(Op.LOGS)  # again, when there may be some
            return
        self._relay.books.connlog.set_places(read_logs(received))
        if not self._is_flushing:
            self._flush_logs()

    def _flush_logs(self) -> None:
        self._is_flushing = self._relay.books.connlog.is_on
        if self._is_flushing:
            self._loop.call_later(FLUSH_S, self._flush_logs)
        self._relay.books.connlog.flush()

    def _answer(self, question: Message) -> None:
        """List or end some sessions. A bug in that costs the answer, not the worker."""
        answer: object = None
        try:
            answer = listing.answer(question, self._relay, self._loop.time())
        except Exception:
            log.exception("worker.bug: cannot %s sessions", question["op"])
        with suppress(ChannelClosed):
            send_answer(self._channel, question["number"], answer)

    def _say(self, op: Op, **fields: object) -> None:
        try:
            self._channel.send({"op": op, **fields})
        except ChannelClosed:
            log.debug("worker: the master did not hear %s", op)

    def _ask_for_name(self, host: str) -> None:
        """Ask the master's helper to look a name up soon; not while the master is busy."""
        if not self._channel.has_outbox:
            self._say(Op.REFRESH, hosts=[host])

    def _become_orphan(self) -> None:
        """The master was killed: serve on until a new one takes the sockets over, or for a while.

        Closing them at once would reset queued clients and refuse all others until then. One that
        drains has none, but sessions that an heir of its master may ask for.
        """
        self._mover.on_hang_up(self._channel)
        if not self._is_draining:
            what = f"serving on for {ORPHAN_GRACE_S:.0f} s or until a new one takes over"
            log.warning("worker.orphaned slot=%d: the master has ended; %s", self._slot, what)
            self._loop.call_later(ORPHAN_GRACE_S, self.drain)
        else:
            self._end_after(self._cuts.limit_s)  # its master cannot see to that any more
        places = self._places or places_of(self._sockets.values())
        try:
            self._door = OrphanDoor(self._loop, places, self._sockets, self._on_taken)
        except OSError as err:
            log.error("worker.orphaned: a new master will not find us: %s", err)

    def _on_taken(self, channel: Channel, said: list[Received]) -> None:
        """A new master has our sockets; it takes our sessions, too, over this channel."""
        self._channel = channel
        self._loop.add_reader(channel.fileno(), self._on_new_master)
        self.drain()  # first, so that it hears of all sessions that there will be
        self._heed(said)

    def _on_new_master(self) -> None:
        try:
            self._heed(self._channel.receive())
        except (ChannelClosed, KeyError, TypeError, ValueError, RecursionError):
            self._loop.remove_reader(self._channel.fileno())
            self._channel.close()
            self._become_orphan()

    def _heed(self, said: list[Received]) -> None:
        """Do what a master may ask that is not ours: nothing that could make us run its code."""
        try:
            for received in said:
                if received.message["op"] in (Op.MOVE, Op.MOVED):
                    self._move(received)
        finally:
            for received in said:
                received.close()

    def _beat(self) -> None:
        # First, as whatever fails below (MemoryError) must not be the last beat.
        self._loop.call_later(BEAT_S, self._beat)
        self._heartbeats.beat(self._cell, time.monotonic())
        self._relay.count(self._board.row(0))
        with suppress(ChannelClosed):
            self._channel.flush()
        self._look_at_upstreams()

    def _look_at_upstreams(self) -> None:
        """Notice interfaces that come and go, and report which addresses fail, if some do."""
        relay = self._relay
        relay.look_at_servers(self._balancers, self._balancers.revision)
        relay.poller.read_clock()
        relay.outages.look()
        if self._pools.needing:
            relay.outages.look_at_interfaces(self._pools.needing)
        outages = relay.outages.pools
        failing = [*outages]
        if not failing and not self._has_said_failing:
            return
        for pool in failing:
            if not pool.failures.known or self._pools.in_force.get(pool.rule.name) is not pool:
                del outages[pool]
        if not self._channel.has_outbox:
            self._say(Op.FAILING, failing=of_pools(outages, self._loop.time()))
            self._has_said_failing = bool(outages)

    # -- acting

    def apply(self, assignment: Assignment) -> None:
        """Accept on the assigned sockets for their rules, and on no others, from now on.

        An assignment that meets a bug is refused, and the one in force goes on.
        """
        if self._is_draining:
            self._stop_listening()  # what came with this assignment, too
            return
        try:
            self._put_in_force(assignment)
        except Exception as err:
            log.exception("worker.bug: cannot serve the assignment; going on as before")
            self._acknowledge(assignment.serial, f"{type(err).__name__}: {err}"[:_MAX_REFUSAL])
            if self._in_force is None:
                raise
            self._put_in_force(self._in_force)  # its sockets are all still here
            for socket_id in self._listeners.keys() - self._in_force.routes.keys():
                self._listeners.pop(socket_id).stop()
            return
        self._in_force = assignment
        for socket_id in self._sockets.keys() - assignment.routes.keys():
            self._release(socket_id)
        self._acknowledge(assignment.serial)

    def _put_in_force(self, assignment: Assignment) -> None:
        rules = assignment.config.rules
        accesses = [access_of(assignment.config, rule) for rule in rules]
        # From here on something may be half done if this fails.
        part = self._slot % assignment.workers / assignment.workers
        balancers = self._balancers.apply(rules, assignment.seats, part)
        gone = self._pools.apply(rules, assignment.rows, balancers, self._relay.sessions)
        self._relay.servers.apply(self._pools.in_force, self._relay.sessions)
        self._relay.bench.pipes.budget_pages = assignment.pipe_budget_pages
        self._relay.flows.workers = assignment.workers
        self._names.keep(all_names(rules).keys())  # as the master, which sends only news
        self._relay.apply(assignment.config.settings, self._pools.in_force.values())
        for socket_id, index in assignment.routes.items():
            if socket_id in self._sockets:  # else descriptors ran out: see _acknowledge
                self._route(socket_id, rules[index], accesses[index])
        self._cuts.limit_s = assignment.config.settings.drain_timeout_s
        self._cuts.begin([one for one in self._relay.sessions if one.pool.origin in gone])
        self._denials.apply(assignment.config, accesses)

    def _route(self, socket_id: int, rule: Rule, access: AccessList) -> None:
        """Serve the clients of a socket by a rule."""
        pool = self._pools.in_force[rule.name]
        listener = self._listeners.get(socket_id)
        kind = listener_class(rule)
        if listener is not None and type(listener) is not kind:
            listener.stop()
            listener = None
        if listener is not None:
            if listener.pool.origin is not pool:
                listener.pool = pool
            listener.access = access
            return
        listener = kind(self._loop, self._relay, self._sockets[socket_id], pool, access)
        listener.start()
        self._listeners[socket_id] = listener

    def _on_access(self, received: Received) -> None:
        """A successor of our master has read other access rules than we have."""
        if not received.fds:
            log.error("worker: no descriptor left for the new access rules")
            return
        self._denials.heed(*read_access(received.fds.pop()))

    def _acknowledge(self, serial: int, refusal: str = "") -> None:
        """Report what is in force, and which sockets did not arrive; the master sends those again.

        ``refusal``: why the assignment is not in force, and the one before still is.
        """
        missing, self._unreceived = self._unreceived[:MAX_MISSING], []
        if missing or not serial:
            what = (
                "worker: no descriptors left to take over listening sockets; raise the limit of "
                "open files (LimitNOFILE=, ulimit -n)"
            )
            warn_rarely(log, what, what, logging.ERROR)
            self._relay.bench.pipes.close()  # the idle ones; they make room for the next try
        self._say(Op.APPLIED, serial=serial, missing=missing, refusal=refusal)

    def _end_after(self, limit_s: object) -> None:
        """Reset all sessions that are left after ``limit_s``; 0 or None is no limit."""
        if isinstance(limit_s, int | float) and limit_s:
            abort = self._relay.abort_sessions
            self._loop.call_later(limit_s, abort, Phase.DRAIN, "drain_timeout")

    def drain(self) -> None:
        """Accept no more, and leave when the last session has ended."""
        if self._is_draining:
            return
        self._is_draining = True
        self._places = places_of(self._sockets.values())
        self._say(Op.LEAVING)
        self._stop_listening()
        self._leave_when_idle()

    def _end_silent_flows(self) -> None:
        """UDP has no end: at a stop, a flow silent for LAST_SILENCE_S counts as over."""
        self._loop.call_later(LAST_SILENCE_S / 2, self._end_silent_flows)
        self._relay.end_silent_flows(LAST_SILENCE_S)

    def _end_unresolved(self) -> None:
        """A stop does not wait for the answer to a name, which may take long and help no client."""
        waiting = [one for one in self._relay.sessions if one.state is SessionState.RESOLVING]
        self._relay.abort_sessions(Phase.DRAIN, "no address of an upstream is known", waiting)

    def _leave_when_idle(self) -> None:
        is_busy = self._relay.restrictions.has_undecided or self._mover.is_out
        if self._relay.sessions or is_busy:
            self._loop.call_later(0.05, self._leave_when_idle)
        else:
            self._finish()

    def _release(self, socket_id: int) -> None:
        listener = self._listeners.pop(socket_id, None)
        if listener is not None:
            listener.stop()
        self._sockets.pop(socket_id).close()

    def _stop_listening(self) -> None:
        for socket_id in tuple(self._sockets):
            self._release(socket_id)

    def _finish(self) -> None:
        if not self._done.done():
            self._done.set_result(WorkerExit.STOPPED)


def run_and_exit(spec: WorkerSpec) -> None:
    """Run a worker as the whole rest of this forked process. Does not return."""
    status = WorkerExit.CRASHED
    try:
        status = main(spec)
    except BaseException:  # the process ends here, whatever it was
        log.exception("worker.crashed slot=%d", spec.slot)
    finally:
        logging.shutdown()
        os._exit(status.value)
