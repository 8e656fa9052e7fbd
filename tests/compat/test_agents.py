"""What an agent says, read by us and by HAProxy, which asks the same agent."""

from __future__ import annotations

import selectors
import socket
import subprocess
import threading
from collections import Counter
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

from support.probing import ask, check, target_of
from support.programs import debian
from support.waiting import PATIENCE_S, eventually

from forwarder.checker.outcome import Word

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from forwarder.checker.outcome import Advice

# Of all servers, as configured.
WEIGHT: Final = 200
LIMIT: Final = 5
# It waits for more until its timeout, though the agent has closed.
INCOMPLETE: Final = (b"5%", b"down", b"")
LINES: Final = (
    b"75%\n",
    b"0%\n",
    b"100% up\r\n",
    b"75%,up\n",
    b"50%\tready up\n",
    b"  50%   \n",
    b"drain\n",
    b"drain up 40%\n",
    b"maint\n",
    b"ready\n",
    b"down\n",
    b"down #disk full\n",
    b"fail # x\n",
    b"stopped\n",
    b"drain down #x\n",
    b"maint up\n",
    b"up\n",
    b"up #down\n",
    b"down up\n",
    b"up down\n",
    b"drain ready\n",
    b"ready maint\n",
    b"30% 60%\n",
    b"maxconn:30\n",
    b"maxconn:30 maxconn:7 up\n",
    b"hello 20%\n",
    b"hello\n",
    b"\n",
    b"#up\n",
    b"up\rdown\n",
    b"Up\n",
    b"DRAIN\n",
    *INCOMPLETE,
)
_SHOWN: Final = {None: "", Word.READY: "", Word.DRAIN: "drain", Word.MAINT: "maint"}
STATS: Final = """\
global
    nbthread 1
    stats socket {path} level admin
defaults
    mode tcp
    timeout connect 20s
    timeout client 20s
    timeout server 20s
    timeout check 20s
listen all
    bind {bind}
"""


@contextmanager
def agents(lines: Sequence[bytes]) -> Iterator[tuple[list[socket.socket], Counter[int]]]:
    """An agent for each line, and how often each was asked."""
    asked: Counter[int] = Counter()
    with ExitStack() as stack:
        listeners = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=64)) for _ in lines
        ]
        selector = stack.enter_context(selectors.DefaultSelector())
        for number, listener in enumerate(listeners):
            selector.register(listener, selectors.EVENT_READ, number)
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        selector.register(stack.enter_context(theirs), selectors.EVENT_READ)

        def serve() -> None:
            while True:
                for key, _ in selector.select():
                    if key.fileobj is theirs:
                        return
                    peer, _ = listeners[key.data].accept()
                    with peer:
                        peer.sendall(lines[key.data])
                    asked[key.data] += 1

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listeners, asked
        finally:
            ours.send(b"x")
            thread.join()


def command(path: str, line: str) -> str:
    """Ask HAProxy at its socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(path)
        sock.sendall(line.encode() + b"\n")
        data = b""
        while piece := sock.recv(65536):
            data += piece
    return data.decode()


@contextmanager
def haproxy(path: Path, listeners: Sequence[socket.socket]) -> Iterator[str]:
    """Run it with a server for each agent; yields its socket."""
    stats = str(path / "stats")
    text = STATS.format(path=stats, bind=f"unix@{path}/all")
    for number, listener in enumerate(listeners):
        port = listener.getsockname()[1]
        text += f"    server s{number} 127.0.0.1:1 weight {WEIGHT} maxconn {LIMIT} agent-check"
        text += f" agent-addr 127.0.0.1 agent-port {port} agent-inter 20ms\n"
    (path / "haproxy.cfg").write_text(text)
    with subprocess.Popen(
        ["haproxy", "-db", "-f", path / "haproxy.cfg"], stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield stats
        finally:
            process.kill()


def servers(stats: str) -> dict[int, dict[str, str]]:
    """What HAProxy knows of its servers."""
    lines = command(stats, "show stat").lstrip("# ").splitlines()
    names = lines[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=False)) for line in lines[1:] if line]
    return {int(row["svname"][1:]): row for row in rows if row["svname"][0] == "s"}


def of_haproxy(row: Mapping[str, str]) -> tuple[str, int, int]:
    """What it has made of a server: its state, its weight, its limit."""
    state = row["status"].partition(" ")[0].lower()
    return ("" if state == "no" else state), int(row["weight"]), int(row["slim"])


def of_us(advice: Advice | None) -> tuple[str, int, int]:
    """The same by what we have read. Without a check besides, only an agent says down."""
    if advice is None:
        return "", WEIGHT, LIMIT
    is_down = advice.is_up is False and advice.word is not Word.MAINT
    state = "down" if is_down else _SHOWN[advice.word]
    weight = WEIGHT if advice.percent is None else WEIGHT * advice.percent // 100
    limit = LIMIT if advice.max_sessions is None else advice.max_sessions
    return state, weight, limit


@debian("haproxy")
def test_an_agent_means_what_it_means_to_haproxy(tmp_path: Path) -> None:
    with agents(LINES) as (listeners, asked), haproxy(tmp_path, listeners) as stats:
        # The last one to be asked again has done with the first answer.
        complete = len(LINES) - len(INCOMPLETE)
        eventually(lambda: all(asked[number] > 2 for number in range(complete)))
        assert len(asked) == len(LINES)
        theirs = servers(stats)
        for number, line in enumerate(LINES):
            outcome = ask(check("agent"), target_of(listeners[number]))
            assert of_us(outcome.advice) == of_haproxy(theirs[number]), line


@debian("haproxy")
def test_haproxy_gives_more_than_the_configured_weight(tmp_path: Path) -> None:
    """Up to 256; with us a server has at most all of its weight."""
    with agents((b"120%\n",)) as (listeners, asked), haproxy(tmp_path, listeners) as stats:
        eventually(lambda: asked[0] > 2)
        assert of_haproxy(servers(stats)[0])[1] == WEIGHT * 120 // 100
        assert of_us(ask(check("agent"), target_of(listeners[0])).advice)[1] == WEIGHT


@debian("haproxy")
def test_haproxy_wants_a_blank_before_a_reason(tmp_path: Path) -> None:
    """Without one it takes all of it for a word that it does not know; so it stays in use."""
    lines = (b"down#disk full\n", b"stopped#\n")
    with agents(lines) as (listeners, asked), haproxy(tmp_path, listeners) as stats:
        eventually(lambda: min(asked[0], asked[1]) > 2)
        theirs = servers(stats)
        for number, listener in enumerate(listeners):
            assert of_haproxy(theirs[number])[0] == ""
            assert of_us(ask(check("agent"), target_of(listener)).advice)[0] == "down"
