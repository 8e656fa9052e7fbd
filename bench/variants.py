"""Measure the forwarder against itself with one decision made otherwise: is it still the right one?

    python -m bench.variants --only conn,rr --variants gc-off,pinned

A variant is a patch of the running program: production code has no switch for any of them. Each is
started as ``python -m bench.variants --run NAME``, which patches and then is the forwarder, so the
interpreter must have it installed. See VARIANTS for what there is.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import select
import signal
import socket
import struct
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final

from bench.command_line import exit_on_signal, positive
from bench.machine import machine
from bench.measures import BY_NAME
from bench.peers import FD_LIMIT, WORKERS, forwarder_conf, forwarder_peer
from bench.procs import BenchError, set_fd_limit
from bench.report import Results, Table, spread
from bench.rounds import Part, run_rounds
from forwarder import worker
from forwarder.cli.main import main as forwarder
from forwarder.net import pipes, sockets
from forwarder.relay import poller, tcp_listener, workbench
from forwarder.relay.tcp import direction, splice

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.peers import Peer
    from forwarder.ipc.workerspec import WorkerSpec
    from forwarder.net.options import How
    from forwarder.net.sockets import SockAddr, Target
    from forwarder.worker import WorkerExit

AS_IT_IS: Final = "as it is"
_SO_BUSY_POLL: Final = 46
_SO_ATTACH_REUSEPORT_CBPF: Final = 51
_RCVLOWAT_BYTES: Final = 128 * 1024
# How often, and how long, a worker stays in the nested set before it goes back to the loop.
_STAYS, _STAY_S = 64, 0.001


@dataclass(frozen=True, slots=True)
class Variant:
    """A decision made otherwise. ``patch`` is called before the forwarder starts."""

    what: str
    patch: Callable[[], None]
    top: str = ""  # of the configuration
    rule: str = ""
    arguments: tuple[str, ...] = ()


def _nothing() -> None:
    """For a variant that is a setting or an argument."""


def _small(size: int) -> Callable[[], None]:
    """What a quiet direction reads at once, which is also when bulk begins."""

    def patch() -> None:
        for module in (direction, workbench, splice):
            module.SMALL_BYTES = size  # type: ignore[attr-defined]

    return patch


def _pipe(size: int) -> Callable[[], None]:
    def patch() -> None:
        pipes.PIPE_BYTES = size  # type: ignore[misc]

    return patch


def _budget(size: int) -> Callable[[], None]:
    def patch() -> None:
        direction.Direction.budget_bytes = size

    return patch


def _accepts(count: int) -> Callable[[], None]:
    def patch() -> None:
        tcp_listener.ACCEPT_BATCH = count  # type: ignore[misc]

    return patch


def _new_buffers() -> None:
    """A buffer for each read, as most programs do it."""
    workbench.Workbench.small_view = property(  # type: ignore[assignment, misc]
        lambda _: memoryview(bytearray(workbench.SMALL_BYTES)), lambda *_: None
    )


def _in_each_worker(prepare: Callable[[WorkerSpec], None]) -> None:
    original = worker.main

    def main(spec: WorkerSpec) -> WorkerExit:
        prepare(spec)
        return original(spec)

    worker.main = main


def _gc_off() -> None:
    _in_each_worker(lambda _: setattr(gc, "set_threshold", lambda *_: gc.disable()))


def _gc_default() -> None:
    _in_each_worker(lambda _: setattr(gc, "set_threshold", lambda *_: None))


def _no_freeze() -> None:
    gc.freeze = lambda: None


def _pin(spec: WorkerSpec) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[spec.slot % len(cpus)]})


def _pinned() -> None:
    _in_each_worker(_pin)


def _steered() -> None:
    """Workers pinned, and connections given to the worker of the CPU that received the SYN.

    Classic BPF: A = the CPU (SKF_AD_OFF + SKF_AD_CPU); return A modulo the workers, an index into
    the group in the order of listen(2). socket(7), SO_ATTACH_REUSEPORT_CBPF.
    """
    _pinned()
    original = sockets.listen_tcp
    program = b"".join(
        struct.pack("HBBI", *op)
        for op in ((0x20, 0, 0, 0xFFFFF000 + 36), (0x94, 0, 0, WORKERS), (0x16, 0, 0, 0))
    )

    def listen_tcp(*args: object, **kwargs: object) -> socket.socket:
        sock = original(*args, **kwargs)  # type: ignore[arg-type]
        buffer = _buffer(program)
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, buffer)
        return sock

    sockets.listen_tcp = listen_tcp


def _buffer(program: bytes) -> bytes:
    """struct sock_fprog; the instructions stay in memory as long as the process."""
    kept = ctypes.create_string_buffer(program, len(program))
    _KEPT.append(kept)
    return struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(kept))


_KEPT: list[object] = []


def _stays() -> None:
    """After a batch wait in the nested set for the next one, not in the loop."""

    def turn(self: poller.Poller) -> None:
        if self._epoll.closed:
            return
        self._in_turn, wait_s = True, 0.0
        for _ in range(_STAYS):
            self.now = self._loop.time()
            if self._again:
                self._do_again()
            events = self._epoll.poll(wait_s, 256)
            self._dispatch(events)
            if self._deferred:
                self._do_deferred()
            if self._again or not events:
                break
            wait_s = _STAY_S
        self._in_turn = False
        if self._again:
            self._loop.call_soon(self.turn)

    poller.Poller.turn = turn  # type: ignore[method-assign]


def _yields() -> None:
    """Let others run before looking for events, for larger batches."""
    original = poller.Poller.turn

    def turn(self: poller.Poller) -> None:
        os.sched_yield()
        original(self)

    poller.Poller.turn = turn  # type: ignore[method-assign]


def _level_triggered() -> None:
    """One event for each wake-up and socket that has something, and only for reading."""
    original = poller.Poller.register

    def register(self: poller.Poller, fd: int, handler: poller.Handler, events: int = 0) -> None:
        original(self, fd, handler, events or poller.EDGE_ALL & ~select.EPOLLPRI)

    poller.Poller.register = register  # type: ignore[method-assign]


def _on_upstreams(level: int, name: int, value: int) -> Callable[[], None]:
    """One more option on every socket of a session."""

    def patch() -> None:
        upstream, accepted = sockets.upstream_socket, sockets.accepted_socket

        def upstream_socket(target: Target, source: SockAddr | None, how: How) -> socket.SocketType:
            sock = upstream(target, source, how)
            sock.setsockopt(level, name, value)
            return sock

        def accepted_socket(fd: int, family: int) -> socket.SocketType:
            sock = accepted(fd, family)
            sock.setsockopt(level, name, value)
            return sock

        sockets.upstream_socket, sockets.accepted_socket = upstream_socket, accepted_socket

    return patch


def _low_water() -> None:
    """Wake up for bulk only when there is much of it."""
    original = splice.SpliceDirection.pump_bulk

    def pump_bulk(self: splice.SpliceDirection, mask: int, room: int) -> None:
        original(self, mask, room)
        if not self.is_done:
            self.src.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVLOWAT, _RCVLOWAT_BYTES if self.is_bulk else 1
            )

    splice.SpliceDirection.pump_bulk = pump_bulk  # type: ignore[method-assign]


VARIANTS: Final = {
    "new-buffers": Variant("a new buffer for each read", _new_buffers),
    "splice-from-4k": Variant("bulk from a read of 4 KiB on", _small(4 * 1024)),
    "splice-from-64k": Variant("bulk from a read of 64 KiB on", _small(64 * 1024)),
    "copy": Variant("no splice", _nothing, arguments=("--relay", "copy")),
    "pipe-64k": Variant("pipes of 64 KiB, not 256", _pipe(64 * 1024)),
    "pipe-1m": Variant("pipes of 1 MiB", _pipe(1024 * 1024)),
    "budget-256k": Variant("256 KiB per wake-up and direction, not 1 MiB", _budget(256 * 1024)),
    "budget-4m": Variant("4 MiB per wake-up and direction", _budget(4 * 1024 * 1024)),
    "accept-1": Variant("one accept per event, not 8", _accepts(1)),
    "accept-64": Variant("64 accepts per event", _accepts(64)),
    "stays": Variant("waits for the next batch in the nested epoll set", _stays),
    "yields": Variant("sched_yield before it looks for events", _yields),
    "gc-off": Variant("no garbage collector", _gc_off),
    "gc-default": Variant("the collector's usual thresholds", _gc_default),
    "no-freeze": Variant("no gc.freeze() before the fork", _no_freeze),
    "pinned": Variant("each worker pinned to a CPU", _pinned),
    "steered": Variant("pinned, connections steered by the CPU of the SYN", _steered),
    "nagle": Variant("without TCP_NODELAY", _nothing, top="nodelay = false\n"),
    "quick-ack": Variant(
        "TCP_QUICKACK when a socket is made",
        _on_upstreams(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1),
    ),
    "busy-poll": Variant(
        "SO_BUSY_POLL of 50 us", _on_upstreams(socket.SOL_SOCKET, _SO_BUSY_POLL, 50)
    ),
    "low-water": Variant("SO_RCVLOWAT of 128 KiB during bulk", _low_water),
    "buffers-4m": Variant(
        "socket buffers of 4 MiB, which then do not grow by themselves",
        _nothing,
        rule="rcvbuf = 4194304\nsndbuf = 4194304\n",
    ),
}
MEASURED: Final = ("bulk1", "bulk8", "conn", "rr")


def contenders(names: Sequence[str]) -> tuple[Peer, ...]:
    """The forwarder as it is, and in each variant."""
    start = [sys.executable, "-m", "bench.variants", "--run"]
    plain = [*start, AS_IT_IS, "--workers", str(WORKERS)]
    peers = [forwarder_peer(AS_IT_IS, plain, (), forwarder_conf())]
    for name in names:
        variant = VARIANTS[name]
        command = [*start, name, "--workers", str(WORKERS), *variant.arguments]
        peers.append(forwarder_peer(name, command, (), variant.top + forwarder_conf(variant.rule)))
    return tuple(peers)


def run(name: str, arguments: list[str]) -> None:
    """Be the forwarder in a variant. Does not return."""
    if name != AS_IT_IS:
        VARIANTS[name].patch()
    sys.argv = ["forwarder", *arguments]
    forwarder()


def table(part: Part, results: Results) -> Table:
    """A row for each variant: the ratios to the program as it is, round by round."""
    columns = [
        (measure, figure)
        for measure in part.measures
        for figure in measure.columns
        if figure.has_ratio and results.values(measure.name, AS_IT_IS, figure.key)
    ]
    rows = [["", "", *(f"{measure.name}: {figure.heading}" for measure, figure in columns)]]
    for peer in part.peers:
        cells = []
        for measure, figure in columns:
            ratios = results.ratios(measure.name, AS_IT_IS, figure.key, peer.name)
            if peer.name == AS_IT_IS:
                found = results.values(measure.name, AS_IT_IS, figure.key)
                cells.append(f"{median(found.values()):,.{figure.digits}f}")
            else:
                cells.append(spread(ratios, 2))
        what = VARIANTS[peer.name].what if peer.name in VARIANTS else "medians; ratios below"
        rows.append([peer.name, what, *cells])
    return Table("Decisions made otherwise, against the program as it is", rows)


def main(argv: Sequence[str]) -> int:
    """Measure and report."""
    if argv[:1] == ["--run"]:
        run(argv[1], list(argv[2:]))
    parser = argparse.ArgumentParser(prog="python -m bench.variants", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=3, metavar="N")
    parser.add_argument("--seconds", type=positive, default=2, metavar="S", help="per load")
    parser.add_argument("--only", default=",".join(MEASURED), metavar="MEASURE,...")
    parser.add_argument("--variants", default=",".join(VARIANTS), metavar="VARIANT,...")
    args = parser.parse_args(argv)
    names, only = args.variants.split(","), args.only.split(",")
    if unknown := [*({*names} - {*VARIANTS}), *({*only} - {*BY_NAME})]:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, exit_on_signal)
    measures = tuple(BY_NAME[name] for name in only)
    part = Part("Variants", measures, contenders(names), args.rounds, args.seconds)
    results = Results()
    failures: list[str] = []
    try:
        set_fd_limit(FD_LIMIT)
        with tempfile.TemporaryDirectory(prefix="bench-") as directory:
            part.check_programs()
            part.compile(Path(directory))
            run_rounds(part, Path(directory), results, failures)
    except BenchError as err:
        print(f"bench: {err}", file=sys.stderr)
        return 1
    print(f"{args.rounds} rounds, {args.seconds} s each: median (min-max). {machine()}\n")
    print(table(part, results).as_markdown())
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
