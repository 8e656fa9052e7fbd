"""A name server that hangs, and a server that is silent: do new sessions wait for either?"""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from bench.groups.contenders import SERVER_PORT, Group, hosts
from bench.groups.findings import Span, failures, ms, shares
from bench.groups.place import WITHIN_S, refuse
from bench.procs import BenchError, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.groups.contenders import Contender
    from bench.groups.place import Place

HEADING: Final = "Two servers; the second one, or its name, is not to be had"
HEAD: Final = (
    *("the second server", "clients", "failed", "p50 ms", "p99 ms", "slowest ms"),
    "served by the second",
)
NAME: Final = "second.test"
RESOLVER: Final = "127.0.0.1"
RATE: Final = 200
SILENT_S: Final = 10.0  # after it fell silent, until the measurement begins
LOOKED_UP_S: Final = 40.0  # longer than anybody keeps a name before it is looked up again
CASES: Final = ("is there", "is silent", "has a name", "name server hangs", "never had an address")


def run(place: Place, contender: Contender) -> list[list[str]]:
    """A row for each case."""
    rows = []
    for case in CASES:
        try:
            rows.append([case, *_one(place, contender, case)])
        except BenchError as err:
            reason = str(err).splitlines()[0]
            rows.append([case, f"did not start: {reason}", *["-"] * (len(HEAD) - 2)])
    return rows


def _one(place: Place, contender: Contender, case: str) -> list[str]:
    first, second = hosts(2)
    has_name = case in CASES[2:]
    hangs = case in CASES[3:]
    group = Group(
        servers=(first, NAME if has_name else second),
        check_port=SERVER_PORT,
        resolver=RESOLVER if has_name else "",
    )
    seconds = LOOKED_UP_S if hangs else float(place.seconds)
    with place.servers(first, second), _names(place, second) as names:
        if case == CASES[4]:
            names.send_signal(signal.SIGSTOP)
        with place.serving(contender, group):
            if case == CASES[1]:
                refuse(second, "drop")
                time.sleep(SILENT_S)
            elif case == CASES[3]:
                names.send_signal(signal.SIGSTOP)
            with place.clients(RATE, seconds) as clients:
                found = clients.wait()
    span = Span.of(found, 0, float("inf"))
    times = map(ms, (span.p50_s, span.p99_s, span.slowest_s))
    return [f"{span.count:,}", failures(span.failed), *times, f"{shares(found)[second]:,}"]


def _is_answered() -> bool:
    with suppress(socket.gaierror):
        return bool(socket.getaddrinfo(NAME, SERVER_PORT, socket.AF_INET))
    return False


@contextmanager
def _names(place: Place, address: str) -> Iterator[subprocess.Popen[bytes]]:
    """A name server that knows the one name; it is the system's, too."""
    resolv = place.directory / "resolv.conf"
    resolv.write_text(f"nameserver {RESOLVER}\noptions timeout:2 attempts:2\n")
    subprocess.run(["mount", "--bind", str(resolv), "/etc/resolv.conf"], check=True)
    process = subprocess.Popen(
        [
            *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file="),
            *("--no-resolv", "--no-hosts", "--user=", "--group=", "--local=/test/"),
            *(f"--listen-address={RESOLVER}", "--bind-interfaces"),
            f"--address=/{NAME}/{address}",
        ],
        stdin=subprocess.DEVNULL,
    )
    try:
        wait_until(_is_answered, "answers of the name server", WITHIN_S)
        yield process
    finally:
        process.kill()
        process.wait()
        subprocess.run(["umount", "/etc/resolv.conf"], check=True)
