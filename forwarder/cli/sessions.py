"""Commands about the open sessions of a running instance: listing, ending, moving some of them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import click

from forwarder.cli import status
from forwarder.cli.arguments import control_option, most_like
from forwarder.cli.control import STATUS_TIMEOUT_S, ControlError, ask
from forwarder.control.protocol import MAX_LISTED
from forwarder.errors import ExitCode, ForwarderError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Ids in one request, of some 12 bytes each; a request is bounded.
_IDS_AT_ONCE: Final = 1000
# Names and ids in a message.
_MOST_NAMED: Final = 10


@dataclass(slots=True)
class _Found:
    """Open sessions; whether there are more; pids of workers that have not answered in time."""

    sessions: list[dict[str, object]] = field(default_factory=list)
    is_cut: bool = False
    silent: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        count = len(self.sessions)
        number = f"{'more than ' if self.is_cut else ''}{count:,}"
        return f"{number} session{'' if count == 1 else 's'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """The chosen sessions: those that meet every condition given."""

    control: str | None
    rule: str | None = None
    client: str | None = None
    group: str | None = None
    server: str | None = None
    ids: tuple[str, ...] = ()

    @property
    def is_narrow(self) -> bool:
        """Whether it names its sessions, or a single client."""
        if self.ids or self.client is None:
            return bool(self.ids)
        from forwarder.config.address import is_ip  # noqa: PLC0415 - it imports a lot

        return is_ip(self.client)

    def asked(self, op: str, ids: tuple[str, ...]) -> dict[str, object]:
        """The request to the instance about them."""
        asked: dict[str, object] = {"op": op, "rule": self.rule, "client": self.client}
        return {**asked, "group": self.group, "server": self.server, "ids": list(ids) or None}

    def parts(self) -> list[tuple[str, ...]]:
        """Ids, as many as one request takes."""
        return [
            self.ids[start : start + _IDS_AT_ONCE]
            for start in range(0, max(1, len(self.ids)), _IDS_AT_ONCE)
        ]

    def find(self, limit: int = MAX_LISTED) -> _Found:
        """Those that are open, at most ``limit`` of each request. Raises ControlError."""
        found = _Found()
        for ids in self.parts():
            asked = {**self.asked("sessions", ids), "limit": limit}
            answer = ask(self.control, asked, STATUS_TIMEOUT_S)
            listed = answer.get("sessions")
            sessions = listed if isinstance(listed, list) else []
            found.sessions += [one for one in sessions if isinstance(one, dict)]
            found.is_cut |= answer.get("is_cut") is True
            found.silent |= _tell_silent(answer)
        return found

    def move(self, slot: int) -> dict[str, object]:
        """Move them to the worker of a slot; what became of them. Raises ControlError."""
        outcome: dict[str, object] = {}
        for ids in self.parts():
            answer = ask(self.control, {**self.asked("move", ids), "slot": slot}, None)
            for key in ("moved", "busy", "back"):
                outcome[key] = status.count(outcome, key) + status.count(answer, key)
            outcome["why"] = outcome.get("why") or answer.get("why")
            _tell_silent(answer)
        return outcome

    def kill(self) -> int:
        """End them; returns how many. Raises ControlError."""
        killed = 0
        for ids in self.parts():
            answer = ask(self.control, self.asked("kill", ids), STATUS_TIMEOUT_S)
            count = answer.get("killed")
            killed += count if isinstance(count, int) else 0
            _tell_silent(answer)
        return killed


def _complete_rule(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of rules, for a shell; none where no instance answers."""
    control = ctx.params.get("control") or ctx.find_root().params.get("control")
    try:
        names = _rule_names(control)
    except ForwarderError:
        return []
    return [name for name in names if name.startswith(incomplete)]


