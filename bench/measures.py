"""What is measured: for each measure its upstream, its load, and the columns of its table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from bench.loads import (
    AB_CONNECTIONS,
    FLOOD_CLIENTS,
    IDLE_SESSIONS,
    LIVE_CLIENTS,
    RR_BYTES,
    RR_CONNECTIONS,
    UDP_BYTES,
    UDP_RATE,
    bulk_load,
    conn_load,
    echo_upstream,
    flows_load,
    idle_load,
    iperf_upstream,
    rr_load,
    udp_load,
)
from bench.peers import nginx_http_command

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bench.loads import Outcome, Target


@dataclass(frozen=True, slots=True)
class Figure:
    """A column: key, heading with unit, digits after the point, whether it gets a ratio column."""

    key: str
    heading: str
    digits: int
    has_ratio: bool = False

    @property
    def is_rate(self) -> bool:
        """Whether more is better."""
        return self.key in ("gbit_s", "per_s")


@dataclass(frozen=True, slots=True)
class Unit:
    """What a load does many of, and the heading and the ns of the CPU time for each of them."""

    name: str
    cpu_heading: str
    cpu_ns: float
    cpu_digits: int

    def figures(self) -> tuple[Figure, ...]:
        """The columns about the peer's processes that every load of such units has."""
        return (
            Figure("cpu", self.cpu_heading, self.cpu_digits, has_ratio=True),
            Figure("switches", f"context switches/{self.name}", 3),
            Figure("calls", f"system calls/{self.name}", 2),
        )


