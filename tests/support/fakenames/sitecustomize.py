"""Host names as a test says; Python imports this in each process that the test starts.

Every name is a file in the directory ``FORWARDER_TEST_NAMES`` (``support.names``), read anew for
each look-up. Addresses are looked up as always.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

_real: Any = socket.getaddrinfo
_directory = Path(os.environ.get("FORWARDER_TEST_NAMES", "/nonexistent"))


def _said(host: str) -> str:
    """What is to be answered; a server that does not answer is asked until it does."""
    with (_directory / ".asked").open("a") as file:
        file.write(f"{host}\n")
    until = time.monotonic() + 60
    while True:
        try:
            everybody = (_directory / ".server").read_text()
            text = everybody or (_directory / host).read_text()
        except FileNotFoundError:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known") from None
        if text != "silent":
            break
        if time.monotonic() > until:
            text = "refused"
        time.sleep(0.02)
    if text == "refused":
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    return text


def _getaddrinfo(
    host: str | None,
    port: str | int | None,
    family: int = 0,
    type: int = 0,  # noqa: A002 - as in the library
    proto: int = 0,
    flags: int = 0,
) -> Any:  # noqa: ANN401 - more precise in the library
    literal = flags | socket.AI_NUMERICHOST
    if host is None or flags & socket.AI_NUMERICHOST:
        return _real(host, port, family, type, proto, flags)
    try:
        return _real(host, port, family, type, proto, literal)
    except OSError:
        found = _said(host).split()
    return [one for address in found for one in _real(address, port, family, type, proto, literal)]


if _directory.is_dir():
    sys.modules["dns"] = None  # type: ignore[assignment]  # no such extra: nobody else is asked
    socket.getaddrinfo = _getaddrinfo  # type: ignore[assignment]  # more precise there
if "FORWARDER_TEST_TTL" in os.environ:
    from forwarder.upstream import schedule

    schedule.NAME_TTL_S = float(os.environ["FORWARDER_TEST_TTL"])  # type: ignore[misc]  # final
    schedule.LONGEST_RETRY_S = schedule.NAME_TTL_S  # type: ignore[misc]
