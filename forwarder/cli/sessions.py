"""Commands about the open sessions of a running instance: listing them, ending some of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

import click

from forwarder import status
from forwarder.cli.control import STATUS_TIMEOUT_S, ask, control_option
from forwarder.control.requests import MAX_LISTED

if TYPE_CHECKING:
    from collections.abc import Callable

# Ids in one request, of some 12 bytes each; a request is bounded.
_IDS_AT_ONCE: Final = 1000


def _choice_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which sessions are meant."""
    for option in (
        click.option("--rule", metavar="NAME", help="Those of one rule."),
        click.option("--client", metavar="PATTERN", help="An address, a network, or with * and ?."),
    )[::-1]:
        command = option(command)
    return command


@click.command("sessions")
@control_option
@_choice_options
@click.option(
    "--limit",
    type=click.IntRange(1, MAX_LISTED),
    default=1000,
    show_default=True,
    help="Show at most so many.",
)
@click.option("--json", "as_json", is_flag=True, help="One line of JSON for each session.")
def sessions_command(
    control: str | None, rule: str | None, client: str | None, limit: int, *, as_json: bool
) -> None:
    """List open sessions, with what they have moved and how long they have been silent."""
    asked: dict[str, object] = {"op": "sessions", "rule": rule, "client": client, "limit": limit}
    answer = ask(control, asked, STATUS_TIMEOUT_S)
    sessions = answer.get("sessions")
    found = sessions if isinstance(sessions, list) else []
    for line in map(json.dumps, found) if as_json else status.sessions_as_text(found):
        click.echo(line)
    if answer.get("is_cut"):
        click.echo(f"only {limit} are shown; --limit shows more", err=True)
    _tell_silent(answer)


@click.command("kill")
@control_option
@_choice_options
@click.argument("ids", metavar="[ID]...", nargs=-1)
def kill_command(
    control: str | None, rule: str | None, client: str | None, ids: tuple[str, ...]
) -> None:
    """End open sessions by a reset: by ID, of a rule, of a client. With several, all must hold."""
    if not ids and rule is None and client is None:
        raise click.UsageError("give IDs (see `forwarder sessions`), --rule or --client")
    asked: dict[str, object] = {"op": "kill", "rule": rule, "client": client}
    killed = 0
    for start in range(0, max(1, len(ids)), _IDS_AT_ONCE):
        part = list(ids[start : start + _IDS_AT_ONCE])
        answer = ask(control, {**asked, "ids": part or None}, STATUS_TIMEOUT_S)
        count = answer.get("killed")
        killed += count if isinstance(count, int) else 0
        _tell_silent(answer)
    click.echo(f"{killed} ended")


def _tell_silent(answer: dict[str, object]) -> None:
    """Say which workers have not answered, so that theirs are missing."""
    silent = answer.get("silent")
    if isinstance(silent, list) and silent:
        pids = ", ".join(map(str, silent))
        click.echo(f"no answer in time from the workers with these pids: {pids}", err=True)


COMMANDS: Final = (kill_command, sessions_command)
