"""``forwarder check``: what it says, of good files and bad ones, and what it leaves alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from support.ends import listen
from support.names import FakeNames
from support.processes import COMMAND, as_nobody, run_command

from forwarder.cli import check

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

pytestmark = pytest.mark.process

GOOD = """\
workers = 2
relay = "copy"
global_rules = [{ type = "deny", pattern = "10.9.*" }]

[[forwarding_rules]]
name = "web"
listen = "127.0.0.1:PORT"
upstream = ["192.0.2.1:80", "web.example:81"]
source_address = "192.0.2.7"
rules = [{ type = "allow", pattern = "10.0.0.0/8" }]

[[forwarding_rules]]
listen = "192.0.2.9:22"
upstream = "web.example:80"
"""

UNDERSTOOD = ["good.toml: 2 rules, workers 2, relay copy", "global deny 10.9.*"]


def test_it_says_what_it_understood_and_touches_no_port(public_path: Path) -> None:
    """As a user without privilege, with one port taken, one reserved and one address not ours."""
    path = public_path / "good.toml"
    with listen() as taken:
        path.write_text(GOOD.replace("PORT", str(taken.getsockname()[1])))
        path.chmod(0o444)
        ended = run_command("check", "-c", str(path), prefix=as_nobody())
        port = taken.getsockname()[1]
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert [lines[0].rpartition("/")[2], lines[1]] == UNDERSTOOD
    first = f"web: tcp 127.0.0.1:{port} -> 192.0.2.1:80, web.example:81, from 192.0.2.7"
    assert lines[2:4] == [first, "web: allow 10.0.0.0/8"]
    assert lines[4] == "tcp 192.0.2.9:22 -> web.example:80"
    assert lines[5:] == [f"{path}: ok"]


def test_pairs_can_be_checked_too() -> None:
    ended = run_command("check", "-l", "192.0.2.9:22", "-r", "[::1]:22")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "tcp 192.0.2.9:22 -> [::1]:22" in ended.stdout


def test_it_shows_ranges_unix_sockets_and_what_may_wait(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(
        '[[forwarding_rules]]\nname = "a"\nlisten = "127.0.0.1:80-89"\nupstream = "a:180-189"\n'
        'bind = "retry"\n[[forwarding_rules]]\nname = "b"\nlisten = "unix:/run/b"\n'
        'upstream = "unix:@b"\nmode = "0600"\n'
    )
    ended = run_command("check", "-c", str(path))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[1:-1] == [
        "a: tcp 127.0.0.1:80-89 -> a:180-189, may wait for its address",
        "b: tcp unix:/run/b -> unix:@b, mode 0600",
    ]


@pytest.mark.parametrize("words", [["check"], ["run"], []], ids=["check", "run", "short"])
def test_all_problems_are_reported_with_their_places(tmp_path: Path, words: list[str]) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        'worker = 2\nrelay = "slice"\n[[forwarding_rules]]\nlisten = "127.0.0.1"\n'
        '  upstream = "127.0.0.1:99999"\n[[forwarding_rules]]\n'
    )
    ended = run_command(*words, "-c", str(path))
    assert (ended.returncode, ended.stdout) == (78, "")
    lines = ended.stderr.splitlines()
    assert all(re.match(re.escape(str(path)) + r":[0-9]+:[0-9]+: ", line) for line in lines), lines
    places = [tuple(map(int, line[len(str(path)) + 1 :].split(":")[:2])) for line in lines]
    assert {(1, 1), (2, 1), (4, 1), (5, 3), (6, 1)} == set(places)


def test_rinetd_files_are_reported_alike(tmp_path: Path) -> None:
    path = tmp_path / "bad.conf"
    path.write_text("0.0.0.0 80 10.0.0.1 99999\n  allow\n0.0.0.0 81 10.0.0.1\n")
    ended = run_command("check", "-c", str(path))
    assert (ended.returncode, ended.stdout) == (78, "")
    lines = ended.stderr.splitlines()
    places = [line[len(str(path)) + 1 :].split(":")[0] for line in lines]
    assert sorted(places) == ["1", "2", "3"], lines


@pytest.mark.parametrize("words", [["check"], ["run"]], ids=["check", "run"])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "does not exist"),
        ("unreadable", "permission denied"),
        ("empty", "is empty"),
        ("directory", "is a directory"),
        ("device", "is not a regular file"),
        ("latin-1", "byte 0xe9 is not UTF-8"),
        ("below-a-file", "Not a directory"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(
    public_path: Path, kind: str, said: str, words: Sequence[str]
) -> None:
    path = public_path / "some.conf"
    if kind == "unreadable":
        path.touch(0o200 if as_nobody() else 0)
    elif kind == "empty":
        path.write_text("\n")
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to(os.devnull)
    elif kind == "latin-1":
        path.write_bytes(b"# all\nallow caf\xe9\n")
    elif kind == "below-a-file":
        path.touch()
        path /= "some.conf"
    ended = run_command(*words, "-c", str(path), prefix=as_nobody())
    assert (ended.returncode, ended.stdout) == (78, "")
    assert said in ended.stderr
    place = f"{path}:2:10: " if kind == "latin-1" else f"{path}: "
    assert ended.stderr.startswith(place)
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("protocol", ["udp", "udptotcp", "tcptoudp"])
def test_it_shows_what_is_spoken_on_the_two_sides(tmp_path: Path, protocol: str) -> None:
    path = tmp_path / "udp.toml"
    path.write_text(
        '[[forwarding_rules]]\nname = "dns"\nlisten = "127.0.0.1:3"\nupstream = "127.0.0.1:4"\n'
        f'protocol = "{protocol}"\n'
    )
    ended = run_command("check", "-c", str(path))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[1] == f"dns: {protocol} 127.0.0.1:3 -> 127.0.0.1:4"


def test_foot_guns_are_named_by_check_alone(tmp_path: Path) -> None:
    """They are legal, so ``diff``, which reads the file as a reload does, does not mention them."""
    path = tmp_path / "a.conf"
    path.write_text("0.0.0.0 80 127.0.0.1 81\nallow ::1\n0.0.0.0 81 10.0.0.1 80\n")
    ended = run_command("check", "-c", str(path))
    assert ended.returncode == 0
    first, second = ended.stderr.splitlines()
    assert first.startswith(f"{path}:1:1: warning: upstream 127.0.0.1:81 is where the rule")
    assert second.startswith(f"{path}:2:7: warning: allow ::1 matches no client")
    ended = run_command("diff", str(path), str(path))
    assert (ended.returncode, ended.stderr) == (0, "")


def test_ten_thousand_rules_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "many.conf"
    path.write_text("".join(f"127.0.0.1 {port} 10.0.0.1 80\n" for port in range(20_000, 30_000)))
    ended = run_command("check", "-c", str(path))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(ended.stdout.splitlines()) == 10_002


# -- where the text comes from, and what it is written in


@pytest.mark.parametrize("words", [["check", "FILE"], ["check", "-c", "FILE"]], ids=" ".join)
def test_the_file_may_stand_without_an_option(tmp_path: Path, words: list[str]) -> None:
    path = tmp_path / "a.conf"
    path.write_text("0 80 10.0.0.1 80\n")
    ended = run_command(*(str(path) if word == "FILE" else word for word in words))
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[1:] == ["tcp 0.0.0.0:80 -> 10.0.0.1:80", f"{path}: ok"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[[forwarding_rules]]\nlisten = ":80"\nupstream = "a:1"\n', ""),
        ("0.0.0.0 80 10.0.0.1 80\n", ""),
        ('[[forwarding_rules]]\nlisten = ":80"\n', "<stdin>:1:"),
        ("0.0.0.0 80 10.0.0.1 99999\n", "<stdin>:1:21: "),
    ],
    ids=["toml", "rinetd", "bad-toml", "bad-rinetd"],
)
def test_a_dash_is_standard_input_in_either_language(text: str, place: str) -> None:
    ended = subprocess.run(
        [*COMMAND, "check", "-"], input=text, capture_output=True, text=True, check=False
    )
    assert ended.returncode == (78 if place else 0), ended
    assert ended.stderr.startswith(place)
    assert ended.stdout.endswith("" if place else "-: ok\n")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.conf", GOOD, "looks like TOML, and is read as rinetd.conf; hint: --format toml, or a"),
        ("a.yaml", GOOD, "looks like TOML, and is read as rinetd.conf; hint: --format toml"),
        ("a.toml", "0 80 a 80\nallow *\n", "looks like rinetd.conf, and is read as TOML; hint:"),
        ("a.yaml", "rules:\n  - bind: 0.0.0.0:80\n    connect: a:80\n", "looks like YAML, and"),
        ("a.conf", '{\n  "listen": 80\n}\n', "looks like JSON, and is read as rinetd.conf"),
    ],
)
def test_another_language_is_one_problem_and_not_one_for_each_line(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    ended = run_command("check", str(path))
    assert (ended.returncode, ended.stdout) == (78, "")
    assert ended.stderr.startswith(f"{path}: the file {said}")
    assert len(ended.stderr.splitlines()) == 1


def test_a_broken_file_in_its_own_language_is_not_taken_for_another(tmp_path: Path) -> None:
    path = tmp_path / "a.conf"
    path.write_text("0.0.0.0 80 10.0.0.1 99999\nlisten = 80\n0 81 a 0\n")
    assert len(run_command("check", str(path)).stderr.splitlines()) == 3


# -- who can read it


@pytest.mark.skipif(bool(os.geteuid()), reason="is about what root sees")
def test_root_is_warned_of_a_file_that_the_service_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "a.conf"
    path.write_text("0 80 10.0.0.1 80\n")
    path.chmod(0o600)
    ended = run_command("check", str(path))
    assert ended.returncode == 0
    assert f"{path}: warning: only its owner and group can read it: {path} has" in ended.stderr
    assert ended.stdout.endswith(f"{path}: ok, with 1 warning\n")
    path.chmod(0o644)
    assert run_command("check", str(path)).stderr == ""


def test_so_is_who_has_it_in_a_private_directory_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "SERVICES", tmp_path)
    directory = tmp_path / "forwarder"
    directory.mkdir(mode=0o700)
    tmp_path.chmod(0o755)
    path = directory / "a.conf"
    path.touch(0o644)
    (issue,) = check.unreadable(str(path))
    assert f"{directory} has mode 0700" in issue.what
    directory.chmod(0o755)
    assert check.unreadable(str(path)) == []


def test_a_program_gets_the_same_as_json(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('workers = 1\n[[forwarding_rules]]\nlisten = ":80"\nupstream = "a:1"\n')
    found = json.loads(run_command("check", "--json", "--format", "toml", str(path)).stdout)
    assert (found["ok"], found["issues"]) == (True, [])
    rule = {"name": "tcp [::]:80", "protocol": "tcp", "listen": "[::]:80", "upstreams": ["a:1"]}
    assert found["rules"] == [rule | {"group": None}]
    assert found["groups"] == []
    path.write_text("worker = 1\n")
    ended = run_command("check", "--json", str(path))
    found = json.loads(ended.stdout)
    assert (ended.returncode, found["ok"]) == (78, False)
    (unknown, _) = sorted(found["issues"], key=lambda issue: -issue["line"])
    assert (unknown["line"], unknown["severity"]) == (1, "error")
    assert unknown["hint"] == "did you mean workers?"


def test_a_command_that_is_not_there_is_warned_of_once(tmp_path: Path) -> None:
    path, command = tmp_path / "a.toml", tmp_path / "is-up"
    rules = "".join(
        f'[[forwarding_rules]]\nlisten = ":{port}"\nupstream = "10.0.0.1:1"\n'
        f'check = {{ kind = "command", command = ["{command}"] }}\n'
        for port in (80, 81)
    )
    path.write_text("[checks]\ncommands = true\n" + rules)
    warning = f"the check of this rule runs {command}, which is no command here now"
    assert run_command("check", str(path)).stderr.count(warning) == 1
    command.touch(0o600)
    assert run_command("check", str(path)).stderr.count(warning) == 1
    command.chmod(0o700)
    assert run_command("check", str(path)).stderr == ""


def test_json_has_groups_with_all_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(
        '[[forwarding_rules]]\nname = "db"\nlisten = ":80"\nupstream = "group:pg"\n'
        '[[groups]]\nname = "pg"\nservers = ["a:1", { at = "b:1", weight = 3 }]\n'
        'balance = "hash"\nhash_prefix = "24/56"\ncheck = "http://:8008/primary"\n'
    )
    found = json.loads(run_command("check", "--json", str(path)).stdout)
    assert found["rules"][0]["group"] == "pg"
    (group,) = found["groups"]
    assert (group["name"], group["rules"]) == ("pg", ["db"])
    assert (group["balance"], group["hash_prefix"], group["fail"]) == ("hash", "24/56", 3)
    assert group["check"] == "http, port 8008, path /primary"
    assert group["servers"] == [
        {"server": "a:1", "weight": 1, "backup": False, "max_sessions": 0, "expand": False},
        {"server": "b:1", "weight": 3, "backup": False, "max_sessions": 0, "expand": False},
    ]


@pytest.mark.parametrize("where", ["/dev/full", "a closed pipe"])
def test_output_that_goes_nowhere_is_no_internal_error(where: str) -> None:
    """As in ``check | head -1``. Result: not status 0 or 70, no traceback, no call for a report."""
    code = (
        "import os, sys; r, w = os.pipe(); os.dup2(w, 1); os.close(r);"
        "os.execvp(sys.argv[1], sys.argv[1:])"
    )
    prefix = {
        "/dev/full": ["sh", "-c", 'exec "$@" >/dev/full', "sh"],
        "a closed pipe": [sys.executable, "-c", code],
    }[where]
    ended = run_command("check", "-l", "127.0.0.1:1", "-r", "127.0.0.1:2", prefix=prefix)
    assert ended.returncode not in (0, 70), ended
    assert "Traceback" not in ended.stderr
    assert "internal error" not in ended.stderr


def test_names_are_looked_up_if_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Side by side, so that many which are not answered take no longer than one."""
    names = FakeNames(tmp_path / "names", monkeypatch)
    names.give("web.example", "127.0.0.1")
    names.silence(*(f"dead{i}.example" for i in range(20)))
    path = tmp_path / "f.toml"
    upstreams = ", ".join(f'"dead{i}.example:1"' for i in range(20))
    path.write_text(
        '[[forwarding_rules]]\nname = "web"\nlisten = "web.example:1"\n'
        f'upstream = ["127.0.0.1:2", "typo.example:1", {upstreams}]\n'
    )
    plain = run_command("check", str(path))
    assert (plain.returncode, plain.stderr) == (0, "")
    assert not names.asked()
    done = run_command("check", "--names", str(path))
    assert done.returncode == 0
    assert "rule 'web': the name typo.example has no address: Name or service" in done.stderr
    assert done.stderr.count("no answer within 6 s") == 20
    assert "web.example" not in done.stderr
    assert done.stdout.rstrip().endswith("ok, with 21 warnings")
