"""The loads, and the servers behind the peers: what is done to one, and what is found.

A load runs against a peer that is up and at rest; it starts and ends no server.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.peers import HOST, UPSTREAM_PORT
from bench.procs import PROC, BenchError, cpu_ns, pss_kib, run_client

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Figures = dict[str, float]

AB_CONNECTIONS = 64
AB_REQUESTS_PER_S = 6000  # -n took 0.4 to 0.9 times the seconds asked for where tried
RR_CONNECTIONS = 64
RR_BYTES = 64
IDLE_SESSIONS = 4000
FLOOD_CLIENTS = 10_000
LIVE_CLIENTS = 5_000
UDP_BYTES = 1200
UDP_RATE = "300M"

GRACE_S = 60.0  # what a load may take beyond the time it was given, before it is called stuck

# Memory is stable when it moved less than 1 KiB per 100 sessions in half a second.
PSS_WINDOW_S = 0.5
PSS_STABLE_SESSIONS = 100
PSS_WITHIN_S = 20.0

REST_S = 2.0  # of looking at a peer that has nothing to do


@dataclass(frozen=True, slots=True)
class Target:
    """Where a load goes. ``peer_pid`` is None for direct: there is no process to look at."""

    port: int
    peer_pid: int | None
    seconds: int
    directory: Path


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a load has found, and how many units of work it did; 0 if that says nothing."""

    figures: Figures
    units: float = 0.0


def iperf_upstream(_directory: Path) -> list[str]:
    """Return the command of the bulk receiver."""
    return ["iperf3", "-s", "-B", HOST, "-p", str(UPSTREAM_PORT)]


def echo_upstream(directory: Path) -> list[str]:
    """Return the command of the echo server, silent until spoken to."""
    return [str(directory / "echo"), HOST, str(UPSTREAM_PORT)]


def bulk_load(target: Target, streams: int, *options: str) -> Outcome:
    """Send as fast as possible over ``streams`` connections; of both directions the sum."""
    command = ["iperf3", "-J", "-c", HOST, "-p", str(target.port), *options]
    end = _iperf([*command, "-t", str(target.seconds), "-P", str(streams)], target)
    parts = [end[key] for key in ("sum_received", "sum_received_bidir_reverse") if key in end]
    gbit_s = sum(float(part["bits_per_second"]) for part in parts) / 1e9
    return Outcome({"gbit_s": gbit_s}, sum(float(part["bytes"]) for part in parts) / 1e6)


def udp_load(target: Target, bit_rate: str) -> Outcome:
    """Send datagrams, client to upstream, at a rate or as fast as possible ("0")."""
    command = ["iperf3", "-J", "-u", "-c", HOST, "-p", str(target.port)]
    command += ["-t", str(target.seconds), "-l", str(UDP_BYTES), "-b", bit_rate]
    total = _iperf(command, target)["sum"]
    delivered = total["packets"] - total["lost_packets"]
    figures = {
        "per_s": delivered / float(total["seconds"]),
        "lost_percent": float(total["lost_percent"]),
    }
    return Outcome(figures, max(delivered, 1))


def _iperf(command: list[str], target: Target) -> dict[str, Figures]:
    """Run a client; what it says at its end, sums by name."""
    result = json.loads(run_client(command, target.seconds + GRACE_S))
    if "error" in result:  # with -J iperf3 exits 0 even so
        raise BenchError(f"iperf3: {result['error']}")
    end: dict[str, Figures] = result["end"]
    return end


def conn_load(target: Target) -> Outcome:
    """Open, ask once, close: a new connection for every request."""
    count = AB_REQUESTS_PER_S * target.seconds
    csv = target.directory / "ab.csv"
    command = ["ab", "-q", "-n", str(count), "-c", str(AB_CONNECTIONS), "-e", str(csv)]
    text = run_client([*command, f"http://{HOST}:{target.port}/"], target.seconds * 10 + GRACE_S)
    if _ab(text, r"Complete requests:\s+(\d+)") != count or _ab(text, r"Failed requests:\s+(\d+)"):
        raise BenchError(f"ab: not every request was answered\n{text}")
    if "Non-2xx responses" in text:
        raise BenchError(f"ab: an answer was not 200\n{text}")
    rows = (row.split(",") for row in csv.read_text().splitlines()[1:])
    percentile_ms = {int(row[0]): float(row[1]) for row in rows}
    figures = {
        "per_s": _ab(text, r"Requests per second:\s+([\d.]+)"),
        "p50_ms": percentile_ms[50],
        "p99_ms": percentile_ms[99],
        "max_ms": _ab(text, r"100%\s+(\d+)"),
    }
    return Outcome(figures, count)


