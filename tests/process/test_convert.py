"""``forwarder convert``: where its result and its report go, and what it leaves alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.processes import as_nobody, run_command

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.process

RULE = "0.0.0.0 8080 10.0.0.1 80 # web\n"
RESULT = '# web\n[[forwarding_rules]]\nlisten = "0.0.0.0:8080"\nupstream = "10.0.0.1:80"\n'


@pytest.fixture
def conf(public_path: Path) -> Path:
    """A rinetd.conf that anybody may read."""
    path = public_path / "rinetd.conf"
    path.write_text(RULE)
    path.chmod(0o444)
    return path


def test_the_result_is_printed_and_the_report_beside_it(conf: Path) -> None:
    ended = run_command("convert", str(conf), prefix=as_nobody())
    assert (ended.returncode, ended.stdout) == (0, RESULT)
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"{conf}: warning: rinetd writes /var/run/rinetd.pid")


def test_the_result_in_a_file_can_be_checked_at_once(conf: Path, tmp_path: Path) -> None:
    path = tmp_path / "forwarder.toml"
    ended = run_command("convert", str(conf), "-o", str(path))
    assert (ended.returncode, ended.stdout) == (0, "")
    assert path.read_text() == RESULT
    assert run_command("check", "-c", str(path)).returncode == 0
    assert run_command("diff", str(conf), str(path)).returncode == 0


def test_a_file_that_is_there_is_not_written_over_unless_forced(conf: Path, tmp_path: Path) -> None:
    path = tmp_path / "forwarder.toml"
    path.write_text("mine\n")
    ended = run_command("convert", str(conf), "-o", str(path))
    assert (ended.returncode, path.read_text()) == (1, "mine\n")
    assert f"{path} exists already; hint: --force" in ended.stderr
    ended = run_command("convert", str(conf), "--force", "-o", str(path))
    assert (ended.returncode, path.read_text()) == (0, RESULT)


def test_a_name_that_would_not_be_read_as_toml_is_told(conf: Path, tmp_path: Path) -> None:
    path = tmp_path / "forwarder.conf"
    ended = run_command("convert", str(conf), "-o", str(path))
    assert ended.returncode == 0
    assert f"check --format toml -c {path}" in ended.stderr


def test_the_format_can_be_told(conf: Path) -> None:
    ended = run_command("convert", "--from", "rinetd-uv", str(conf))
    assert (ended.returncode, ended.stdout) == (0, RESULT)
    assert "rinetd-uv.pid" in ended.stderr


def test_what_cannot_be_converted_is_status_78_and_writes_nothing(tmp_path: Path) -> None:
    path, output = tmp_path / "a.conf", tmp_path / "a.toml"
    path.write_text("nonsense\n")
    ended = run_command("convert", str(path), "-o", str(output))
    assert (ended.returncode, ended.stdout, output.exists()) == (78, "", False)
    assert f"{path}:1:1: 'nonsense' is neither" in ended.stderr


def test_included_files_are_read_relative_to_the_one_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a.conf").write_text("0.0.0.0 81 10.0.0.1 81\n")
    (tmp_path / "uv.conf").write_text(f"{RULE}include parts/*\n")
    ended = run_command("convert", str(tmp_path / "uv.conf"))
    assert ended.returncode == 0
    assert 'listen = "0.0.0.0:81"' in ended.stdout
    assert f"{tmp_path}/parts/a.conf is written in place of its include" in ended.stderr
