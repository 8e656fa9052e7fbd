"""The state file: whole or not at all, written by a child; a disk that fails costs a warning."""

from __future__ import annotations

import os
import selectors
import stat
import time
from typing import TYPE_CHECKING

import pytest
from support.waiting import PATIENCE_S

from forwarder.supervision import statefile
from forwarder.supervision.statefile import StateFile, read, replace

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Bench:
    """A state file and the turns of its master."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.selector = selectors.DefaultSelector()
        self.file = StateFile(self.selector)
        self.file.use(str(path))
        self.said: list[str] = []

    def keep(self, text: bytes) -> None:
        self.file.keep(text, self.said.append)

    def wait(self, count: int) -> list[str]:
        """Turn until so many have an answer."""
        until = time.monotonic() + PATIENCE_S
        while len(self.said) < count and time.monotonic() < until:
            for key, _ in self.selector.select(0.05):
                key.data()
            self.file.turn(time.monotonic())
        self.reap()
        return self.said

    def reap(self) -> None:
        """What the master does at SIGCHLD."""
        while True:
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                return


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    it = Bench(tmp_path / "state.json")
    yield it
    it.file.close()
    it.reap()
    it.selector.close()


def test_a_text_is_kept_and_only_its_owner_may_read_it(bench: Bench) -> None:
    bench.keep(b"one")
    assert bench.wait(1) == [""]
    assert read(str(bench.path)) == b"one"
    assert stat.S_IMODE(bench.path.stat().st_mode) == 0o600
    assert list(bench.path.parent.iterdir()) == [bench.path]


def test_of_texts_that_come_while_one_is_written_the_last_is_kept(bench: Bench) -> None:
    for number in range(20):
        bench.keep(f"text {number}".encode())
    assert bench.wait(20) == [""] * 20
    assert bench.path.read_bytes() == b"text 19"


def test_without_a_path_nothing_is_kept_and_all_is_well(bench: Bench) -> None:
    assert bench.file.use(None)
    bench.keep(b"x")
    assert bench.said == [""]
    assert not bench.path.exists()
    assert bench.file.deadline == float("inf")


def test_where_nothing_can_be_written_the_answer_says_so_and_the_log_once(
    bench: Bench, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    bench.file.use(str(tmp_path / "nowhere" / "state"))
    for number in range(3):
        bench.keep(b"x")
        bench.wait(number + 1)
    assert len(set(bench.said)) == 1
    assert "No such file or directory" in bench.said[0]
    assert [it.message for it in caplog.records if "state.failed" in it.message] == [
        f"state.failed cannot write {tmp_path}/nowhere/state: No such file or directory; "
        "going on without, next try in 30 s"
    ]
    # It is tried again, and works once it can.
    (tmp_path / "nowhere").mkdir()
    assert bench.file.deadline is not None
    bench.file.turn(bench.file.deadline)
    bench.keep(b"y")
    assert bench.wait(4)[-1] == ""
    assert (tmp_path / "nowhere" / "state").read_bytes() == b"y"
    assert bench.file.problem == ""


def test_a_failure_is_tried_again_by_itself(bench: Bench, tmp_path: Path) -> None:
    bench.file.use(str(tmp_path / "later" / "state"))
    bench.keep(b"x")
    bench.wait(1)
    (tmp_path / "later").mkdir()
    deadline = bench.file.deadline
    assert deadline is not None
    assert deadline > time.monotonic()
    bench.file.turn(deadline)
    bench.file.close()  # waits for it
    bench.reap()
    assert (tmp_path / "later" / "state").read_bytes() == b"x"


def test_the_end_of_a_master_waits_for_what_is_being_written(bench: Bench) -> None:
    bench.keep(b"first")
    bench.keep(b"last")
    bench.file.close()
    bench.reap()
    assert bench.path.read_bytes() == b"last"


def test_a_disk_that_hangs_holds_nobody_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    read_fd, write_fd = os.pipe()
    monkeypatch.setattr(statefile, "keep_only", lambda _: os.close(write_fd))
    monkeypatch.setattr(statefile, "replace", lambda *_: os.read(read_fd, 1))
    monkeypatch.setattr(statefile, "CLOSE_S", 0.01)
    bench.keep(b"x")
    deadline = bench.file.deadline
    assert deadline is not None
    bench.file.turn(deadline)
    assert bench.said == [f"{bench.path} is still being written"]
    bench.file.close()
    os.close(write_fd)  # the disk is back
    bench.reap()
    os.close(read_fd)


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"of somebody else")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    replace(str(tmp_path / "link"), b"ours")
    assert (tmp_path / "other").read_bytes() == b"of somebody else"
    assert (tmp_path / "link").read_bytes() == b"ours"


def test_what_is_no_file_of_ours_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read(str(tmp_path / "none")) == b""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="not a regular file"):
        read(str(tmp_path / "fifo"))
    with pytest.raises(ValueError, match="not a regular file"):
        read(str(tmp_path))
    monkeypatch.setattr(statefile, "MOST_BYTES", 1 << 20)
    (tmp_path / "long").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(ValueError, match="more than 1 MiB"):
        read(str(tmp_path / "long"))


def test_a_place_that_cannot_be_written_to_is_known_before(tmp_path: Path) -> None:
    assert statefile.complaint(str(tmp_path / "state")) == ""
    assert statefile.complaint("state") == ""
    missing = str(tmp_path / "none" / "state")
    assert statefile.complaint(missing) == f"{tmp_path}/none: No such file or directory"
    (tmp_path / "file").touch()
    assert statefile.complaint(str(tmp_path / "file" / "state")).endswith("file: Not a directory")
    (tmp_path / "state").mkdir()
    assert statefile.complaint(str(tmp_path / "state")).endswith("state: Is a directory")
    assert statefile.complaint("/proc/self/state") != ""
