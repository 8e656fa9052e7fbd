"""What may be typed, and what it means: options, their combinations, and what is refused."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING

import pytest
from support.control import ask
from support.ends import accept, carry, connect, listen
from support.forwarder import reserve_port
from support.processes import as_nobody, listeners, run_command, title
from support.waiting import eventually

from forwarder import DISTRIBUTION, __version__
from forwarder.cli.features import FEATURES

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence
    from pathlib import Path

    from process.conftest import Launch, Serve

pytestmark = pytest.mark.process

PAIR = ("-l", "127.0.0.1:1", "-r", "127.0.0.1:2")
BULK = 4 << 20


@pytest.fixture
def conf(tmp_path: Path, address: tuple[str, int], upstream: socket.socket) -> Path:
    """A configuration of one rule."""
    path = tmp_path / "name with blank.conf"
    path.write_text("{} {} {} {}\n".format(*address, *upstream.getsockname()))
    return path


@pytest.mark.parametrize(
    "words",
    [
        ["-c"],
        ["run", "-c"],
        ["--conf-file"],
        ["-f", "-c"],
        ["--foreground", "--config"],
        ["run", "--verbose", "-fc"],
    ],
    ids=" ".join,
)
def test_a_file_is_run_with_and_without_the_command(
    launch: Launch, conf: Path, address: tuple[str, int], upstream: socket.socket, words: list[str]
) -> None:
    forwarder = launch(*words, str(conf))
    assert title(forwarder.pid) == "forwarder: master [name with blank.conf]"
    with connect(address) as client, accept(upstream) as far:
        carry(client, far, b"there")
    assert forwarder.stop() == 0


@pytest.mark.parametrize(
    ("words", "count"),
    [(["--workers", "1"], 1), (["--workers=4"], 4), (["--workers", "auto"], 0), ([], 0)],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_workers_are_as_many_as_told(
    launch: Launch, conf: Path, address: tuple[str, int], words: list[str], count: int
) -> None:
    forwarder = launch("-c", str(conf), *words)
    wanted = count or len(os.sched_getaffinity(0))
    assert len(forwarder.workers()) == wanted
    assert listeners(address) == wanted


@pytest.mark.parametrize(
    "value",
    [
        *("0", "-1", "+1", "1.5", "1025", "", " 2", "many", "\u00b2"),
        pytest.param("9" * 5000, id="thousands of digits"),
    ],
)
def test_a_bad_number_of_workers_is_refused(value: str) -> None:
    ended = run_command(*PAIR, "--workers", value)
    assert ended.returncode == 2
    assert "neither 'auto' nor a number from 1 to 1024" in ended.stderr
    assert ended.stdout == ""


@pytest.mark.parametrize(
    ("words", "workers", "splices"),
    [
        ([], 3, False),
        (["--workers", "2"], 2, False),
        (["--relay", "splice"], 3, True),
        (["--workers", "1", "--relay", "auto"], 1, True),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_the_command_line_wins_over_the_file(
    launch: Launch,
    tmp_path: Path,
    address: tuple[str, int],
    upstream: socket.socket,
    words: list[str],
    workers: int,
    splices: bool,
) -> None:
    path, control = tmp_path / "some.toml", tmp_path / "control.sock"
    path.write_text(
        f'control = "{control}"\nworkers = 3\nrelay = "copy"\n[[forwarding_rules]]\n'
        'listen = "{}:{}"\nupstream = "{}:{}"\n'.format(*address, *upstream.getsockname())
    )
    forwarder = launch("-c", str(path), *words)
    pids = forwarder.workers()
    assert len(pids) == workers
    assert listeners(address) == workers
    with connect(address) as client, accept(upstream) as far:
        carry(client, far, bytes(BULK))
    assert bool(spliced(control)) is splices


def test_relay_copy_on_the_command_line_splices_nothing(serve: Serve, tmp_path: Path) -> None:
    control = tmp_path / "control.sock"
    link = serve("--relay", "copy", "--control", str(control)).link()
    carry(link.client, link.upstream, bytes(BULK))
    assert spliced(control) == 0


def spliced(control: Path) -> int:
    """How many bytes did not enter the worker, when ``BULK`` are counted."""
    totals: dict[str, int] = {}

    def are_counted() -> bool:
        totals.update(ask(control, "status")["totals"])  # type: ignore[call-overload]
        return totals["bytes_c2u"] == BULK

    eventually(are_counted, totals)
    return totals["bytes_spliced"]


def test_pairs_are_taken_in_order(launch: Launch) -> None:
    with (
        reserve_port() as first,
        reserve_port("::1") as second,
        listen() as to_first,
        listen("::1") as to_second,
    ):
        ports = [sock.getsockname()[1] for sock in (first, second, to_first, to_second)]
        launch(
            *("-l", f"127.0.0.1:{ports[0]}", "--listen", f"[::1]:{ports[1]}"),
            *("--remote", f"127.0.0.1:{ports[2]}", "-r", f"[::1]:{ports[3]}"),
        )
        for near, far in ((("127.0.0.1", ports[0]), to_first), (("::1", ports[1]), to_second)):
            with connect(near) as client, accept(far) as sock:
                carry(client, sock, b"there")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["-l", "127.0.0.1:1"], 78, "1 listen and 0 remote addresses"),
        (["-r", "127.0.0.1:1"], 78, "0 listen and 1 remote addresses"),
        ([*PAIR, "-l", "127.0.0.1:2"], 78, "2 listen and 1 remote addresses"),
        ([*PAIR, *PAIR], 78, "already listened on"),
        (["-l", ":1", "-r", "[::]:1"], 78, "where this rule listens"),
        (["-c", "-"], 2, "`check -` reads standard input"),
        (["check", "-c", "x.conf", "y.conf"], 2, "one too many"),
        (["-c", "x.conf", "--udp"], 2, "write protocol"),
        (["-l", "127.0.0.1:0", "-r", "127.0.0.1:1"], 78, "'0' is not a port number"),
        (["-l", "127.0.0.1:1", "-r", "*:1"], 78, "which host to connect to"),
        (["-c", "x.conf", *PAIR], 2, "exclude each other"),
        (["check", "-c", "x.conf", "-r", "127.0.0.1:1"], 2, "exclude each other"),
        ([], 2, "Usage:"),
        (["run"], 2, "nothing to forward"),
        (["check"], 2, "nothing to forward"),
        (["-f"], 2, "nothing to forward"),
        (["-c"], 2, "requires an argument"),
        (["frob"], 2, "No such command"),
        ([*PAIR, "--frob"], 2, "No such option"),
        ([*PAIR, "--relay", "slice"], 2, "slice"),
        (["-c", "x", "--format", "yaml"], 2, "yaml"),
        ([*PAIR, "more"], 2, "unexpected extra argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_makes_no_sense_is_refused(words: Sequence[str], code: int, said: str) -> None:
    ended = run_command(*words)
    assert ended.returncode == code, ended
    assert said in ended.stderr
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("words", [["-h"], ["--help"], ["run", "-h"], ["check", "--help"]])
def test_help_is_printed(words: list[str]) -> None:
    ended = run_command(*words)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("Usage: ")


def test_versions_features_and_limits_are_printed_one_a_line() -> None:
    """As nobody, too: whatever is tried needs no privilege."""
    ended = run_command("--version", prefix=as_nobody())
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert lines[0] == f"forwarder {__version__} (distribution {DISTRIBUTION})"
    assert re.fullmatch(r"Python 3\.[0-9.]+.*", lines[1])
    assert re.fullmatch(r"uvloop [0-9]+\.[0-9.]+", lines[2])
    assert lines[3].startswith(f"{os.uname().sysname} {os.uname().release} ")
    found = dict(line.split(": ", 1) for line in lines[4:])
    assert {found.pop(name) for name, _ in FEATURES} <= {"yes", "no"}
    assert found.keys() == {"open files", "pipe budget", "listen queue", "UDP buffer"}


# -- stderr that nobody reads

_CLOSED_PIPE = (
    "import os, sys; r, w = os.pipe(); os.dup2(w, 2); os.close(r);"
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


@pytest.mark.parametrize("verbose", [[], ["--verbose"]], ids=["", "verbose"])
@pytest.mark.parametrize("kind", ["full", "closed-pipe", "no-descriptors"])
def test_a_useless_stderr_does_not_stop_forwarding(
    serve: Serve, kind: str, verbose: list[str]
) -> None:
    """Sessions, a death of a worker and the end all log. Result: none of them is hindered."""
    prefix = {
        "full": ["sh", "-c", 'exec "$@" 2>/dev/full', "sh"],
        "closed-pipe": [sys.executable, "-c", _CLOSED_PIPE],
        "no-descriptors": ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"],
    }[kind]
    service = serve(*verbose, workers=2, prefix=prefix)
    for _ in range(5):
        service.assert_serves()
    victim, other = service.forwarder.workers()
    os.kill(victim, 9)
    eventually(lambda: len(set(service.forwarder.workers()) - {victim}) == 2)
    assert other in service.forwarder.workers()
    for _ in range(5):
        service.assert_serves()
    assert service.stop() == 0
    service.assert_nothing_left()
