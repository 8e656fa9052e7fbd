"""`forwarder sessions` and `forwarder kill`: names that are not there, and asking before an end."""

from __future__ import annotations

import os
import pty
import subprocess
from typing import TYPE_CHECKING

import pytest
from support.ends import receive_to_reset
from support.processes import COMMAND, run_command
from support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    from support.ends import Link
    from support.logged import Logged

    from process.conftest import Logging

pytestmark = pytest.mark.process


@pytest.fixture
def it(logged: Logging, links: list[Link]) -> Logged:
    """A rule called `one` with three sessions."""
    it = logged("")
    links += [it.link() for _ in range(3)]
    eventually(lambda: it.rule()["sessions"] == 3)
    return it


def run(it: Logged, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_command(*arguments, "--control", str(it.control))


def at_a_terminal(it: Logged, answer: bytes, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command whose standard input is a terminal, at which an answer is typed."""
    ours, theirs = pty.openpty()
    try:
        os.write(ours, answer)
        return subprocess.run(
            [*COMMAND, *arguments, "--control", str(it.control)],
            stdin=theirs,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
    finally:
        os.close(theirs)
        os.close(ours)


# -- what is not there


@pytest.mark.parametrize("words", [("sessions",), ("kill", "--yes"), ("kill", "--dry-run")])
def test_a_rule_that_is_not_there_is_an_error_with_the_nearest_name(
    it: Logged, words: tuple[str, ...]
) -> None:
    done = run(it, *words, "--rule", "onne")
    assert done.returncode == 1
    assert "no rule is called 'onne'; hint: did you mean 'one'?" in done.stderr


def test_a_rule_that_is_like_no_other_is_told_which_there_are(it: Logged) -> None:
    done = run(it, "sessions", "--rule", "zzz")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "forwarder: no rule is called 'zzz'; hint: there are: one\n"


def test_a_rule_without_sessions_is_no_error(it: Logged) -> None:
    assert run(it, "kill", "--rule", "one", "--yes").stdout == "3 ended\n"
    eventually(lambda: it.rule()["sessions"] == 0)
    done = run(it, "sessions", "--rule", "one")
    assert (done.returncode, done.stderr) == (0, "")
    done = run(it, "kill", "--rule", "one")
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 ended\n", "")


def test_a_session_that_is_not_there_is_an_error_and_the_others_end(it: Logged) -> None:
    (worker, *_) = it.forwarder.workers()
    done = run(it, "sessions", "--json")
    first = done.stdout.split('"id": "')[1].partition('"')[0]
    done = run(it, "kill", first, f"{worker}.99999")
    assert (done.returncode, done.stdout) == (1, "1 ended\n")
    assert f"no open session is called {worker}.99999; hint: " in done.stderr


# -- asking first


@pytest.mark.parametrize(
    "choice", [("--rule", "one"), ("--client", "*"), ("--client", "127.0.0.0/8")], ids=" ".join
)
def test_without_a_terminal_a_wide_choice_wants_to_be_confirmed(
    it: Logged, choice: tuple[str, str]
) -> None:
    done = run(it, "kill", *choice)
    assert (done.returncode, done.stdout) == (2, "")
    assert "this would end 3 sessions; hint: --yes ends them" in done.stderr
    assert it.rule()["sessions"] == 3
    done = run(it, "kill", *choice, "--yes")
    assert (done.returncode, done.stdout) == (0, "3 ended\n")


def test_at_a_terminal_it_asks_and_a_no_ends_nothing(it: Logged) -> None:
    done = at_a_terminal(it, b"n\n", "kill", "--rule", "one")
    assert (done.returncode, done.stdout) == (1, "")
    assert "End 3 sessions? [y/N]" in done.stderr
    assert it.rule()["sessions"] == 3


def test_at_a_terminal_a_yes_ends_them(it: Logged, links: list[Link]) -> None:
    done = at_a_terminal(it, b"y\n", "kill", "--rule", "one")
    assert (done.returncode, done.stdout) == (0, "3 ended\n")
    for link in links:
        receive_to_reset(link.client)


def test_one_client_is_ended_without_asking(it: Logged) -> None:
    done = run(it, "kill", "--client", "127.0.0.1")
    assert (done.returncode, done.stdout) == (0, "3 ended\n")


@pytest.mark.parametrize("choice", [("--rule", "one"), ("--client", "127.0.0.1")], ids=" ".join)
def test_a_dry_run_lists_them_and_ends_nothing(it: Logged, choice: tuple[str, str]) -> None:
    done = run(it, "kill", *choice, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert (lines[0].split()[0], lines[-1], len(lines)) == ("id", "3 sessions would be ended", 5)
    assert it.rule()["sessions"] == 3


# -- where the instance is, and completion


def test_the_control_socket_is_named_before_or_behind_the_command(it: Logged) -> None:
    path = str(it.control)
    for words in (
        ("--control", path, "sessions"),
        (f"--control={path}", "sessions"),
        ("sessions", "--control", path),
        # Nearer to the command wins.
        ("--control", "/nowhere", "sessions", "--control", path),
    ):
        done = run_command(*words)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout.splitlines()) == 4


@pytest.mark.parametrize("is_first", [True, False])
def test_the_names_of_rules_are_completed(
    it: Logged, is_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = ["--control", str(it.control)]
    words = ["forwarder", *control, "kill"] if is_first else ["forwarder", "kill", *control]
    words += ["--rule", "o"]
    monkeypatch.setenv("_FORWARDER_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    done = run_command()
    assert (done.stdout, done.stderr) == ("plain,one\n", "")


def test_where_nobody_answers_nothing_is_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_FORWARDER_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "forwarder --control /nowhere kill --rule o")
    monkeypatch.setenv("COMP_CWORD", "5")
    done = run_command()
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
