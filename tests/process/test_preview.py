"""What a reload would change now: `forwarder reload --dry-run`, `forwarder diff` without files."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

import pytest
from support.forwarder import reserve_port
from support.processes import run_command
from support.waiting import PATIENCE_S

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from support.logged import Logged

    from process.conftest import Launch, Logging

pytestmark = pytest.mark.process

WORDS = [("reload", "--dry-run"), ("diff",)]


def run(it: Logged, *words: str) -> subprocess.CompletedProcess[str]:
    return run_command("--control", str(it.control), *words)


def connected(it: Logged) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE_S)
    sock.connect(str(it.control))
    return sock


def generation(it: Logged) -> object:
    return it.ask("status")["generation"]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_it_says_what_would_change_and_changes_nothing(
    logged: Logging, words: tuple[str, ...]
) -> None:
    it = logged("")
    text = it.config.read_text()
    with reserve_port() as holder:
        host, port = holder.getsockname()
        it.config.write_text(
            f'{text}\nconnect_timeout = "3s"\n[[forwarding_rules]]\nname = "new"\n'
            f'listen = "{host}:{port}"\nupstream = "10.0.0.1:80"\n'
        )
        done = run(it, *words)
    assert done.stderr == ""
    assert done.stdout.splitlines()[0] == f"+ new: tcp {host}:{port} -> 10.0.0.1:80"
    assert done.returncode == (1 if words == ("diff",) else 0)
    assert generation(it) == 1
    it.link().close()


def test_nothing_to_do_is_status_0(logged: Logging) -> None:
    it = logged("")
    done = run(it, "diff")
    assert (done.returncode, done.stdout, done.stderr) == (0, "+0 -0 ~0 =1 rules\n", "")
    assert run(it, "diff", "--all").stdout.startswith("= one\n")
    assert json.loads(run(it, "diff", "--json").stdout)["same"] is True


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_a_bad_file_is_told_with_every_problem(logged: Logging, words: tuple[str, ...]) -> None:
    it = logged("")
    it.config.write_text(it.config.read_text() + '\nno_such = 1\nidle_timeout = "x"\n')
    done = run(it, *words)
    assert (done.returncode, done.stdout) == (78, "")
    assert "unknown key 'no_such'" in done.stderr
    assert "idle_timeout" in done.stderr
    assert generation(it) == 1


def test_many_ask_at_once_and_all_are_answered_beside_a_reload(logged: Logging) -> None:
    it = logged("")
    clients = [connected(it) for _ in range(10)]
    for sock in clients[:-1]:
        sock.sendall(b'{"op":"preview"}\n')
    clients[-1].sendall(b'{"op":"reload"}\n')
    for sock in clients:
        with sock, sock.makefile("rb") as file:
            assert json.loads(file.readline())["ok"] is True
    assert generation(it) == 2


def test_rules_of_the_command_line_have_nothing_to_compare(launch: Launch, tmp_path: Path) -> None:
    path = str(tmp_path / "c.sock")
    with reserve_port() as holder:
        pair = ("-l", "{}:{}".format(*holder.getsockname()), "-r", "127.0.0.1:1")
        launch(*pair, "--workers", "1", "--control", path)
        for words in WORDS:  # status 1 of diff would mean that something would change
            done = run_command("--control", path, *words)
            assert (done.returncode, done.stdout) == (69, "")
            assert "the rules came from the command line" in done.stderr


def test_one_file_alone_is_refused() -> None:
    done = run_command("diff", "x.toml")
    assert done.returncode == 2
    assert "give OLD and NEW, or neither" in done.stderr
