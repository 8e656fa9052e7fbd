"""Commands about the servers of groups: listing them, and ordering which of them get sessions."""

from __future__ import annotations

import json
import math
import os
import pwd
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import click

from forwarder.cli import status
from forwarder.cli.arguments import control_option, most_like
from forwarder.cli.control import STATUS_TIMEOUT_S, ControlError, ask
from forwarder.control.protocol import MAX_LOGIN
from forwarder.errors import ForwarderError

# Between two looks while a command waits for sessions to end. Arbitrary.
_LOOK_S: Final = 0.5
_NOBODY_LOGGED_IN: Final = (1 << 32) - 1  # pam_loginuid(8)
_MOST_WEIGHT: Final = 256  # as in the configuration, which takes long to import
_MOST_NAMED: Final = 10  # groups in a message


def _asked(ctx: click.Context) -> str | None:
    """The control socket that the command line names so far."""
    found = ctx.params.get("control") or ctx.find_root().params.get("control")
    return found if isinstance(found, str) else None


def _known(ctx: click.Context) -> list[dict[str, object]]:
    """The groups of the instance, for a shell; none where no instance answers."""
    try:
        return _groups(_asked(ctx))
    except ForwarderError:
        return []


def _complete_group(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    names = [str(group.get("name")) for group in _known(ctx)]
    return [name for name in names if name.startswith(incomplete)]


def _complete_server(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Servers of the group that was given, those not named yet.

    For bash a colon is a word of its own: it wants the port when the host stands before that.
    """
    group, given = ctx.params.get("group"), tuple(ctx.params.get("servers") or ())
    host = f"{given[-2]}:" if given[1:] and given[-1] == ":" else ""
    names = [
        name for one in _known(ctx) if one.get("name") == group for name in status.servers_in(one)
    ]
    possible = [name for name in names if name.startswith(host + incomplete) and name not in given]
    return [name.removeprefix(host) for name in possible]


_group_argument = click.argument("group", metavar="GROUP", shell_complete=_complete_group)
_servers_argument = click.argument(
    "servers", metavar="SERVER...", nargs=-1, required=True, shell_complete=_complete_server
)


@click.group("upstream", short_help="List servers of groups, drain them, bring them back.")
def upstream_command() -> None:
    """List the servers of groups, keep new sessions from some of them, and bring these back.

    GROUP is the name of a group, or of a rule with upstreams of its own. SERVER is an upstream as
    configured, or its host, or another part of it that no other one has.

    What is ordered here holds over reloads and upgrades, and over restarts if the configuration
    names a state_file, until it is taken back by `enable`.
    """


@upstream_command.command("list", short_help="List servers with their states and orders.")
@control_option
@click.option("--json", "as_json", is_flag=True, help="One line of JSON with everything.")
@click.argument("group", metavar="[GROUP]", required=False, shell_complete=_complete_group)
def list_command(control: str | None, group: str | None, *, as_json: bool) -> None:
    """List servers with their states and sessions, and what was ordered of them, by whom."""
    found = _groups(control)
    if group is not None:
        known = [str(one.get("name")) for one in found]
        found = [one for one in found if one.get("name") == group]
        if not found:
            raise _unknown_group(group, known)
    if as_json:
        click.echo(json.dumps({"groups": found}))
        return
    lines = status.groups_as_text(found, time.time())
    for line in lines or ["no rule has upstreams to choose from"]:
        click.echo(line)


def _add_command_against(what: str, short_help: str, text: str) -> None:
    """Add the command of an order that keeps new sessions from servers."""

    @upstream_command.command(what, short_help=short_help, help=text)
    @control_option
    @click.option("--reset", is_flag=True, help="Reset its open sessions as well.")
    @click.option("--wait", is_flag=True, help="Return when its last session has ended.")
    @click.option(
        "--timeout",
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        help="Give up waiting after this time; the order stays.",
    )
    @_group_argument
    @_servers_argument
    def command(
        control: str | None,
        group: str,
        servers: tuple[str, ...],
        timeout: float | None,
        *,
        reset: bool,
        wait: bool,
    ) -> None:
        ordered = _order(control, what, group, servers, reset=reset)
        if wait:
            _wait(control, group, ordered, timeout)


_add_command_against(
    "drain",
    "Send no new sessions to servers.",
    "Send no new sessions to servers; open ones go on. Checks go on as well.",
)
_add_command_against(
    "disable",
    "Neither use nor check servers.",
    "Send no new sessions to servers, and check them no more; open sessions go on.",
)


@upstream_command.command("enable", short_help="Use servers as configured again.")
@control_option
@_group_argument
@_servers_argument
def enable_command(control: str | None, group: str, servers: tuple[str, ...]) -> None:
    """Use servers as configured again: takes back drain, disable and weight.

    A server that a check has found down stays so until a check finds it up.
    """
    _order(control, "enable", group, servers)


@upstream_command.command("weight", short_help="Change the part of sessions that servers get.")
@control_option
@_group_argument
@_servers_argument
@click.argument("weight", metavar="N", type=click.IntRange(0, _MOST_WEIGHT))
def weight_command(control: str | None, group: str, servers: tuple[str, ...], weight: int) -> None:
    """Give servers the weight N, from 0 to 256, in place of the configured one.

    A server of weight 0 gets sessions only while there is no other. A drained or disabled server
    stays so.
    """
    _order(control, "weight", group, servers, weight=weight)


# -- asking the instance


def _groups(control: str | None, only: str | None = None) -> list[dict[str, object]]:
    """The groups of the instance, or ``only`` this one. Raises ControlError."""
    found = ask(control, {"op": "upstreams", "group": only}, STATUS_TIMEOUT_S).get("groups")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _order(
    control: str | None, what: str, group: str, servers: tuple[str, ...], **more: object
) -> list[str]:
    """Order something, and print what came of it. Returns the servers. Raises ControlError."""
    asked: dict[str, object] = {"op": "upstream", "what": what, "group": group, **more}
    asked |= {"servers": list(servers), "login": _login()}
    answer = ask(control, asked, STATUS_TIMEOUT_S)
    for line in status.order_as_text(answer, time.time()):
        click.echo(line)
    if answer.get("is_empty"):
        click.echo(f"no server of the group {group} gets new sessions now", err=True)
    if problem := answer.get("problem"):
        click.echo(f"in force, but not kept for a restart: {problem}", err=True)
    return status.servers_in(answer)


def _login() -> str | None:
    """As whom the operator has logged in, if that is known: with sudo all are root."""
    with suppress(OSError, ValueError, KeyError):  # no audit; nobody has; nobody of this host
        uid = int(Path("/proc/self/loginuid").read_text())
        if uid != _NOBODY_LOGGED_IN:
            return pwd.getpwuid(uid).pw_name
    name = os.environ.get("SUDO_USER", "")
    return name if name.isprintable() and len(name) <= MAX_LOGIN else None


def _wait(control: str | None, group: str, servers: list[str], timeout: float | None) -> None:
    """Return when servers have no session left. Raises ControlError."""
    until = math.inf if timeout is None else time.monotonic() + timeout
    while left := _left(control, group, servers):
        rest = until - time.monotonic()
        if rest <= 0:
            raise ControlError(f"after {timeout:g} s {left}; the order stays")
        time.sleep(min(_LOOK_S, rest))


def _left(control: str | None, group: str, servers: list[str]) -> str:
    """What sessions servers have, for people; "" if none are left, not in old instances either."""
    count = sum(status.sessions_of(one, servers) for one in _groups(control, group))
    if count:
        return f"there {'is' if count == 1 else 'are'} still {status.sessions(count)}"
    for server in servers:  # what old instances have is not counted in ours
        asked: dict[str, object] = {"op": "sessions", "group": group, "server": server, "limit": 1}
        answer = ask(control, asked, STATUS_TIMEOUT_S)
        if answer.get("sessions"):
            return "there are still sessions in an instance that drains"
        if answer.get("silent"):
            return "a worker does not answer"
    return ""


def _unknown_group(group: str, known: list[str]) -> ControlError:
    near = most_like(group, known)
    if not known:
        return ControlError(f"there is no group {group!r}: no rule has upstreams to choose from")
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known[:_MOST_NAMED])}"
    return ControlError(f"there is no group {group!r}; hint: {hint}")
