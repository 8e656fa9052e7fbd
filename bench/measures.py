"""What is measured: for each measure its upstream, its load, and the columns of its table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.loads import (
    AB_CONNECTIONS,
    IDLE_SESSIONS,
    RR_BYTES,
    RR_CONNECTIONS,
    UDP_BYTES,
    UDP_RATE,
    bulk_load,
    conn_load,
    echo_upstream,
    idle_load,
    iperf_upstream,
    rr_load,
    udp_load,
)
from bench.peers import nginx_http_command

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bench.loads import Figures, Target


@dataclass(frozen=True, slots=True)
class Figure:
    """A column: key, heading with unit, digits after the point, whether it gets a ratio column."""

    key: str
    heading: str
    digits: int
    has_ratio: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One thing to measure. ``upstream`` returns the command of the server behind the peer."""

    name: str
    title: str
    figures: tuple[Figure, ...]
    upstream: Callable[[Path], list[str]]
    load: Callable[[Target], Figures]
    needs_peer: bool = False
    is_udp: bool = False


BULK_FIGURES = (
    Figure("gbit_s", "Gbit/s", 2, has_ratio=True),
    Figure("cpu_s_per_gb", "CPU-s/GB", 3, has_ratio=True),
)

UDP_FIGURES = (
    Figure("per_s", "datagrams/s delivered", 0, has_ratio=True),
    Figure("lost_percent", "lost %", 2),
    Figure("cpu_us", "CPU us/datagram", 2, has_ratio=True),
)

MEASURES = (
    Measure(
        name="bulk1",
        title="one bulk stream (iperf3 -P 1)",
        figures=BULK_FIGURES,
        upstream=iperf_upstream,
        load=lambda target: bulk_load(target, 1),
    ),
    Measure(
        name="bulk8",
        title="eight bulk streams (iperf3 -P 8)",
        figures=BULK_FIGURES,
        upstream=iperf_upstream,
        load=lambda target: bulk_load(target, 8),
    ),
    Measure(
        name="conn",
        title=f"new connections (ab -c {AB_CONNECTIONS}, one HTTP request each)",
        figures=(
            Figure("per_s", "connections/s", 0, has_ratio=True),
            Figure("p50_ms", "p50 ms", 2),
            Figure("p99_ms", "p99 ms", 2),
            Figure("max_ms", "max ms", 0),
            Figure("cpu_us", "CPU us/connection", 1, has_ratio=True),
        ),
        upstream=nginx_http_command,
        load=conn_load,
    ),
    Measure(
        name="rr",
        title=f"request/response ({RR_CONNECTIONS} connections, {RR_BYTES} bytes)",
        figures=(
            Figure("per_s", "requests/s", 0, has_ratio=True),
            Figure("p50_us", "p50 us", 0),
            Figure("p99_us", "p99 us", 0),
            Figure("max_us", "max us", 0),
            Figure("cpu_us", "CPU us/request", 1, has_ratio=True),
        ),
        upstream=echo_upstream,
        load=rr_load,
    ),
    Measure(
        name="udp300",
        title=f"datagrams at a steady rate (iperf3 -u -b {UDP_RATE} -l {UDP_BYTES})",
        figures=UDP_FIGURES,
        upstream=iperf_upstream,
        load=lambda target: udp_load(target, UDP_RATE),
        is_udp=True,
    ),
    Measure(
        name="udp",
        title=f"datagrams as fast as possible (iperf3 -u -b 0 -l {UDP_BYTES})",
        figures=UDP_FIGURES,
        upstream=iperf_upstream,
        load=lambda target: udp_load(target, "0"),
        is_udp=True,
    ),
    Measure(
        name="idle",
        title=f"memory of an idle session ({IDLE_SESSIONS} open)",
        figures=(
            Figure("kib", "extra PSS KiB/session", 2, has_ratio=True),
            Figure("base_mib", "PSS MiB before", 1),
        ),
        upstream=echo_upstream,
        load=idle_load,
        needs_peer=True,
    ),
)