def _ab(text: str, pattern: str) -> float:
    found = re.search(pattern, text)
    if found is None:
        raise BenchError(f"ab: no {pattern!r} in its report\n{text}")
    return float(found[1])


def rr_load(target: Target, connections: int, size: int) -> Outcome:
    """Ask and wait for the answer, over and over, on connections that stay open."""
    command = [str(target.directory / "rr"), HOST, str(target.port)]
    command += [str(connections), str(size), str(target.seconds)]
    answer = json.loads(run_client(command, target.seconds + GRACE_S))
    figures = {
        "per_s": float(answer["requests_per_s"]),
        "p50_us": float(answer["p50_us"]),
        "p99_us": float(answer["p99_us"]),
        "max_us": float(answer["max_us"]),
    }
    return Outcome(figures, float(answer["requests"]))


@contextmanager
def holding(count: int, port: int) -> Iterator[None]:
    """Hold sessions open that say nothing once they are up from end to end."""
    with ExitStack() as sessions:
        for _ in range(count):
            session = socket.create_connection((HOST, port), timeout=GRACE_S)
            sessions.enter_context(session)
            session.sendall(b"x")  # answered: the session is up from end to end
            if session.recv(1) != b"x":
                raise BenchError("a session was closed instead of answered")
        yield


def idle_load(target: Target, sessions: int) -> Outcome:
    """Weigh the peer before and with sessions that say nothing."""
    pid = _peer_of(target)
    before_kib = wait_pss_stable(pid)
    before_ms = _rest_ms(pid)
    with holding(sessions, target.port):
        with_kib = wait_pss_stable(pid, sessions)
        with_ms = _rest_ms(pid)
    return Outcome(
        {
            "kib": (with_kib - before_kib) / sessions,
            "base_mib": before_kib / 1024,
            "rest_ms": with_ms,
            "base_ms": before_ms,
        }
    )


def flows_load(target: Target, kind: str, clients: int) -> Outcome:
    """Be many UDP clients and their upstream; weigh the peer while all flows are there."""
    pid = _peer_of(target)
    command = [str(target.directory / "udp_flows"), HOST, str(target.port), str(UPSTREAM_PORT)]
    command += [kind, str(clients), str(target.seconds)]
    before_kib, before_ns = wait_pss_stable(pid), cpu_ns(pid)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as load:
        try:
            found = _read_line(load)
            used_us = (cpu_ns(pid) - before_ns) / 1e3
            settled = _flow_sockets(target.port)
            with_kib = wait_pss_stable(pid)
        finally:
            load.kill()
    served = found["arrived"] if kind == "flood" else found["answered"]
    return Outcome(
        {
            "per_s": served / found["seconds"],
            "cpu": used_us / max(found["arrived"] + found["answered"], 1),
            "lost_percent": 100 * (1 - served / found["sent"]),
            "flows": found["flows"],
            "settled": settled,
            "kib": (with_kib - before_kib) / max(found["flows"], 1),
            "base_mib": before_kib / 1024,
        }
    )


def _read_line(load: subprocess.Popen[str]) -> Figures:
    line = load.stdout.readline() if load.stdout is not None else ""
    if not line:
        raise BenchError("the load has failed")
    found: Figures = json.loads(line)
    return found


def _flow_sockets(port: int) -> int:
    """How many connected UDP sockets have a local port: 01 in the tables of proc(5)."""
    rows = [
        line.split()
        for name in ("udp", "udp6")
        for line in (PROC / "net" / name).read_text().splitlines()[1:]
    ]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


def _peer_of(target: Target) -> int:
    if target.peer_pid is None:
        raise BenchError("there is no peer to weigh")
    return target.peer_pid


def _rest_ms(pid: int) -> float:
    """CPU milliseconds per second of a peer that has nothing to do. Blocks for REST_S."""
    before = cpu_ns(pid)
    time.sleep(REST_S)
    return (cpu_ns(pid) - before) / 1e6 / REST_S


def wait_pss_stable(pid: int, sessions: int = IDLE_SESSIONS) -> int:
    """Wait until the memory of the tree no longer moves, and return it in KiB."""
    deadline = time.monotonic() + PSS_WITHIN_S
    now_kib = pss_kib(pid)
    while time.monotonic() < deadline:
        last_kib = now_kib
        time.sleep(PSS_WINDOW_S)
        now_kib = pss_kib(pid)
        if abs(now_kib - last_kib) * PSS_STABLE_SESSIONS < sessions:
            return now_kib
    raise BenchError(f"memory of pid {pid} still moves after {PSS_WITHIN_S:g} s")
