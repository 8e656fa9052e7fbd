"""Words that are no command: what is suggested; help in any width; versions by any name."""

from __future__ import annotations

import pytest
from support.processes import run_command

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        *(("top", "status"), ("ps", "sessions"), ("restart", "upgrade"), ("verison", "version")),
        *(("statu", "status"), ("shutdown", "stop"), ("kil", "kill"), ("validate", "check")),
        *(("drain", "upstream drain"), ("servers", "upstream list")),
    ],
)
def test_a_wrong_command_leads_to_the_one_that_is_meant(word: str, meant: str) -> None:
    ended = run_command(word)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.endswith(f"No such command '{word}'; did you mean '{meant}'?\n")


def test_a_word_that_is_like_none_is_told_all_commands() -> None:
    ended = run_command("xyzzy")
    assert ended.returncode == 2
    assert "there are: check, completion, convert" in ended.stderr


@pytest.mark.parametrize("word", ["stip", "shop", "bill"])
def test_no_slip_leads_to_what_ends_sessions(word: str) -> None:
    assert "did you mean" not in run_command(word).stderr


def test_a_slip_in_an_option_of_the_program_itself_is_seen_as_such() -> None:
    ended = run_command("--verison")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "'--verison'" in ended.stderr
    assert "--version" in ended.stderr
    assert "--verbose" not in ended.stderr


def test_control_before_a_command_that_asks_nobody_is_an_error() -> None:
    ended = run_command("--control", "/nowhere", "check")
    assert ended.returncode == 2
    assert "leave out --control" in ended.stderr


def test_control_without_a_path_is_an_error() -> None:
    ended = run_command("--control")
    assert ended.returncode == 2
    assert "'--control' requires an argument" in ended.stderr


def test_the_control_socket_may_stand_before_the_options_of_run() -> None:
    """Result: what `run` says, which has no name here."""
    ended = run_command(
        "--control", "/nowhere/c.sock", "-l", "127.0.0.1:1", "-r", "127.0.0.1:99999"
    )
    assert ended.returncode == 78
    assert "99999" in ended.stderr


@pytest.mark.parametrize("words", [["-V"], ["version"]])
def test_versions_are_shown_by_any_name(words: list[str]) -> None:
    ended = run_command(*words)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[:2] == run_command("--version").stdout.splitlines()[:2]


def test_help_is_a_command_too() -> None:
    assert run_command("help").stdout == run_command("--help").stdout
    assert run_command("help", "kill").stdout == run_command("kill", "--help").stdout
    ended = run_command("help", "stats")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "did you mean 'status'?" in ended.stderr


def test_what_the_commands_do_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ended = run_command("--help")
    summaries = ended.stdout.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert len(summaries) > 10
    assert [line for line in summaries if line.endswith("...")] == []
    assert max(map(len, ended.stdout.splitlines())) <= 80


def test_the_help_has_examples() -> None:
    assert "forwarder -l :8080 -r 10.0.0.1:80" in run_command("--help").stdout
