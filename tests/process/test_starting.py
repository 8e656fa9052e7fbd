"""Starts that must fail, wholly and with a reason; pid files; very many rules."""

from __future__ import annotations

import os
import resource
import signal
from typing import TYPE_CHECKING

import pytest
from support.ends import accept, carry, connect, listen
from support.forwarder import reserve_port
from support.names import FakeNames
from support.processes import as_nobody, listeners, members, run_command
from support.waiting import PATIENCE_S, eventually

from forwarder.stats.board import BOARD_BYTES
from process.conftest import as_pairs, stop

if TYPE_CHECKING:
    import socket
    import subprocess
    from collections.abc import Sequence
    from pathlib import Path

    from process.conftest import Launch, Serve

pytestmark = pytest.mark.process


def write_rules(path: Path, *rules: tuple[str, str, tuple[str, int]], more: str = "") -> Path:
    """A TOML file; each rule is a name, a listening host and port as text, and its upstream."""
    parts = [more] if more else []
    for name, where, (host, port) in rules:
        parts.append(
            f'[[forwarding_rules]]\nname = "{name}"\nlisten = "{where}"\n'
            f'upstream = "{host}:{port}"\n'
        )
    path.write_text("\n".join(parts))
    return path


def assert_refused(ended: subprocess.CompletedProcess[str], code: int, *said: str) -> None:
    assert ended.returncode == code, ended
    for text in said:
        assert text in ended.stderr, ended.stderr
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert ended.stdout == ""


# -- addresses


def test_an_address_that_another_program_has_stops_everything(
    tmp_path: Path, upstream: socket.socket
) -> None:
    """The second of three rules cannot listen. Result: none does, and the program is not hurt."""
    target = upstream.getsockname()
    with reserve_port() as first, reserve_port() as third, listen() as taken:
        free = [first.getsockname(), third.getsockname()]
        where = ["{}:{}".format(*a) for a in (free[0], taken.getsockname(), free[1])]
        rules = [(f"rule {n}", text, target) for n, text in enumerate(where)]
        path = write_rules(tmp_path / "taken.toml", *rules)
        ended = run_command("-c", str(path), "--workers", "3", prefix=["setsid"])
        assert_refused(
            ended,
            69,
            f"{path}:6:1: rule 'rule 1' ",
            where[1],
            "Address already in use",
            "ss -lntup",
        )
        assert [listeners(address) for address in free] == [0, 0]
        assert listeners(taken.getsockname()) == 1
        with connect(taken.getsockname()) as client, accept(taken) as far:
            carry(client, far, b"still mine")


def test_a_second_forwarder_does_not_join_the_first(serve: Serve) -> None:
    """Both use SO_REUSEPORT, so the kernel alone would let them share the clients."""
    service = serve(workers=2)
    ended = run_command(*service.pairs, "--workers", "2")
    assert_refused(ended, 69, "{}:{}".format(*service.address), "Address already in use")
    assert listeners(service.address) == 2
    for _ in range(10):
        service.assert_serves()
    assert service.stop() == 0


def test_of_many_that_start_at_once_at_most_one_serves(
    launch: Launch, address: tuple[str, int], upstream: socket.socket
) -> None:
    arguments = [*as_pairs(address, upstream), "--workers", "2"]
    started = [launch(*arguments, expect_ready=False) for _ in range(4)]

    def is_settled() -> bool:
        return all(
            f.process.poll() is not None or any("master.ready" in line for line in f.lines)
            for f in started
        )

    eventually(is_settled)
    serving = [f for f in started if f.process.poll() is None]
    assert len(serving) <= 1
    assert listeners(address) == 2 * len(serving)
    for forwarder in started:
        is_serving = forwarder in serving
        code = stop(forwarder, signal.SIGTERM) if is_serving else forwarder.wait()
        assert code == (0 if is_serving else 69), forwarder.lines


def test_an_address_of_another_host_is_refused() -> None:
    ended = run_command("-l", "192.0.2.1:4000", "-r", "127.0.0.1:1")
    assert_refused(ended, 69, "192.0.2.1:4000", "Cannot assign requested address", "ip address")


def test_a_name_that_means_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeNames(tmp_path / "names", monkeypatch)
    ended = run_command("-l", "no-such-host.invalid:4000", "-r", "127.0.0.1:1")
    assert ended.returncode == 69
    assert "cannot listen on no-such-host.invalid:4000: " in ended.stderr.splitlines()[-1]


def test_a_reserved_port_needs_privilege(public_path: Path) -> None:
    """In a network of its own, where ports below 1024 are reserved whatever the host has set."""
    path = write_rules(public_path / "low.toml", ("low", "0.0.0.0:80", ("127.0.0.1", 1)))
    namespace = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--net"]
    ended = run_command("-c", str(path), prefix=[*namespace, *as_nobody()])
    place = f"{path}:1:1: rule 'low' cannot listen on 0.0.0.0:80: Permission denied"
    assert_refused(ended, 77, place, "CAP_NET_BIND_SERVICE")


