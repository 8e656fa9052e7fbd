"""The connection log of the real command: every place, every format, and whatever can fail."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest
from support import procfs
from support.ends import carry, connect
from support.forwarder import reserve_port
from support.hosts import own_host
from support.logged import COMMON, RINETD, Logged, json_lines, places, read_json
from support.processes import NOBODY
from support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from process.conftest import Launch, Logging

pytestmark = pytest.mark.process
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount or to be somebody else")


def text_without_logs(it: Logged) -> str:
    return it.config.read_text().partition("[[logs]]")[0]


# -- places and formats


def test_three_formats_to_three_files_and_stderr_at_once_from_three_workers(
    logged: Logging, tmp_path: Path
) -> None:
    """Many sessions at a time, so that all workers write.

    *Result*: of each session one line in JSON and two in rinetd's formats, all of them whole.
    """
    names = ("rinetd", "common", "json")
    it = logged(
        places(*((tmp_path / name, name) for name in names), ("stderr", "json")),
        top=f'log_file = "{tmp_path / "first"}"\nlog_format = "common"',
        workers=3,
    )
    links = [it.link() for _ in range(150)]
    for number, link in enumerate(links):
        carry(link.client, link.upstream, b"c" * (number + 1))
        carry(link.upstream, link.client, b"u" * (2 * number + 1))
    for link in links:
        link.client.close()
        link.upstream.close()
    found = it.wait_lines(tmp_path / "json", it.used)
    assert len({entry["worker"] for entry in found}) > 1
    assert sorted((entry["bytes_c2u"], entry["bytes_u2c"]) for entry in found) == [
        (number + 1, 2 * number + 1) for number in range(150)
    ]
    assert len({entry["id"] for entry in found}) == 150
    for entry in found:
        assert (entry["rule"], entry["event"], entry["protocol"]) == ("one", "ended", "tcp")
        assert entry["upstream"] == "{}:{}".format(*it.upstream.getsockname())
        assert entry["local"] == "{}:{}".format(*it.address)
        assert str(entry["end"]) in ("client/data", "client/data/reset", "upstream/data")
    eventually(lambda: (tmp_path / "rinetd").read_text().count("\n") == 300)
    fields = [RINETD.fullmatch(line) for line in (tmp_path / "rinetd").read_text().splitlines()]
    assert all(fields)
    assert sum(match[8] == "opened" for match in fields if match) == 150
    for name in ("common", "first"):
        eventually(lambda name=name: (tmp_path / name).read_text().count("\n") == 300)  # type: ignore[misc]
        assert all(map(COMMON.fullmatch, (tmp_path / name).read_text().splitlines()))
    assert it.forwarder.stop() == 0
    printed = [line for line in it.forwarder.lines if line.startswith("{")]
    assert sorted(str(entry["id"]) for entry in json_lines("\n".join(printed) + "\n")) == sorted(
        str(entry["id"]) for entry in found
    )


def test_a_unix_upstream_with_a_quote_in_its_name_is_still_json(
    logged: Logging, tmp_path: Path
) -> None:
    it = logged(places((tmp_path / "json", "json")), workers=1)
    odd = tmp_path / 'a"b\\c'
    text = it.config.read_text()
    with reserve_port() as holder:
        at = "{}:{}".format(*holder.getsockname())
        toml = f"[[forwarding_rules]]\nlisten = '{at}'\nupstream = 'unix:{odd}'\n"
        assert it.reload(text.replace("[[logs]]", toml + "[[logs]]"))["ok"] is True
        with contextlib.suppress(ConnectionError), connect(holder.getsockname()) as client:
            client.recv(1)
    eventually(lambda: (tmp_path / "json").read_text() != "")
    (entry,) = read_json(tmp_path / "json")
    assert (entry["upstream"], entry["end"]) == (f"unix:{odd}", "upstream/connect")


NAMESPACE = """
set -e
for name in null zero urandom random tty; do
    touch "$1/dev/$name"; mount --bind "/dev/$name" "$1/dev/$name"