def _complete_group(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of groups, as above."""
    return [name for name in _known(ctx) if name.startswith(incomplete)]


def _complete_server(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of servers, of the group if one was given."""
    group = ctx.params.get("group")
    of = [names for name, names in _known(ctx).items() if group in (None, name)]
    return [name for names in of for name in names if name.startswith(incomplete)]


def _complete_slot(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Slots of workers."""
    control = ctx.params.get("control") or ctx.find_root().params.get("control")
    try:
        workers = ask(control, {"op": "status"}, STATUS_TIMEOUT_S).get("workers")
    except ForwarderError:
        return []
    slots = [str(one.get("slot")) for one in workers or () if isinstance(one, dict)]  # type: ignore[attr-defined]
    return [slot for slot in slots if slot.startswith(incomplete)]


def _known(ctx: click.Context) -> dict[str, list[str]]:
    control = ctx.params.get("control") or ctx.find_root().params.get("control")
    try:
        return _servers(control)
    except ForwarderError:
        return {}


def _choice_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that choose sessions: the parameters of a :class:`_Choice`."""
    for option in (
        click.option(
            "--rule", metavar="NAME", shell_complete=_complete_rule, help="Sessions of one rule."
        ),
        click.option(
            "--client", metavar="PATTERN", help="An address, a network, or one with * and ?."
        ),
        click.option(
            "--group",
            metavar="NAME",
            shell_complete=_complete_group,
            help="Sessions of one group of servers.",
        ),
        click.option(
            "--server",
            metavar="NAME",
            shell_complete=_complete_server,
            help="Sessions of one server of a group, as configured.",
        ),
    )[::-1]:
        command = option(command)
    return command


@click.command("sessions", short_help="List open sessions.")
@control_option
@_choice_options
@click.option(
    "--limit",
    type=click.IntRange(1, MAX_LISTED),
    default=1000,
    show_default=True,
    help="Show at most this many.",
)
@click.option("--json", "as_json", is_flag=True, help="One line of JSON for each session.")
def sessions_command(
    control: str | None, limit: int, *, as_json: bool, **conditions: str | None
) -> None:
    """List open sessions, with the bytes they moved and how long they have been silent."""
    choice = _Choice(control=control, **conditions)  # type: ignore[arg-type]  # options of these names
    found = choice.find(limit)
    sessions = found.sessions
    if not sessions:
        _check_names(choice)
    for line in map(json.dumps, sessions) if as_json else status.sessions_as_text(sessions):
        click.echo(line)
    if found.is_cut:
        click.echo(f"only {limit} are shown; --limit shows more", err=True)


@click.command("kill", short_help="End open sessions by a reset.")
@control_option
@_choice_options
@click.option("--dry-run", is_flag=True, help="List what would be ended, and end nothing.")
@click.option("-y", "--yes", is_flag=True, help="End them without asking.")
@click.argument("ids", metavar="[ID]...", nargs=-1)
def kill_command(
    control: str | None,
    ids: tuple[str, ...],
    *,
    dry_run: bool,
    yes: bool,
    **conditions: str | None,
) -> None:
    """End open sessions by a reset: by ID, of a rule, a client, a server. Filters combine with AND.

    Unless IDs or the address of one client are given, it asks first at a terminal, and needs --yes
    elsewhere.
    """
    choice, unknown = _chosen(control, ids, conditions)
    if dry_run:
        found = choice.find()
        if not found.sessions:
            _check_names(choice)
        for line in status.sessions_as_text(found.sessions):
            click.echo(line)
        count = len(found.sessions)
        click.echo(f"{found} would be ended")
    else:
        if not (yes or choice.is_narrow):
            _confirm(choice)
        count = choice.kill()
        click.echo(f"{count} ended")
    if unknown:
        raise ControlError(unknown)
    if not count:
        _check_names(choice)


@click.command("move", short_help="Move open sessions to another worker.")
@control_option
@_choice_options
@click.option(
    "--to",
    "slot",
    metavar="SLOT",
    type=click.IntRange(0),
    required=True,
    shell_complete=_complete_slot,
    help="The worker that gets them, by its slot as in the status.",
)
@click.argument("ids", metavar="[ID]...", nargs=-1)
def move_command(
    control: str | None, ids: tuple[str, ...], slot: int, **conditions: str | None
) -> None:
    """Move open sessions to another worker: by ID, of a rule, a client, a server.

    Filters combine with AND. Clients and upstreams notice nothing, and the IDs stay.
    """
    choice, unknown = _chosen(control, ids, conditions)
    outcome = choice.move(slot)
    for line in status.moved_as_text(outcome, slot):
        click.echo(line)
    if unknown:
        raise ControlError(unknown)
    if outcome.get("why"):
        raise ControlError(f"not all could be moved: {outcome.get('why')}")
    if not status.count(outcome, "moved"):
        _check_names(choice)


def _chosen(
    control: str | None, ids: tuple[str, ...], conditions: Mapping[str, str | None]
) -> tuple[_Choice, str]:
    """What a command is about that is not for all sessions; and the error for unknown ids."""
    if not ids and all(one is None for one in conditions.values()):
        what = "--rule, --client, --group or --server"
        raise click.UsageError(f"give IDs (see `forwarder sessions`), {what}")
    choice = _Choice(control=control, ids=ids, **conditions)
    return choice, _unknown_ids(control, ids)


def _confirm(choice: _Choice) -> None:
    """Ask the user, if there is something to end. Raises ControlError, click.Abort."""
    found = choice.find()
    if not found.sessions:
        return
    if not sys.stdin.isatty():
        what = f"this would end {found}; hint: --yes ends them, --dry-run lists them"
        raise ControlError(what, ExitCode.USAGE)
    if not click.confirm(f"End {found}?", err=True):
        raise ControlError("nothing was ended")


# -- unknown ids and rules


def _unknown_ids(control: str | None, ids: tuple[str, ...]) -> str:
    """The error for ids without an open session, with similar ones; "" if all are open."""
    if not ids:
        return ""
    found = _Choice(control=control, ids=ids).find()
    known = {str(session.get("id")) for session in found.sessions}
    unknown = [one for one in ids if one not in known and one.partition(".")[0] not in found.silent]
    if not unknown:
        return ""
    every = _Choice(control=control).find().sessions
    near = most_like(unknown[0], [str(session.get("id")) for session in every], 3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`forwarder sessions` lists them"
    more = len(unknown) - _MOST_NAMED
    names = ", ".join(unknown[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
    return f"no open session is called {names}; hint: {hint}"


def _check_names(choice: _Choice) -> None:
    """Raise ControlError if there is no rule, group or server of the names that were chosen.

    Call it only if no session was found: sessions of what was removed are found by its name.
    """
    if choice.rule is not None:
        _check_name("rule", choice.rule, _rule_names(choice.control))
    servers = _servers(choice.control) if choice.group or choice.server else {}
    if choice.group is not None:
        _check_name("group", choice.group, list(servers))
    if choice.server is not None:
        of = [choice.group] if choice.group else list(servers)
        _check_name("server", choice.server, [name for one in of for name in servers[one]])


def _check_name(what: str, name: str, names: list[str]) -> None:
    """Raise ControlError if a name is none of these."""
    if name in names:
        return
    near = most_like(name, names, 3, 0.5)
    more = len(names) - _MOST_NAMED
    known = ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are: {known}"
    if not names:
        hint = "no rule has upstreams to choose from"
    raise ControlError(f"no {what} is called {name!r}; hint: {hint}")


def _servers(control: str | None) -> dict[str, list[str]]:
    """The servers of each group of the instance. Raises ControlError."""
    found = ask(control, {"op": "upstreams"}, STATUS_TIMEOUT_S).get("groups")
    groups = found if isinstance(found, list) else []
    tables = [group for group in groups if isinstance(group, dict)]
    return {str(group.get("name")): status.servers_in(group) for group in tables}


def _rule_names(control: str | None) -> list[str]:
    """The rules of the instance. Raises ControlError."""
    rules = ask(control, {"op": "status"}, STATUS_TIMEOUT_S).get("rules")
    found = rules if isinstance(rules, list) else []
    return [str(rule.get("name")) for rule in found if isinstance(rule, dict)]


def _tell_silent(answer: dict[str, object]) -> set[str]:
    """Print which workers have not answered, whose sessions are missing. Returns their pids."""
    silent = answer.get("silent")
    if not isinstance(silent, list) or not silent:
        return set()
    pids = list(map(str, silent))
    click.echo(f"no answer in time from the workers with these pids: {', '.join(pids)}", err=True)
    return set(pids)