# CPU milliseconds per MB are CPU seconds per GB, as they are usually told.
MEGABYTE = Unit("MB", "CPU-s/GB", 1e6, 3)
REQUEST = Unit("request", "CPU us/request", 1e3, 1)
CONNECTION = Unit("connection", "CPU us/connection", 1e3, 1)
DATAGRAM = Unit("datagram", "CPU us/datagram", 1e3, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One thing to measure. ``upstream`` returns the command of the server behind the peer.

    Without one the load is the upstream itself. So many sessions of the second rule are ``held``
    meanwhile; ``sessions`` are those that the load itself opens, if they are many.
    """

    name: str
    title: str
    figures: tuple[Figure, ...]
    upstream: Callable[[Path], list[str]] | None
    load: Callable[[Target], Outcome]
    needs: tuple[str, ...] = ()
    unit: Unit | None = None
    needs_peer: bool = False
    is_udp: bool = False
    held: int = 0
    sessions: int = 0

    @property
    def columns(self) -> tuple[Figure, ...]:
        """All figures, with those of the peer's processes."""
        return self.figures + (self.unit.figures() if self.unit else ())


BULK_FIGURES = (Figure("gbit_s", "Gbit/s", 2, has_ratio=True),)
RATE_FIGURE = Figure("per_s", "requests/s", 0, has_ratio=True)
RR_FIGURES = (
    RATE_FIGURE,
    Figure("p50_us", "p50 us", 0, has_ratio=True),
    Figure("p99_us", "p99 us", 0, has_ratio=True),
    Figure("max_us", "max us", 0),
)
UDP_FIGURES = (
    Figure("per_s", "datagrams/s delivered", 0, has_ratio=True),
    Figure("lost_percent", "lost %", 2),
)
STREAMS = (1, 2, 4, 8, 16, 32, 64)
RR_SHAPES = tuple((count, size) for size in (64, 1024, 16384, 65536) for count in (1, 64, 512))
HELD = (10, 1000, 10_000)


def bulk(streams: int, way: str = "", held: int = 0) -> Measure:
    """Bulk streams: to the upstream, from it ("r"), or both ways ("b")."""
    options = {"": (), "r": ("-R",), "b": ("--bidir",)}[way]
    title = f"iperf3 {' '.join(['-P', str(streams), *options])}"
    return Measure(
        name=f"bulk{streams}{way}{_held_name(held)}",
        title=f"bulk, {title}{_held_title(held)}",
        figures=BULK_FIGURES,
        upstream=iperf_upstream,
        load=lambda target: bulk_load(target, streams, *options),
        needs=("iperf3", "gcc") if held else ("iperf3",),
        unit=MEGABYTE,
        held=held,
    )


def request_response(connections: int, size: int, held: int = 0) -> Measure:
    """Requests and responses of ``size`` bytes."""
    return Measure(
        name=f"{rr_name(connections, size)}{_held_name(held)}",
        title=f"request/response, {connections} connections, {size} bytes{_held_title(held)}",
        figures=RR_FIGURES,
        upstream=echo_upstream,
        load=partial(rr_load, connections=connections, size=size),
        needs=("gcc",),
        unit=REQUEST,
        held=held,
    )


def rr_name(connections: int, size: int) -> str:
    """The name of such a measure; the usual one's is short."""
    is_usual = (connections, size) == (RR_CONNECTIONS, RR_BYTES)
    return "rr" if is_usual else f"rr{connections}x{size}"


def datagrams(name: str, rate: str, title: str) -> Measure:
    """Datagrams at a rate."""
    return Measure(
        name=name,
        title=f"datagrams {title}, iperf3 -u -b {rate} -l {UDP_BYTES}",
        figures=UDP_FIGURES,
        upstream=iperf_upstream,
        load=partial(udp_load, bit_rate=rate),
        needs=("iperf3",),
        unit=DATAGRAM,
        is_udp=True,
    )


def idle(sessions: int, name: str = "") -> Measure:
    """Sessions that say nothing."""
    return Measure(
        name=name or f"idle{sessions}",
        title=f"{sessions:,} idle sessions",
        figures=(
            Figure("kib", "extra PSS KiB/session", 2, has_ratio=True),
            Figure("base_mib", "PSS MiB before", 1),
            Figure("rest_ms", "CPU ms/s", 2),
            Figure("base_ms", "CPU ms/s before", 2),
        ),
        upstream=echo_upstream,
        load=partial(idle_load, sessions=sessions),
        needs=("gcc",),
        needs_peer=True,
        sessions=sessions,
    )


def flows(name: str, clients: int, title: str, per_s: str) -> Measure:
    """Many UDP clients, each with a socket of its own."""
    return Measure(
        name=name,
        title=f"{clients:,} clients {title}",
        figures=(
            Figure("per_s", per_s, 0, has_ratio=True),
            Figure("cpu", DATAGRAM.cpu_heading, DATAGRAM.cpu_digits, has_ratio=True),
            Figure("lost_percent", "lost %", 2),
            Figure("flows", "upstream-side ports", 0),
            Figure("settled", "sockets of their own", 0),
            Figure("kib", "PSS KiB/flow", 2, has_ratio=True),
            Figure("base_mib", "PSS MiB before", 1),
        ),
        upstream=None,
        load=partial(flows_load, kind=name, clients=clients),
        needs=("gcc",),
        needs_peer=True,
        is_udp=True,
    )


def _held_name(held: int) -> str:
    return f"+{held}" if held else ""


def _held_title(held: int) -> str:
    return f", beside {held:,} idle sessions" if held else ""


CONN = Measure(
    name="conn",
    title=f"new connections, ab -c {AB_CONNECTIONS}, one HTTP request each",
    figures=(
        Figure("per_s", "connections/s", 0, has_ratio=True),
        Figure("p50_ms", "p50 ms", 2),
        Figure("p99_ms", "p99 ms", 2),
        Figure("max_ms", "max ms", 0),
    ),
    upstream=nginx_http_command,
    load=conn_load,
    needs=("ab", "nginx"),
    unit=CONNECTION,
)

# Those that are measured when nothing else is said, in report order.
USUAL = (
    bulk(1),
    bulk(8),
    bulk(8, "r"),
    bulk(8, "b"),
    CONN,
    request_response(RR_CONNECTIONS, RR_BYTES),
    datagrams("udp300", UDP_RATE, "at a steady rate"),
    datagrams("udp", "0", "as fast as possible"),
    idle(IDLE_SESSIONS, "idle"),
)
FLOWS = (
    flows("flood", FLOOD_CLIENTS, "with one datagram each", "new flows/s"),
    flows("live", LIVE_CLIENTS, "in turn ask and are answered", "answers/s"),
)
EVERY = (
    *USUAL,
    *FLOWS,
    *(bulk(count) for count in STREAMS if count not in (1, 8)),
    *(request_response(*shape) for shape in RR_SHAPES if shape != (RR_CONNECTIONS, RR_BYTES)),
    *(bulk(8, held=held) for held in HELD),
    *(request_response(RR_CONNECTIONS, RR_BYTES, held) for held in HELD),
    *(idle(count) for count in HELD[1:]),
)
BY_NAME = {measure.name: measure for measure in EVERY}