done
mount --rbind /dev/shm "$1/dev/shm"
mount --rbind "$1/dev" /dev
mount --rbind "$1/run" /run
shift
exec "$@"
"""


@ROOT
def test_syslog_and_the_journal_get_a_datagram_for_each_line(
    logged: Logging, tmp_path: Path
) -> None:
    """In a mount namespace of its own, with /dev and /run of ours; syslog is restarted once."""
    for name in ("dev/shm", "run/systemd/journal"):
        (tmp_path / name).mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        syslog, journal = (
            stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) for _ in "sj"
        )
        syslog.bind(str(tmp_path / "dev/log"))
        journal.bind(str(tmp_path / "run/systemd/journal/socket"))
        it = logged(
            places(("syslog", "rinetd"), ("journal", "json")),
            prefix=["unshare", "-m", "sh", "-c", NAMESPACE, "sh", str(tmp_path)],
        )
        for sock in (syslog, journal):
            sock.settimeout(PATIENCE_S)
        (port,) = it.visit()
        first, second = (syslog.recv(4096).decode() for _ in range(2))
        assert re.match(r"<30>forwarder\[\d+\]: ", first)
        assert [text.split("\t")[-1] for text in (first, second)] == [
            "opened",
            "done-remote-closed",
        ]
        fields = journal.recv(4096).decode().splitlines()
        assert fields[:2] == ["SYSLOG_IDENTIFIER=forwarder", "PRIORITY=6"]
        (entry,) = json_lines(fields[2].removeprefix("MESSAGE=") + "\n")
        assert entry["client_port"] == port
        syslog.close()
        (tmp_path / "dev/log").unlink()
        again = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        again.bind(str(tmp_path / "dev/log"))
        again.settimeout(PATIENCE_S)
        it.visit(4)
        assert [again.recv(4096).decode().count("\t") for _ in range(8)] == [8] * 8
        assert it.forwarder.stop() == 0
        assert not it.forwarder.trouble()


# -- opened anew, changed, ended


@pytest.mark.parametrize("how", ["HUP", "USR1"])
def test_after_a_move_nothing_is_lost_and_nothing_goes_to_the_old_file(
    logged: Logging, tmp_path: Path, how: str
) -> None:
    path, old = tmp_path / "json", tmp_path / "json.1"
    it = logged(places((path, "json")), workers=3)
    before = it.visit(10)
    path.rename(old)
    if how == "HUP":
        it.forwarder.signal(signal.SIGHUP)
        it.forwarder.wait_logged("master.reloaded")
    else:
        it.forwarder.signal(signal.SIGUSR1)
        workers = it.forwarder.workers()
        eventually(lambda: not any(has_open(pid, old) for pid in workers))
    after = it.visit(10)
    it.wait_lines(path, after)
    it.wait_lines(old, before)
    assert it.forwarder.stop() == 0
    assert not it.forwarder.trouble()


def has_open(pid: int, path: Path | str) -> bool:
    return str(path) in procfs.descriptors(pid).values()


def test_workers_that_drain_open_their_files_anew_too(logged: Logging, tmp_path: Path) -> None:
    path, old = tmp_path / "json", tmp_path / "json.1"
    it = logged(places((path, "json")), workers=1)
    link = it.link()
    it.forwarder.signal(signal.SIGTERM)
    it.forwarder.wait_logged("master.stopping")
    path.rename(old)
    it.forwarder.signal(signal.SIGUSR1)
    it.forwarder.wait_logged("log.reopened")
    eventually(lambda: not any(has_open(pid, old) for pid in it.forwarder.workers()))
    link.close()
    assert it.forwarder.wait() == 0
    it.wait_lines(path, it.used)


def test_a_reload_adds_removes_and_changes_places(logged: Logging, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    it = logged(places((one, "json")))
    text = text_without_logs(it)
    first = it.visit(2)
    assert it.reload(text + places((one, "json"), (two, "rinetd")))["ok"] is True
    second = it.visit(2)
    assert it.reload(text + places((two, "rinetd")))["ok"] is True
    it.visit(2)
    assert it.reload(text)["ok"] is True
    it.visit(2)
    assert it.forwarder.stop() == 0
    it.wait_lines(one, [*first, *second])
    lines = two.read_text().splitlines()
    assert len(lines) == 8
    assert all(map(RINETD.fullmatch, lines))


@pytest.mark.parametrize("kind", ["no directory", "a directory", "a socket"])
def test_a_reload_with_a_path_that_cannot_be_opened_changes_nothing(
    logged: Logging, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "json"
    it = logged(places((path, "json")))
    bad = {"no directory": tmp_path / "no" / "x", "a directory": tmp_path, "a socket": it.control}
    line = it.config.read_text().count("\n") + 2
    answer = it.reload(it.config.read_text() + places((bad[kind], "common")))
    assert answer["ok"] is False
    (problem,) = answer["problems"] if isinstance(answer["problems"], list) else [""]
    assert problem.startswith(f"{it.config}:{line}:")
    assert str(bad[kind]) in problem
    it.wait_lines(path, it.visit(3))
    assert it.ask("status")["generation"] == 1


def test_lines_are_written_when_the_instance_stops_however_it_does(
    logged: Logging, tmp_path: Path
) -> None:
    path = tmp_path / "json"
    it = logged(places((path, "json")))
    links = [it.link() for _ in range(20)]
    it.forwarder.signal(signal.SIGINT)
    assert it.forwarder.wait() == 0
    found = it.wait_lines(path, it.used)
    assert {entry["end"] for entry in found} == {"us/shutdown"}
    for link in links:
        link.close()


def test_lines_are_written_when_a_worker_retires_and_by_an_upgrade(
    logged: Logging, tmp_path: Path
) -> None:
    path = tmp_path / "json"
    it = logged(places((path, "json")), workers=3)
    it.visit(9)
    assert it.ask("workers", count="1")["ok"] is True
    it.visit(3)
    link = it.link()
    assert it.ask("upgrade")["ok"] is True
    it.visit(3)
    link.close()
    it.wait_lines(path, it.used)
    successor = int(str(it.ask("status")["pid"]))
    os.kill(successor, signal.SIGTERM)


def test_a_killed_worker_loses_its_last_half_second_at_most_and_leaves_no_part_of_a_line(
    logged: Logging, tmp_path: Path
) -> None:
    path = tmp_path / "json"
    it = logged(places((path, "json")), workers=2)
    kept: list[int] = []
    for _ in range(5):
        kept += it.visit(10)
        it.wait_some(path, kept)
        for pid in it.forwarder.workers():
            os.kill(pid, signal.SIGKILL)
    eventually(lambda: len(it.forwarder.workers()) == 2)
    assert it.forwarder.stop() == 0
    found = read_json(path)
    # Not by their ports: on the loopback the kernel gives one out again a second after its end.
    ids = [entry["id"] for entry in found]
    assert len(ids) == len(set(ids))
    assert set(kept) <= {entry["client_port"] for entry in found}


@ROOT
def test_workers_of_nobody_write_where_only_root_may(logged: Logging, tmp_path: Path) -> None:
    """The master opens for them, anew too, in a directory of root's and in one of somebody else."""
    roots, others = tmp_path / "root", tmp_path / "other"
    for directory in (roots, others):
        directory.mkdir(mode=0o700)
    os.chown(others, NOBODY - 1, NOBODY - 1)
    it = logged(places((roots / "json", "json"), (others / "json", "json")), top='user = "nobody"')
    before = it.visit(4)
    for directory in (roots, others):
        it.wait_lines(directory / "json", before)
        (directory / "json").rename(directory / "json.1")
    it.forwarder.signal(signal.SIGUSR1)
    it.forwarder.wait_logged("log.reopened places=2")
    workers = it.forwarder.workers()
    eventually(lambda: not any(has_open(pid, roots / "json.1") for pid in workers))
    after = it.visit(4)
    for directory in (roots, others):
        it.wait_lines(directory / "json", after)
    assert it.forwarder.stop() == 0
    assert not it.forwarder.trouble()


