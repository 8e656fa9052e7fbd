"""The loads, and the servers behind the peers: what is done to one, and what is found.

A load runs against a peer that is up and at rest; it starts and ends no server.
"""

from __future__ import annotations

import json
import re
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.peers import HOST, UPSTREAM_PORT
from bench.procs import BenchError, cpu_ns, pss_kib, run_client

if TYPE_CHECKING:
    from pathlib import Path

Figures = dict[str, float]

AB_CONNECTIONS = 64
AB_REQUESTS_PER_S = 6000  # -n took 0.4 to 0.9 times the seconds asked for where tried
RR_CONNECTIONS = 64
RR_BYTES = 64
IDLE_SESSIONS = 4000
UDP_BYTES = 1200
UDP_RATE = "300M"

GRACE_S = 60.0  # what a load may take beyond the time it was given, before it is called stuck

# Memory is stable when it moved less than 1 KiB per 100 sessions in half a second.
PSS_WINDOW_S = 0.5
PSS_STABLE_KIB = IDLE_SESSIONS // 100
PSS_WITHIN_S = 20.0


@dataclass(frozen=True, slots=True)
class Target:
    """Where a load goes. ``peer_pid`` is None for direct: there is no process to look at."""

    port: int
    peer_pid: int | None
    seconds: int
    directory: Path

    def cpu_ns(self) -> int:
        return 0 if self.peer_pid is None else cpu_ns(self.peer_pid)

    def with_cpu(self, figures: Figures, key: str, value: float) -> Figures:
        """Add a figure about the peer's processes, unless there are none."""
        return figures if self.peer_pid is None else {**figures, key: value}


def iperf_upstream(_directory: Path) -> list[str]:
    """Return the command of the bulk receiver."""
    return ["iperf3", "-s", "-B", HOST, "-p", str(UPSTREAM_PORT)]


def echo_upstream(directory: Path) -> list[str]:
    """Return the command of the echo server, silent until spoken to."""
    return [str(directory / "echo"), HOST, str(UPSTREAM_PORT)]


def bulk_load(target: Target, streams: int) -> Figures:
    """Send as fast as possible, client to upstream, over ``streams`` connections."""
    command = ["iperf3", "-J", "-c", HOST, "-p", str(target.port)]
    command += ["-t", str(target.seconds), "-P", str(streams)]
    before = target.cpu_ns()
    result = json.loads(run_client(command, target.seconds + GRACE_S))
    used_s = (target.cpu_ns() - before) / 1e9
    if "error" in result:  # with -J iperf3 exits 0 even so
        raise BenchError(f"iperf3: {result['error']}")
    received = result["end"]["sum_received"]
    figures = {"gbit_s": float(received["bits_per_second"]) / 1e9}
    return target.with_cpu(figures, "cpu_s_per_gb", used_s / (float(received["bytes"]) / 1e9))


def udp_load(target: Target, bit_rate: str) -> Figures:
    """Send datagrams, client to upstream, at a rate or as fast as possible ("0")."""
    command = ["iperf3", "-J", "-u", "-c", HOST, "-p", str(target.port)]
    command += ["-t", str(target.seconds), "-l", str(UDP_BYTES), "-b", bit_rate]
    before = target.cpu_ns()
    result = json.loads(run_client(command, target.seconds + GRACE_S))
    used_us = (target.cpu_ns() - before) / 1e3
    if "error" in result:
        raise BenchError(f"iperf3: {result['error']}")
    total = result["end"]["sum"]
    delivered = total["packets"] - total["lost_packets"]
    figures = {
        "per_s": delivered / float(total["seconds"]),
        "lost_percent": float(total["lost_percent"]),
    }
    return target.with_cpu(figures, "cpu_us", used_us / max(delivered, 1))


def conn_load(target: Target) -> Figures:
    """Open, ask once, close: a new connection for every request."""
    count = AB_REQUESTS_PER_S * target.seconds
    csv = target.directory / "ab.csv"
    command = ["ab", "-q", "-n", str(count), "-c", str(AB_CONNECTIONS), "-e", str(csv)]
    before = target.cpu_ns()
    text = run_client([*command, f"http://{HOST}:{target.port}/"], target.seconds * 10 + GRACE_S)
    used_us = (target.cpu_ns() - before) / 1e3
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
    return target.with_cpu(figures, "cpu_us", used_us / count)


def _ab(text: str, pattern: str) -> float:
    found = re.search(pattern, text)
    if found is None:
        raise BenchError(f"ab: no {pattern!r} in its report\n{text}")
    return float(found[1])


def rr_load(target: Target) -> Figures:
    """Ask and wait for the answer, over and over, on connections that stay open."""
    command = [str(target.directory / "rr"), HOST, str(target.port)]
    command += [str(RR_CONNECTIONS), str(RR_BYTES), str(target.seconds)]
    before = target.cpu_ns()
    answer = json.loads(run_client(command, target.seconds + GRACE_S))
    used_us = (target.cpu_ns() - before) / 1e3
    figures = {
        "per_s": float(answer["requests_per_s"]),
        "p50_us": float(answer["p50_us"]),
        "p99_us": float(answer["p99_us"]),
        "max_us": float(answer["max_us"]),
    }
    return target.with_cpu(figures, "cpu_us", used_us / float(answer["requests"]))


def idle_load(target: Target) -> Figures:
    """Hold sessions open that say nothing, and weigh the peer before and with them."""
    if target.peer_pid is None:
        raise BenchError("idle needs a peer to weigh")
    before_kib = wait_pss_stable(target.peer_pid)
    with ExitStack() as sessions:
        for _ in range(IDLE_SESSIONS):
            session = socket.create_connection((HOST, target.port), timeout=GRACE_S)
            sessions.enter_context(session)
            session.sendall(b"x")  # answered: the session is up from end to end
            if session.recv(1) != b"x":
                raise BenchError("idle: a session was closed instead of answered")
        with_kib = wait_pss_stable(target.peer_pid)
    return {"kib": (with_kib - before_kib) / IDLE_SESSIONS, "base_mib": before_kib / 1024}


def wait_pss_stable(pid: int) -> int:
    """Wait until the memory of the tree no longer moves, and return it in KiB."""
    deadline = time.monotonic() + PSS_WITHIN_S
    now_kib = pss_kib(pid)
    while time.monotonic() < deadline:
        last_kib = now_kib
        time.sleep(PSS_WINDOW_S)
        now_kib = pss_kib(pid)
        if abs(now_kib - last_kib) < PSS_STABLE_KIB:
            return now_kib
    raise BenchError(f"memory of pid {pid} still moves after {PSS_WITHIN_S:g} s")
