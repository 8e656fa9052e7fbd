"""The control socket of the real command: what it answers, and what it survives."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import pytest
from support.ends import Link, accept, carry, connect, listen
from support.forwarder import Forwarder, reserve_port
from support.processes import COMMAND, NOBODY, run_command, state
from support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from process.conftest import Launch

pytestmark = pytest.mark.process


@dataclass
class Controlled:
    """A forwarder of one rule from a file, with a control socket."""

    forwarder: Forwarder
    path: Path
    config: Path
    address: tuple[str, int]
    upstream: socket.socket

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command against it."""
        return run_command(*arguments, "--control", str(self.path))

    def connect(self) -> socket.socket:
        """A client of the control socket."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(PATIENCE_S)
            sock.connect(str(self.path))
        except BaseException:
            sock.close()
            raise
        return sock

    def ask(self, line: bytes) -> dict[str, object]:
        """Send a line, or less, and receive the answer."""
        with self.connect() as sock:
            with contextlib.suppress(BrokenPipeError):
                sock.sendall(line)
            return receive_answer(sock)

    def status(self) -> dict[str, object]:
        """Its status."""
        return self.ask(b'{"op":"status"}\n')

    def link(self) -> Link:
        """A session."""
        client = connect(self.address)
        try:
            return Link(client, accept(self.upstream))
        except BaseException:
            client.close()
            raise


def receive_answer(sock: socket.socket) -> dict[str, object]:
    with sock.makefile("rb") as file:
        answer = json.loads(file.readline())
    assert isinstance(answer, dict)
    return answer


class Control(Protocol):
    """See :func:`control`."""

    def __call__(self, *, more: str = "", top: str = "", workers: int = 2) -> Controlled:
        """Start it."""


@pytest.fixture
def control(launch: Launch, tmp_path: Path) -> Iterator[Control]:
    """Start a forwarder with a control socket; ``more`` is more TOML, of the rule or at ``top``."""
    with contextlib.ExitStack() as stack:

        def start(*, more: str = "", top: str = "", workers: int = 2) -> Controlled:
            address = stack.enter_context(reserve_port()).getsockname()
            upstream = stack.enter_context(listen())
            path, config = tmp_path / "c.sock", tmp_path / "c.toml"
            config.write_text(
                f'control = "{path}"\nworkers = {workers}\n{top}'
                '[[forwarding_rules]]\nname = "one"\n'
                f'listen = "{address[0]}:{address[1]}"\n'
                'upstream = "{}:{}"\n'.format(*upstream.getsockname())
                + more
            )
            forwarder = launch("-c", str(config))
            return Controlled(forwarder, path, config, address, upstream)

        yield start


def rows(status: dict[str, object], key: str) -> list[dict[str, object]]:
    found = status[key]
    assert isinstance(found, list)
    return found


def totals(it: Controlled) -> dict[str, int]:
    found = it.status()["totals"]
    assert isinstance(found, dict)
    return found


# -- commands


def test_reload_returns_what_has_changed(control: Control) -> None:
    it = control()
    with reserve_port() as holder:
        host, port = holder.getsockname()
        text = it.config.read_text()
        it.config.write_text(
            text + f'[[forwarding_rules]]\nlisten = "{host}:{port}"\nupstream = "127.0.0.1:1"\n'
        )
        done = it.run("reload")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "+1 -0 ~0 =1 rules, generation 2\n"


def test_a_bad_reload_returns_every_problem_with_its_place(control: Control) -> None:
    it = control()
    it.config.write_text(it.config.read_text() + 'no_such = 1\nidle_timeout = "x"\n')
    done = it.run("reload")
    assert done.returncode == 1
    assert "c.toml:7:1: unknown key 'no_such'" in done.stderr
    assert "c.toml:8:" in done.stderr
    assert it.status()["generation"] == 1


def test_an_address_that_is_taken_is_reported_to_who_reloads(control: Control) -> None:
    it = control()
    with listen() as taken:
        host, port = taken.getsockname()
        it.config.write_text(
            it.config.read_text()
            + f'[[forwarding_rules]]\nlisten = "{host}:{port}"\nupstream = "127.0.0.1:1"\n'
        )
        done = it.run("reload")
    assert done.returncode == 1
    assert f"{host}:{port}" in done.stderr


def test_two_reloads_at_once_are_both_answered(control: Control) -> None:
    it = control()
    with it.connect() as one, it.connect() as two:
        for sock in (one, two):
            sock.sendall(b'{"op":"reload"}\n')
        answers = [receive_answer(sock) for sock in (one, two)]
    assert [answer["ok"] for answer in answers] == [True, True]
    assert it.status()["generation"] == 3


def test_rules_from_the_command_line_cannot_be_reloaded(launch: Launch, tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    with reserve_port() as holder:
        pair = ("-l", "{}:{}".format(*holder.getsockname()), "-r", "127.0.0.1:1")
        launch(*pair, "--workers", "1", "--control", str(path))
        done = run_command("reload", "--control", str(path))
    assert done.returncode == 1
    assert "command line" in done.stderr


def test_status_counts_what_went_through(control: Control) -> None:
    it = control()
    links = [it.link() for _ in range(5)]
    for link in links:
        carry(link.client, link.upstream, b"u" * 300_000)
        carry(link.upstream, link.client, b"d" * 500)
    for link in links[2:]:
        link.close()
    expected = {"sessions": 2, "sessions_total": 5, "bytes_c2u": 1_500_000, "bytes_u2c": 2500}
    eventually(lambda: expected.items() <= totals(it).items(), lambda: totals(it))
    status = it.status()
    workers, (rule,) = rows(status, "workers"), rows(status, "rules")
    assert sorted(str(worker["pid"]) for worker in workers) == sorted(
        map(str, it.forwarder.workers())
    )
    assert [(w["slot"], w["state"], w["generation"]) for w in workers] == [
        (0, "ready", 1),
        (1, "ready", 1),
    ]
    assert (rule["name"], rule["addresses"]) == ("one", ["{}:{}".format(*it.address)])
    assert (rule["sessions"], rule["sessions_total"], rule["connects_failed"]) == (2, 5, 0)
    for link in links:
        link.close()


def test_a_killed_worker_takes_its_sessions_with_it_but_not_its_counts(control: Control) -> None:
    it = control(workers=1, top="deposit_after = 0\n")
    link = it.link()
    carry(link.client, link.upstream, b"x" * 1000)
    eventually(lambda: totals(it)["bytes_c2u"] == 1000)
    (old,) = it.forwarder.workers()
    os.kill(old, signal.SIGKILL)
    eventually(lambda: [w["pid"] for w in rows(it.status(), "workers")] not in ([], [old]))
    assert totals(it)["bytes_c2u"] == 1000
    assert (totals(it)["sessions"], totals(it)["sessions_total"]) == (0, 1)
    assert rows(it.status(), "rules")[0]["sessions"] == 0
    link.close()


def test_an_upstream_that_refuses_is_counted(control: Control) -> None:
    it = control()
    it.upstream.close()
    with contextlib.suppress(ConnectionResetError), connect(it.address) as client:
        client.recv(1)
    eventually(lambda: rows(it.status(), "rules")[0]["connects_failed"] == 1)


def test_status_is_a_table_or_json(control: Control) -> None:
    it = control()
    text, data = it.run("status"), it.run("status", "--json")
    assert (text.returncode, data.returncode) == (0, 0)
    assert "one" in text.stdout
    assert str(it.forwarder.pid) in text.stdout
    assert json.loads(data.stdout)["pid"] == it.forwarder.pid


@pytest.mark.parametrize(("count", "size"), [("+1", 3), ("-1", 1), ("4", 4), ("2", 2)])
def test_workers_changes_their_number(control: Control, count: str, size: int) -> None:
    it = control()
    done = it.run("workers", count)
    assert (done.returncode, done.stdout) == (0, f"{size} workers\n")
    eventually(lambda: len(it.forwarder.workers()) == size)
    it.link().close()


@pytest.mark.parametrize("count", ["0", "-2", "1025", "many", "+", "99999999999999999999"])
def test_an_impossible_number_of_workers_is_refused(control: Control, count: str) -> None:
    it = control()
    done = it.run("workers", count)
    assert done.returncode == 1
    assert "workers" in done.stderr
    assert len(it.forwarder.workers()) == 2


def test_stop_waits_until_the_last_session_has_ended(control: Control) -> None:
    """Nothing else can be begun meanwhile, and whoever tries is told why."""
    it = control()
    link = it.link()
    stop = subprocess.Popen(
        [*COMMAND, "stop", "--control", str(it.path)], stdout=subprocess.PIPE, text=True
    )
    it.forwarder.wait_logged("master.stopping")
    carry(link.client, link.upstream, b"still")
    assert stop.poll() is None
    for command in (("workers", "3"), ("reload",), ("upgrade",)):
        done = it.run(*command)
        assert (done.returncode, "the forwarder is stopping" in done.stderr) == (1, True)
    link.close()
    assert stop.communicate(timeout=PATIENCE_S)[0].startswith("stopped: 1 ended, 0 reset after ")
    assert (stop.returncode, it.forwarder.wait()) == (0, 0)
    assert not it.path.exists()


# -- where it is, and for whom


def test_without_an_instance_commands_say_so(tmp_path: Path) -> None:
    done = run_command("status", "--control", str(tmp_path / "c.sock"))
    assert done.returncode == 69
    assert "no forwarder runs at" in done.stderr


def test_the_file_is_for_its_user_only_and_goes_at_the_end(control: Control) -> None:
    it = control()
    assert stat.S_IMODE(it.path.stat().st_mode) == 0o600
    assert it.path.stat().st_uid == os.geteuid()
    assert it.forwarder.stop() == 0
    assert not it.path.exists()


def test_the_file_of_a_killed_instance_is_replaced(control: Control) -> None:
    it = control()
    it.forwarder.kill()
    assert it.path.exists()
    assert control().status()["ok"] is True


def test_the_file_of_a_living_instance_is_not(control: Control) -> None:
    it = control()
    with reserve_port() as holder:
        pair = ("-l", "{}:{}".format(*holder.getsockname()), "-r", "127.0.0.1:1")
        done = run_command(*pair, "--workers", "1", "--control", str(it.path))
    assert done.returncode == 69
    assert str(it.path) in done.stderr
    assert it.status()["pid"] == it.forwarder.pid


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("text")
    with reserve_port() as holder:
        pair = ("-l", "{}:{}".format(*holder.getsockname()), "-r", "127.0.0.1:1")
        done = run_command(*pair, "--control", str(path))
    assert (done.returncode, path.read_text()) == (69, "text")


def test_two_instances_share_the_default_directory(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    with reserve_port() as one, reserve_port() as two:
        pids = [
            launch("-l", "{}:{}".format(*at.getsockname()), "-r", "127.0.0.1:1").pid
            for at in (one, two)
        ]
    assert {path.name for path in tmp_path.iterdir()} == {
        "control.sock",
        f"control-{pids[1]}.sock",
    }
    assert json.loads(run_command("status", "--json").stdout)["pid"] == pids[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be somebody else")
def test_another_user_is_denied_even_with_access_to_the_file(
    control: Control, public_path: Path
) -> None:
    it = control()
    path = public_path / "c.sock"
    path.hardlink_to(it.path)
    path.chmod(0o666)
    ask = (
        "import os, socket, sys; os.setgroups([]); os.setgid(int(sys.argv[2]));"
        "os.setuid(int(sys.argv[2])); s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        "print(s.makefile().readline())"
    )
    done = subprocess.run(
        [COMMAND[0], "-c", ask, str(path), str(NOBODY)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["denied"] is True


# -- what it survives


@pytest.mark.parametrize(
    "line",
    [
        b"garbage\n",
        b"\n",
        b"\0\xff\xfe\x80binary\n",
        b"[1, 2]\n",
        b"{}\n",
        b'{"op": 7}\n',
        b'{"op": "no-such"}\n',
        b'{"op": "workers"}\n',
        b'{"op": "workers", "count": {"a": [1]}}\n',
        b"[" * 60_000 + b"\n",
        b"x" * 70_000,
        b"x" * 5_000_000 + b"\n",
    ],
    ids=range(12),
)
def test_what_is_no_request_is_answered_with_an_error(control: Control, line: bytes) -> None:
    it = control(workers=1)
    answer = it.ask(line)
    assert (answer["ok"], bool(answer["error"])) == (False, True)
    assert it.status()["ok"] is True


def test_requests_may_follow_each_other_and_end_with_the_input(control: Control) -> None:
    it = control(workers=1)
    with it.connect() as sock, sock.makefile("rb") as file:
        sock.sendall(b'{"op":"status"}\n{"op":"reload"}\n' * 50)
        sock.shutdown(socket.SHUT_WR)
        answers = [json.loads(line) for line in file]
    assert [answer["ok"] for answer in answers] == [True] * 100
    assert answers[-1]["generation"] == 51


def test_a_silent_client_and_one_that_goes_away_delay_nobody(control: Control) -> None:
    it = control(workers=1)
    with it.connect() as silent:
        silent.sendall(b'{"op":"sta')
        with it.connect() as gone:
            gone.sendall(b'{"op":"reload"}\n')
        eventually(lambda: it.status()["generation"] == 2)
        silent.sendall(b'tus"}\n')
        assert receive_answer(silent)["ok"] is True


def test_of_a_hundred_clients_each_gets_an_answer(control: Control) -> None:
    it = control(workers=1)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(it.connect()) for _ in range(100)]
        for sock in clients:
            with contextlib.suppress(BrokenPipeError):
                sock.sendall(b'{"op":"status"}\n')
        answers = [receive_answer(sock) for sock in clients]
        assert sum(answer["ok"] is True for answer in answers) >= 16
    assert it.status()["ok"] is True
    it.link().close()


def test_a_client_that_never_reads_delays_nobody(control: Control) -> None:
    it = control(workers=1)
    with it.connect() as deaf:
        deaf.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                deaf.send(b'{"op":"status"}\n' * 1000)
        for _ in range(20):
            assert it.status()["ok"] is True
        it.link().close()


def test_it_answers_while_a_worker_is_frozen(control: Control) -> None:
    it = control()
    frozen = it.forwarder.workers()[0]
    os.kill(frozen, signal.SIGSTOP)
    eventually(lambda: state(frozen) == "T")
    assert frozen in [worker["pid"] for worker in rows(it.status(), "workers")]
    os.kill(frozen, signal.SIGCONT)
    assert it.run("reload").returncode == 0
