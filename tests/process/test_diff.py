"""``forwarder diff``: what a reload would do, told without one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from support.ends import listen
from support.processes import as_nobody, run_command

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.process

OLD = """\
127.0.0.1 {port} 10.0.0.1 80
127.0.0.1 2 10.0.0.1 80
127.0.0.1 3 10.0.0.1 80
"""
NEW = """\
relay = "copy"
[[forwarding_rules]]
listen = "127.0.0.1:{port}"
upstream = "10.0.0.1:80"
[[forwarding_rules]]
listen = "127.0.0.1:2"
upstream = "10.0.0.9:80"
[[forwarding_rules]]
listen = "127.0.0.1:4"
upstream = "10.0.0.1:80"
"""


@pytest.fixture
def files(public_path: Path) -> tuple[str, str]:
    """An old and a new configuration, in two dialects; a port of theirs is taken."""
    old, new = public_path / "old.conf", public_path / "new.toml"
    with listen() as taken:
        port = taken.getsockname()[1]
        old.write_text(OLD.format(port=port))
        new.write_text(NEW.format(port=port))
    old.chmod(0o444)
    new.chmod(0o444)
    return str(old), str(new)


def test_it_says_what_would_come_go_change_and_stay(files: tuple[str, str]) -> None:
    ended = run_command("diff", *files, prefix=as_nobody())
    assert (ended.returncode, ended.stderr) == (1, "")
    assert ended.stdout.splitlines() == [
        "+ tcp 127.0.0.1:4 -> 10.0.0.1:80",
        "- tcp 127.0.0.1:3",
        "~ tcp 127.0.0.1:2",
        "    upstream 10.0.0.1:80 -> 10.0.0.9:80",
        "relay auto -> copy; takes effect at the next start or upgrade",
        "+1 -1 ~1 =1 rules",
    ]


def test_rules_that_stay_are_shown_to_who_asks(files: tuple[str, str]) -> None:
    lines = run_command("diff", "--all", *files).stdout.splitlines()
    assert [line for line in lines if line.startswith("=")] == [lines[4]]
    assert lines[4].startswith("= tcp 127.0.0.1:")


def test_a_rule_that_comes_is_shown_by_name_and_address(tmp_path: Path) -> None:
    old, new = tmp_path / "old.toml", tmp_path / "new.toml"
    old.write_text('[[forwarding_rules]]\nname = "a"\nlisten = ":80"\nupstream = "a:1"\n')
    new.write_text(old.read_text() + old.read_text().replace('"a"', '"b"').replace(":80", ":81"))
    lines = run_command("diff", str(old), str(new)).stdout.splitlines()
    assert lines == ["+ b: tcp [::]:81 -> a:1", "+1 -0 ~0 =1 rules"]


def test_a_program_gets_the_same_as_json(files: tuple[str, str]) -> None:
    ended = run_command("diff", "--json", *files)
    assert (ended.returncode, ended.stderr) == (1, "")
    value = json.loads(ended.stdout)
    assert value["same"] is False
    assert value["added"] == ["tcp 127.0.0.1:4"]
    assert value["removed"] == ["tcp 127.0.0.1:3"]
    assert value["changed"] == {"tcp 127.0.0.1:2": {"upstream": ["10.0.0.1:80", "10.0.0.9:80"]}}
    assert value["settings"] == {"relay": ["auto", "copy"]}
    assert value["needs_restart"] == ["relay"]


def test_nothing_to_do_is_status_0(files: tuple[str, str]) -> None:
    ended = run_command("diff", files[0], files[0])
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[-1] == "+0 -0 ~0 =3 rules"


def test_a_bad_file_is_status_78_with_the_problems_of_both(tmp_path: Path) -> None:
    (tmp_path / "a.conf").write_text("nonsense\n")
    (tmp_path / "b.toml").write_text("worker = 1\n")
    ended = run_command("diff", str(tmp_path / "a.conf"), str(tmp_path / "b.toml"))
    assert (ended.returncode, ended.stdout) == (78, "")
    assert "a.conf:1:1: 'nonsense' is neither" in ended.stderr
    assert "b.toml:1:1: unknown key 'worker'" in ended.stderr


def test_the_format_can_be_told(files: tuple[str, str]) -> None:
    ended = run_command("diff", "--format", "toml", files[1], files[1])
    assert (ended.returncode, ended.stderr) == (0, "")
