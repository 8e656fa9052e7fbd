"""rinetd 0.73 and we, with one configuration and the same clients: the same lines in the log.

What is compared: all fields but the time, for each client in the order in which its lines came.
What rinetd 0.73 does wrong is put right first: see :func:`as_intended`.
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest
from support.ends import accept, listen, receive_exactly, receive_to_end
from support.forwarder import reserve_port
from support.logged import COMMON, RINETD
from support.processes import listeners
from support.programs import debian, rinetd
from support.waiting import PATIENCE_S, eventually

from process.conftest import stop

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from process.conftest import Launch

pytestmark = pytest.mark.process

Address = tuple[str, int]
# Each client has an address of its own, so that its lines are found.
FIRST_CLIENT, FIRST_UPSTREAM, SILENT, DENIED, NOT_ALLOWED, REFUSED = (
    f"127.0.0.{number}" for number in (11, 12, 13, 66, 77, 14)
)
SIZES = {FIRST_CLIENT: (5, 7000), FIRST_UPSTREAM: (40_000, 3), SILENT: (0, 0)}


@contextmanager
def client(address: Address, source: str) -> Iterator[socket.socket]:
    with socket.socket() as sock:
        sock.settimeout(PATIENCE_S)
        sock.bind((source, 0))
        sock.connect(address)
        yield sock


def converse(address: Address, upstream: socket.socket, source: str) -> None:
    """Exchange bytes, then end: the upstream first for one client, the client first for others."""
    up, down = SIZES[source]
    with client(address, source) as near, accept(upstream) as far:
        near.sendall(bytes(up))
        receive_exactly(far, up)
        far.sendall(bytes(down))
        receive_exactly(near, down)
        first, last = (far, near) if source == FIRST_UPSTREAM else (near, far)
        first.shutdown(socket.SHUT_WR)
        receive_to_end(last)
        last.close()


def be_turned_away(address: Address, source: str) -> None:
    # The reset may come while the client still waits for its connection.
    with contextlib.suppress(ConnectionResetError), client(address, source) as near:
        assert near.recv(1) == b""


def visit_all(addresses: list[Address], upstream: socket.socket) -> None:
    """Every kind of client at the first rule; at the second nobody listens upstream."""
    for source in SIZES:
        converse(addresses[0], upstream, source)
    be_turned_away(addresses[0], DENIED)
    be_turned_away(addresses[0], NOT_ALLOWED)
    be_turned_away(addresses[1], REFUSED)


Fields = tuple[str, ...]


def read_log(path: Path, pattern: re.Pattern[str]) -> dict[str, list[Fields]]:
    """For each client the fields behind it, which the pattern must find in every line."""
    found: dict[str, list[Fields]] = {}
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith(f"{DENIED} ") or f"\t{DENIED}\t" in line:
            # rinetd reads behind the end of its table of words: "(null)", if it is lucky.
            line = re.sub(r"\t[^\t]*$", "\tdenied", line)  # noqa: PLW2901 - the line that is meant
            line = re.sub(r"/[^/]* HTTP/", "/denied HTTP/", line)  # noqa: PLW2901
        match = pattern.fullmatch(line)
        assert match, line
        found.setdefault(match[1], []).append(match.groups()[1:])
    return found


def as_intended(client: str, lines: list[Fields], result: int) -> list[Fields]:
    """What rinetd means: its words for refusals are those of the wrong places of a table.

    And it says ``opened`` of a connection that is being made, which may fail (then it has ended).
    """
    if client == NOT_ALLOWED:
        return [replaced(line, result, "not-allowed") for line in lines]
    if client == REFUSED:
        assert [line[result] for line in lines] == ["opened", "done-local-closed"]
        return [replaced(lines[1], result, "local-connect-failed -")]
    return lines


def replaced(line: Fields, index: int, word: str) -> Fields:
    return (*line[:index], word, *line[index + 1 :])


@debian("rinetd")
@pytest.mark.parametrize("is_common", [False, True], ids=["tabs", "common"])
def test_the_lines_are_those_of_rinetd(launch: Launch, tmp_path: Path, is_common: bool) -> None:
    pattern, result = (COMMON, 4) if is_common else (RINETD, 6)
    logs = {}
    with ExitStack() as stack:
        upstream, closed = stack.enter_context(listen()), stack.enter_context(reserve_port())
        holders = [stack.enter_context(reserve_port()) for _ in range(2)]
        addresses: list[Address] = [holder.getsockname() for holder in holders]
        rules = [
            "{} {} {} {}".format(*address, *to.getsockname())
            for address, to in zip(addresses, (upstream, closed), strict=True)
        ]
        access = ["allow 127.0.0.1?", "allow 127.0.0.66", "deny 127.0.0.6?"]
        for name in ("theirs", "ours"):
            logs[name] = tmp_path / name
            path = tmp_path / f"{name}.conf"
            lines = [*access, *rules, f"logfile {logs[name]}", "logcommon\n" * is_common]
            path.write_text("\n".join([*lines, f"pidlogfile {tmp_path}/{name}.pid"]) + "\n")
        with rinetd(tmp_path / "theirs.conf", addresses):
            visit_all(addresses, upstream)
            eventually(lambda: logs["theirs"].read_text().count("\n") == 10)
        eventually(lambda: not any(listeners(address) for address in addresses))
        forwarder = launch("-c", str(tmp_path / "ours.conf"), "--workers", "1")
        visit_all(addresses, upstream)
        assert stop(forwarder, signal.SIGTERM) == 0
    theirs, ours = (read_log(logs[name], pattern) for name in ("theirs", "ours"))
    assert ours == {source: as_intended(source, lines, result) for source, lines in theirs.items()}
    assert len(ours) == 6
