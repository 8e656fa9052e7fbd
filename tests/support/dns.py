"""A real DNS server on loopback, dnsmasq, and asking it with a real client, dig."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

from support.datagrams import free_udp_address
from support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME, ADDRESS = "example.test", "192.0.2.7"
LONG_NAME = "long.test"  # whose answer is longer than a client takes by UDP without EDNS


@contextmanager
def dns_server() -> Iterator[tuple[str, int]]:
    """Serve :data:`NAME` by UDP and TCP; gives the address. It asks nobody else."""
    host, port = free_udp_address()
    with subprocess.Popen(
        [
            *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file="),
            *("--edns-packet-max=4096", "--no-resolv", "--no-hosts", "--user=", "--group="),
            *(f"--listen-address={host}", "--bind-interfaces", f"--port={port}"),
            f"--address=/{NAME}/{ADDRESS}",
            f"--txt-record={LONG_NAME},{','.join(['x' * 250] * 8)}",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            eventually(lambda: dig((host, port), NAME) == ADDRESS, "dnsmasq does not answer")
            yield host, port
        finally:
            process.terminate()


def dig(server: tuple[str, int], name: str, *options: str) -> str:
    """The short answer of a server, "" if there is none."""
    done = subprocess.run(
        [
            "dig",
            f"@{server[0]}",
            "-p",
            str(server[1]),
            "+short",
            "+tries=1",
            "+time=5",
            *options,
            name,
        ],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        check=False,
    )
    return done.stdout.strip() if done.returncode == 0 else ""