def test_two_names_of_one_address_are_not_two_listeners(
    tmp_path: Path, upstream: socket.socket
) -> None:
    """localhost is 127.0.0.1. Result: refused, naming both; never one rule without its clients."""
    with reserve_port() as holder:
        port = holder.getsockname()[1]
        target = upstream.getsockname()
        path = write_rules(
            tmp_path / "twice.toml",
            ("by name", f"localhost:{port}", target),
            ("by number", f"127.0.0.1:{port}", target),
        )
        ended = run_command_for_a_while("-c", str(path), "--workers", "1")
    assert ended.returncode in (69, 78), ended.stderr
    assert "by name" in ended.stderr
    assert "by number" in ended.stderr


def run_command_for_a_while(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command that should end by itself; one that serves is ended by SIGINT."""
    after = f"{2 * PATIENCE_S:.0f}"
    return run_command(*arguments, prefix=["timeout", "--signal=INT", "--preserve-status", after])


# -- pid files


def with_pid_file(path: Path, pid_file: Path, address: tuple[str, int]) -> Path:
    where = "{}:{}".format(*address)
    return write_rules(path, ("only", where, ("127.0.0.1", 1)), more=f'pid_file = "{pid_file}"')


def test_a_pid_file_on_a_full_disk_is_a_reason_not_to_start(
    tmp_path: Path, address: tuple[str, int]
) -> None:
    """Result: status 69, the file named; it is not left empty, and the port is free."""
    pid_file = tmp_path / "some.pid"
    path = with_pid_file(tmp_path / "forwarder.toml", pid_file, address)
    done = run_command("-c", str(path), prefix=["prlimit", "--fsize=0:"])
    assert done.returncode == 69, done.stderr
    assert f"pid file {pid_file}: File too large; hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not pid_file.exists()
    assert listeners(address) == 0


def test_a_limit_of_file_sizes_for_logs_is_none_for_shared_memory(
    launch: Launch, tmp_path: Path, address: tuple[str, int]
) -> None:
    """It is the soft one, which is in force again afterwards; a worker can be replaced, too."""
    path = tmp_path / "forwarder.toml"
    write_rules(path, ("only", "{}:{}".format(*address), ("127.0.0.1", 1)))
    forwarder = launch("-c", str(path), "--workers", "1", prefix=["prlimit", "--fsize=1000000:"])
    assert resource.prlimit(forwarder.pid, resource.RLIMIT_FSIZE)[0] == 1_000_000
    (worker,) = forwarder.workers()
    os.kill(worker, signal.SIGKILL)
    forwarder.wait_logged(rf"worker.ready slot=0 pid=(?!{worker}\b)")


def test_a_limit_of_file_sizes_without_room_for_shared_memory_is_a_reason_not_to_start(
    tmp_path: Path, address: tuple[str, int]
) -> None:
    path = tmp_path / "forwarder.toml"
    write_rules(path, ("only", "{}:{}".format(*address), ("127.0.0.1", 1)))
    done = run_command("-c", str(path), prefix=["prlimit", "--fsize=9000000:9000000"])
    assert done.returncode == 69
    assert f"takes {BOARD_BYTES} bytes, the limit of file sizes is 9000000; hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert listeners(address) == 0


def test_a_pid_file_holds_one_instance_and_goes_with_it(
    launch: Launch, tmp_path: Path, address: tuple[str, int]
) -> None:
    """A second instance has another port and the same pid file. Result: status 69, the pid named.

    What a crash has left in the file is no hindrance.
    """
    pid_file = tmp_path / "some.pid"
    pid_file.write_text("99999999  \n")
    path = with_pid_file(tmp_path / "first.toml", pid_file, address)
    forwarder = launch("-c", str(path))
    assert pid_file.read_text() == f"{forwarder.pid}\n"
    with reserve_port() as other:
        second = with_pid_file(tmp_path / "second.toml", pid_file, other.getsockname())
        ended = run_command("-c", str(second))
        assert_refused(ended, 69, str(pid_file), f"pid {forwarder.pid}")
        assert listeners(other.getsockname()) == 0
    assert pid_file.read_text() == f"{forwarder.pid}\n"
    assert stop(forwarder, signal.SIGTERM) == 0
    assert not pid_file.exists()


def test_a_pid_file_goes_when_the_start_fails(tmp_path: Path) -> None:
    pid_file = tmp_path / "some.pid"
    with listen() as taken:
        path = with_pid_file(tmp_path / "some.toml", pid_file, taken.getsockname())
        assert_refused(run_command("-c", str(path)), 69, "Address already in use")
    assert not pid_file.exists()


def test_a_pid_file_of_a_killed_master_is_free_for_the_next(
    launch: Launch, tmp_path: Path, address: tuple[str, int], upstream: socket.socket
) -> None:
    """Also while the workers of the killed one still have a session."""
    pid_file = tmp_path / "some.pid"
    path = write_rules(
        tmp_path / "some.toml",
        ("only", "{}:{}".format(*address), upstream.getsockname()),
        more=f'pid_file = "{pid_file}"',
    )
    first = launch("-c", str(path), "--workers", "2")
    with connect(address) as client, accept(upstream) as far:
        first.process.kill()
        first.process.wait()
        second = launch("-c", str(path), "--workers", "2")
        assert pid_file.read_text() == f"{second.pid}\n"
        carry(client, far, b"still here")
    eventually(lambda: not members(first.pid))
    assert pid_file.read_text() == f"{second.pid}\n"
    assert stop(second, signal.SIGTERM) == 0
    assert not pid_file.exists()


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("missing/some.pid", 69, "No such file or directory"),
        ("", 69, "Is a directory"),
        ("file/some.pid", 69, "Not a directory"),
        ("closed/some.pid", 77, "Permission denied"),
    ],
)
def test_a_pid_file_that_cannot_be_written_says_why(
    public_path: Path, address: tuple[str, int], name: str, code: int, said: str
) -> None:
    (public_path / "file").touch()
    (public_path / "closed").mkdir(0o555)
    path = with_pid_file(public_path / "some.toml", public_path / name, address)
    ended = run_command("-c", str(path), prefix=as_nobody())
    assert_refused(ended, code, f"pid file {public_path / name}".rstrip("/"), said)
    assert listeners(address) == 0


def test_a_pid_file_that_is_no_file_is_refused_and_stays(
    tmp_path: Path, address: tuple[str, int]
) -> None:
    """As /dev/null, which somebody names who wants none and root would remove."""
    fifo = tmp_path / "some.pid"
    os.mkfifo(fifo)
    path = with_pid_file(tmp_path / "some.toml", fifo, address)
    ended = run_command("-c", str(path))
    assert_refused(ended, 69, f"pid file {fifo} is not a regular file; hint: ")
    assert fifo.is_fifo()
    assert listeners(address) == 0


# -- ten thousand rules


@pytest.fixture
def ten_thousand(tmp_path: Path, any_address: tuple[str, int], upstream: socket.socket) -> Path:
    path = tmp_path / "many.conf"
    line = "127.2.{}.{} {} {} {}\n"
    target = upstream.getsockname()
    rules = [line.format(n // 200, n % 200 + 1, any_address[1], *target) for n in range(10_000)]
    path.write_text("".join(rules))
    return path


def test_ten_thousand_rules_are_served(
    launch: Launch, ten_thousand: Path, any_address: tuple[str, int], upstream: socket.socket
) -> None:
    """Also by the worker that replaces a killed one."""
    forwarder = launch("-c", str(ten_thousand), "--workers", "1")
    for _ in range(2):
        for host in ("127.2.0.1", "127.2.25.100", "127.2.49.200"):
            with connect((host, any_address[1])) as client, accept(upstream) as far:
                carry(client, far, b"there")
        os.kill(forwarder.workers()[0], signal.SIGKILL)
    eventually(lambda: sum("worker.ready" in line for line in forwarder.lines) == 3)
    assert stop(forwarder, signal.SIGTERM) == 0


@pytest.mark.parametrize("limit", ["500:500", "500:700"])
def test_too_few_descriptors_for_all_rules_say_so(ten_thousand: Path, limit: str) -> None:
    lines = ten_thousand.read_text().splitlines(keepends=True)
    ten_thousand.write_text("".join(lines[:1000]))
    ended = run_command("-c", str(ten_thousand), prefix=["prlimit", f"--nofile={limit}"])
    assert_refused(ended, 69, "1000 addresses", "open files", "ulimit -n")


def test_the_soft_limit_of_descriptors_is_no_limit(
    launch: Launch, tmp_path: Path, any_address: tuple[str, int], upstream: socket.socket
) -> None:
    path = tmp_path / "some.conf"
    target = upstream.getsockname()
    hosts: Sequence[str] = [f"127.3.0.{n}" for n in range(1, 101)]
    path.write_text("".join("{} {} {} {}\n".format(h, any_address[1], *target) for h in hosts))
    forwarder = launch("-c", str(path), "--workers", "2", prefix=["prlimit", "--nofile=64:2000"])
    for host in hosts[::33]:
        with connect((host, any_address[1])) as client, accept(upstream) as far:
            carry(client, far, b"there")
    assert stop(forwarder, signal.SIGTERM) == 0
