"""Files with which rinetd 0.73 starts: this program does so, too, and says what is odd about them.

docs/migration/rinetd.md has them as differences. Each is tried on rinetd itself.
"""

from __future__ import annotations

import signal
import subprocess
from functools import partial
from typing import TYPE_CHECKING

import pytest
from support.ends import accept, connect, listen
from support.forwarder import reserve_port
from support.processes import run_command
from support.programs import debian
from support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator
    from pathlib import Path

    from process.conftest import Launch

pytestmark = pytest.mark.process

RULE = b"127.0.0.1 %d 127.0.0.1 %d"
# The file, with RULE for @; what this program says of it.
FILES = {
    "no rule": (b"# none yet\n", "there is no forwarding rule, so nothing is forwarded"),
    "latin-1 comment": (b"# caf\xe9\n@ # caf\xe9\n", "this comment, and 1 more is not UTF-8"),
    "no log directory": (b"@\nlogfile DIR/no/x.log\n", "log.failed"),
    "no pid directory": (b"@\npidlogfile DIR/no/x.pid\n", "pidfile.failed"),
    "no line end": (b"@\n@", "the last line does not end: rinetd 0.73 ignores it"),
}


@pytest.fixture
def ports() -> Iterator[tuple[int, int, socket.socket]]:
    """Two free ports to listen on, and an upstream."""
    with reserve_port() as first, reserve_port() as second, listen() as upstream:
        yield first.getsockname()[1], second.getsockname()[1], upstream


def write(
    path: Path, name: str, ports: tuple[int, int, socket.socket], **instead: bytes
) -> list[int]:
    """Write one of FILES; returns the ports that its rules have."""
    content = instead.get("content") or FILES[name][0]
    used = []
    for port in ports[:2]:
        if b"@" in content:
            content = content.replace(b"@", RULE % (port, ports[2].getsockname()[1]), 1)
            used.append(port)
    path.write_bytes(content.replace(b"DIR", str(path.parent).encode()))
    return used


@pytest.mark.parametrize("name", FILES)
def test_it_starts_and_says_what_is_odd(
    launch: Launch, tmp_path: Path, ports: tuple[int, int, socket.socket], name: str
) -> None:
    path = tmp_path / "r.conf"
    used = write(path, name, ports)
    forwarder = launch("-c", str(path), "--workers", "1")
    assert any(FILES[name][1] in line for line in forwarder.lines), forwarder.lines
    for port in used:
        with connect(("127.0.0.1", port)), accept(ports[2]):
            pass
    # Those of the log and the pid file are no fault of the text.
    if "directory" not in name:
        ended = run_command("check", str(path))
        assert (ended.returncode, FILES[name][1] in ended.stderr) == (0, True)


@debian("rinetd")
@pytest.mark.parametrize("name", FILES)
def test_rinetd_starts_with_it_and_listens_but_for_a_last_line_without_end(
    tmp_path: Path, ports: tuple[int, int, socket.socket], name: str
) -> None:
    """Where the file has no rule, one is put behind it, to see that what is before it stands."""
    path = tmp_path / "r.conf"
    used = write(path, name, ports)
    with subprocess.Popen(["rinetd", "-f", "-c", str(path)], stderr=subprocess.PIPE) as rinetd:
        try:
            assert rinetd.stderr is not None
            said = rinetd.stderr.readline()
            while b"starting" not in said:
                assert said, "it has ended"
                said = rinetd.stderr.readline()
            for port in used[:1]:
                eventually(partial(is_listening, port))
            for port in used[1:]:
                assert not is_listening(port)
            assert rinetd.poll() is None
        finally:
            rinetd.send_signal(signal.SIGKILL)
            rinetd.wait(PATIENCE_S)


def is_listening(port: int) -> bool:
    try:
        connect(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


def test_the_last_rule_of_all_may_go_by_a_reload(
    launch: Launch, tmp_path: Path, ports: tuple[int, int, socket.socket]
) -> None:
    path, control = tmp_path / "r.conf", tmp_path / "c.sock"
    (port,) = write(path, "", ports, content=b"@\n")
    launch("-c", str(path), "--workers", "1", "--control", str(control))
    write(path, "no rule", ports)
    done = run_command("reload", "--control", str(control))
    assert done.stdout == "+0 -1 ~0 =0 rules, generation 2\n"
    eventually(lambda: not is_listening(port))


def test_a_file_without_anything_is_refused_for_it_may_be_half_written(tmp_path: Path) -> None:
    path = tmp_path / "r.conf"
    path.touch()
    ended = run_command("check", str(path))
    assert ended.returncode == 78
    assert "the file is empty" in ended.stderr


def test_bytes_that_are_not_utf8_outside_of_a_comment_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.conf"
    path.write_bytes(b"# caf\xe9\nlogfile /var/log/caf\xe9.log\n")
    ended = run_command("check", str(path))
    assert ended.returncode == 78
    assert ended.stderr.startswith(f"{path}:2:21: ")


def test_a_log_comes_when_its_directory_does(
    launch: Launch, tmp_path: Path, ports: tuple[int, int, socket.socket]
) -> None:
    path, control = tmp_path / "r.conf", tmp_path / "c.sock"
    (port,) = write(path, "no log directory", ports)
    launch("-c", str(path), "--workers", "1", "--control", str(control))
    (tmp_path / "no").mkdir()
    assert run_command("reload", "--control", str(control)).returncode == 0
    with connect(("127.0.0.1", port)), accept(ports[2]):
        pass
    eventually(lambda: (tmp_path / "no" / "x.log").read_text() != "")
