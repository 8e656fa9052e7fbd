"""Commands that talk to a running instance: reload, status, stop and so on; see ``sessions``, too.

Ask over the control socket and print the answer. Not the service: see ``control``.
"""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import click

from forwarder.cli import status
from forwarder.cli.arguments import control_option
from forwarder.control.path import find as find_socket
from forwarder.control.protocol import MAX_ANSWER_BYTES, REJECTED
from forwarder.errors import ExitCode, ForwarderError
from forwarder.system.printable import visible

STATUS_TIMEOUT_S: Final = 10.0
# Longer than the limits of the master itself: reading takes at most 60 s, and a worker that does
# not acknowledge is replaced after 10 s. An upgrade is given up after 60 s and a few signals.
_RELOAD_TIMEOUT_S: Final = 120.0


class ControlError(ForwarderError):
    """No instance answers, or it refuses."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def request(path: Path, message: dict[str, object], timeout_s: float | None) -> dict[str, object]:
    """Ask and wait for the answer, forever if ``timeout_s`` is None.

    Raises ControlError if there is none, or if it is a refusal.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout_s)
            sock.connect(str(path))
            with suppress(BrokenPipeError):  # turned away; the answer says why
                sock.sendall(json.dumps(message).encode() + b"\n")
            with sock.makefile("rb") as file:
                line = file.readline(MAX_ANSWER_BYTES + 1)
    except OSError as err:
        raise _unreachable(path, err) from err
    if not line.endswith(b"\n"):
        raise ControlError(
            f"the forwarder at {path} has ended without an answer", ExitCode.UNAVAILABLE
        )
    try:
        answer = _cleaned(json.loads(line))
    except (ValueError, RecursionError) as err:
        raise ControlError(f"what listens at {path} is no forwarder") from err
    if not isinstance(answer, dict) or answer.get("ok") is not True:
        raise _refused(answer if isinstance(answer, dict) else {})
    return answer


def _cleaned(value: object) -> object:
    """A part of an answer without what a terminal obeys: any process may listen at a path."""
    if isinstance(value, str):
        return visible(value, kept="\n")
    if isinstance(value, list):
        return [_cleaned(one) for one in value]
    if isinstance(value, dict):
        return {visible(str(key)): _cleaned(one) for key, one in value.items()}
    return value


def _unreachable(path: Path, err: OSError) -> ControlError:
    if isinstance(err, PermissionError):
        what = f"control socket {path}: permission denied; hint: ask as root or as its user"
        return ControlError(what, ExitCode.NO_PERMISSION)
    if isinstance(err, TimeoutError | BlockingIOError):
        return ControlError(f"the forwarder at {path} does not answer", ExitCode.UNAVAILABLE)
    return ControlError(
        f"no forwarder runs at {path}: {err.strerror or err}; hint: --control PATH names another",
        ExitCode.UNAVAILABLE,
    )


def _refused(answer: dict[str, object]) -> ControlError:
    problems = answer.get("problems")
    lines = [str(answer.get("error", "no answer"))]
    lines += map(str, problems if isinstance(problems, list) else ())
    denied = answer.get("denied") is True
    return ControlError("\n".join(lines), ExitCode.NO_PERMISSION if denied else ExitCode.FAILED)


def ask(path: str | None, message: dict[str, object], timeout_s: float | None) -> dict[str, object]:
    """Ask the instance at ``path``, else the one that is found. See ``request``."""
    return request(Path(path) if path else find_socket(), message, timeout_s)


def preview(control: str | None, *, shows_all: bool) -> dict[str, object]:
    """What a reload would change now.

    Raises ControlError: CONFIG if the file cannot be used, UNAVAILABLE if no answer comes.
    """
    asked: dict[str, object] = {"op": "preview", "all": shows_all}
    try:
        return ask(control, asked, _RELOAD_TIMEOUT_S)
    except ControlError as err:
        if err.exit_code is ExitCode.FAILED:  # which for diff means that something would change
            is_bad = str(err).startswith(REJECTED)
            err.exit_code = ExitCode.CONFIG if is_bad else ExitCode.UNAVAILABLE
        raise


def preview_lines(answer: dict[str, object]) -> list[str]:
    """An answer of ``preview`` as lines for people."""
    lines = answer.get("lines")
    return list(map(str, lines)) if isinstance(lines, list) else []


@click.command("reload", short_help="Reload the configuration, and wait for that.")
@control_option
@click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")
def reload_command(control: str | None, *, dry_run: bool) -> None:
    """Reload the configuration; wait until it is in force, or report why it is not."""
    if dry_run:
        for line in preview_lines(preview(control, shows_all=False)):
            click.echo(line)
        return
    answer = ask(control, {"op": "reload"}, _RELOAD_TIMEOUT_S)
    click.echo(answer.get("report"))


@click.command("status", short_help="Show workers and rules with their counters.")
@control_option
@click.option("--json", "as_json", is_flag=True, help="One line of JSON with everything.")
def status_command(control: str | None, *, as_json: bool) -> None:
    """Show workers and rules with their counters."""
    answer = ask(control, {"op": "status"}, STATUS_TIMEOUT_S)
    if as_json:
        click.echo(json.dumps(answer))
        return
    for line in status.as_text(answer, time.time()):
        click.echo(line)


@click.command("upgrade", short_help="Replace the running code by the installed one.")
@control_option
def upgrade_command(control: str | None) -> None:
    """Replace the running code by the installed one; wait until it serves, or report why not."""
    answer = ask(control, {"op": "upgrade"}, _RELOAD_TIMEOUT_S)
    click.echo(answer.get("report"))


@click.command("stop", short_help="Let sessions end, and stop.")
@control_option
def stop_command(control: str | None) -> None:
    """Let sessions end, for drain_timeout or 30 s, and stop; wait for that. Again: at once."""
    click.echo(status.stop_as_text(ask(control, {"op": "stop"}, None)))


@click.command(
    "workers",
    short_help="Change the number of workers.",
    context_settings={"ignore_unknown_options": True},
)
@control_option
@click.argument("count", metavar="+1|-1|N")
def workers_command(control: str | None, count: str) -> None:
    """Change the number of workers; wait until all are ready."""
    answer = ask(control, {"op": "workers", "count": count}, _RELOAD_TIMEOUT_S)
    click.echo(f"{answer.get('workers')} workers")