def test_a_flow_that_outlives_its_listener_has_its_line(logged: Logging, tmp_path: Path) -> None:
    """It has settled, its rule is removed, its socket is closed, and then it is silent."""
    path = tmp_path / "json"
    with (
        socket.socket(type=socket.SOCK_DGRAM) as upstream,
        socket.socket(type=socket.SOCK_DGRAM) as client,
    ):
        for sock in (upstream, client):
            sock.bind(("127.0.0.1", 0))
            sock.settimeout(PATIENCE_S)
        host = own_host(1)
        it = logged(places((path, "json")))
        text = it.config.read_text()
        rule = (
            f'[[forwarding_rules]]\nname = "flow"\nlisten = "{host}:5003"\nprotocol = "udp"\n'
            'timeout = 3\nupstream = "{}:{}"\n[[logs]]'.format(*upstream.getsockname())
        )
        assert it.reload(text.replace("[[logs]]", rule))["ok"] is True
        for _ in range(3):
            client.sendto(b"question", (host, 5003))
            upstream.recvfrom(100)
        assert it.reload(text)["ok"] is True
        eventually(lambda: path.read_text() != "")
        (entry,) = read_json(path)
        assert entry["client_port"] == client.getsockname()[1]
    assert (entry["local"], entry["end"]) == (f"{host}:5003", "us/idle")
    assert entry["bytes_c2u"] == 24


# -- what fails


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(path)],
        check=True,
        timeout=PATIENCE_S,
    )
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True, timeout=PATIENCE_S)


@ROOT
def test_a_full_disk_costs_lines_which_are_counted_and_nothing_else(
    logged: Logging, small_disk: Path, tmp_path: Path
) -> None:
    """16 KiB is full after some 50 sessions; then it becomes larger.

    *Result*: whole lines only, as many as are not counted as dropped; another place has them all;
    each worker says once that it fails and once how many lines were lost.
    """
    path, other = small_disk / "json", tmp_path / "json"
    it = logged(places((path, "json"), (other, "json")), workers=2)
    it.visit(120)
    it.wait_lines(other, it.used)
    eventually(lambda: len(read_json(path)) + it.total("log_lines_dropped") == 120)
    dropped = it.total("log_lines_dropped")
    assert 0 < dropped < 120
    failed = [line for line in it.forwarder.lines if "log.failed" in line]
    assert 1 <= len(failed) <= 2
    assert all("No space left on device" in line for line in failed)
    more = ["mount", "-o", "remount,size=16m", str(small_disk)]
    subprocess.run(more, check=True, timeout=PATIENCE_S)

    def all_resumed() -> bool:
        it.visit()
        return sum("log.resumed" in line for line in it.forwarder.lines) == len(failed)

    eventually(all_resumed)
    lost = [re.search(r"(\d+) lines were lost", line) for line in it.forwarder.lines]
    assert sum(int(match[1]) for match in lost if match) == dropped
    assert it.forwarder.stop() == 0
    assert len(read_json(path)) + dropped == len(it.used)


def test_a_file_that_is_removed_is_missed_until_it_is_opened_anew(
    logged: Logging, tmp_path: Path
) -> None:
    path = tmp_path / "json"
    it = logged(places((path, "json")))
    it.visit(3)
    path.unlink()
    it.visit(3)
    it.forwarder.signal(signal.SIGUSR1)
    it.forwarder.wait_logged("log.reopened")
    workers = it.forwarder.workers()
    eventually(lambda: not any(has_open(pid, f"{path} (deleted)") for pid in workers))
    it.wait_lines(path, it.visit(3))
    assert not it.forwarder.trouble()


def test_a_directory_that_is_gone_at_a_reopening_keeps_the_old_file(
    logged: Logging, tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    it = logged(places((here / "json", "json")))
    it.visit(3)
    here.rename(there)
    it.forwarder.signal(signal.SIGUSR1)
    it.forwarder.wait_logged(r"log.reopen: .*No such file .*; going on with the old")
    it.visit(3)
    it.wait_lines(there / "json", it.used)


def test_a_pipe_that_nobody_reads_delays_nobody_and_is_read_later(
    logged: Logging, tmp_path: Path
) -> None:
    """It holds 64 KiB; what is more is dropped and counted.

    *Result*: clients are served meanwhile, another place has every line; what is read later are
    whole lines, and with the next ones it is said how many are missing.
    """
    fifo, other = tmp_path / "fifo", tmp_path / "json"
    os.mkfifo(fifo)
    it = logged(places((fifo, "json"), (other, "json")), workers=2)
    it.visit(300)
    it.wait_lines(other, it.used)
    eventually(lambda: it.total("log_lines_dropped") > 0)
    assert 1 <= sum("log.failed" in line for line in it.forwarder.lines) <= 2
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        received = b""

        def read_all() -> bool:
            nonlocal received
            with contextlib.suppress(BlockingIOError):
                while part := os.read(reader, 1 << 16):
                    received += part
            it.visit(1)
            return any("log.resumed" in line for line in it.forwarder.lines)

        eventually(read_all)
        assert it.forwarder.stop() == 0
        with contextlib.suppress(BlockingIOError):
            while part := os.read(reader, 1 << 16):
                received += part
    finally:
        os.close(reader)
    ids = [entry["id"] for entry in json_lines(received.decode())]
    lost = [re.search(r"(\d+) lines were lost", line) for line in it.forwarder.lines]
    assert len(ids) == len(set(ids))
    assert len(ids) + sum(int(match[1]) for match in lost if match) == len(it.used)


def test_a_pipe_whose_reader_has_gone_is_written_to_again_for_the_next(
    logged: Logging, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    it = logged(places((fifo, "rinetd")), workers=1)
    for _ in range(2):
        with subprocess.Popen(["cat", str(fifo)], stdout=subprocess.PIPE) as reader:
            assert reader.stdout is not None
            it.visit()
            lines = [reader.stdout.readline().decode() for _ in range(2)]
            assert [line.rstrip("\n").split("\t")[-1] for line in lines] == [
                "opened",
                "done-remote-closed",
            ]
            reader.kill()
    assert it.forwarder.stop() == 0
    assert not it.forwarder.trouble()


def test_a_place_that_cannot_be_opened_keeps_the_command_from_starting(
    launch: Launch, tmp_path: Path
) -> None:
    config = tmp_path / "c.toml"
    with reserve_port() as holder:
        at = "{}:{}".format(*holder.getsockname())
        config.write_text(
            f'log_file = "{tmp_path}/no/log"\n[[forwarding_rules]]\nlisten = "{at}"\n'
            'upstream = "127.0.0.1:1"\n'
        )
        forwarder = launch("-c", str(config), expect_ready=False)
        assert forwarder.wait() == 69
    assert any(f"{config}:1:1: cannot write the connection log" in x for x in forwarder.lines)
