"""The command that says what a configuration means, and what is wrong with it."""

from __future__ import annotations

import json
import os
import stat
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from forwarder.cli.absent import absent_addresses, absent_commands, absent_interfaces
from forwarder.cli.arguments import FILE
from forwarder.cli.files import STDIN, config_options, load
from forwarder.config.advice import advise
from forwarder.config.describe import check, describe, plural
from forwarder.config.keys import OF_A_GROUP, OF_A_SERVER
from forwarder.errors import ConfigError, Issue, Place
from forwarder.serving import probing
from forwarder.upstream.unresolved import unresolved_names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from forwarder.config.keys import Key
    from forwarder.config.model import Config, Rule


# Where services have their configuration.
SERVICES: Final = Path("/etc")


@click.command("check", short_help="Validate a configuration and print what it means.")
@config_options
@click.option("--json", "as_json", is_flag=True, help="One line of JSON with everything.")
@click.option(
    "--names", "asks_names", is_flag=True, help="Look host names up, too; takes 8 s at most."
)
@click.argument("file", metavar="[FILE]", type=FILE, required=False)
def check_command(  # noqa: PLR0913 - one parameter per option is click's way
    config_file: str | None,
    dialect: str | None,
    listens: tuple[str, ...],
    remotes: tuple[str, ...],
    file: str | None,
    *,
    is_udp: bool,
    as_json: bool,
    asks_names: bool,
) -> None:
    """Validate a configuration and print what it means. Opens no port; needs no privilege.

    FILE may be given without -c; - is standard input.
    """
    if file is not None and config_file is not None:
        raise click.UsageError("FILE and -c FILE are one too many")
    name = file if file is not None else config_file
    try:
        loaded = load(name, dialect, listens, remotes, is_udp=is_udp)
        probing.check(loaded.config)
    except ConfigError as err:
        if as_json:
            click.echo(json.dumps(_as_json(None, err.issues)))
        raise
    found = loaded.config
    issues = [
        *loaded.warnings,
        *advise(found, loaded.dialect),
        *absent_interfaces(found.rules),
        *absent_commands(found.rules),
    ]
    if name is not None and name != STDIN and os.geteuid() == 0 and not found.settings.user:
        issues += unreadable(name)
    if asks_names:
        issues += [*unresolved_names(found), *absent_addresses(found.rules)]
    if as_json:
        click.echo(json.dumps(_as_json(found, issues)))
        return
    for issue in issues:
        click.echo(str(issue), err=True)
    title = name or "command line"
    with_warnings = f", with {plural(len(issues), 'warning')}" if issues else ""
    for line in (*describe(found, title), f"{title}: ok{with_warnings}"):
        click.echo(line)


def unreadable(name: str) -> list[Issue]:
    """A warning if only root can read a file: the shipped unit runs as another user."""
    path = Path(name).resolve()
    # Elsewhere it is a draft, in its author's directory.
    above = [part for part in path.parents if part.is_relative_to(SERVICES)]
    for part, needed in ((path, stat.S_IROTH), *((part, stat.S_IXOTH) for part in above)):
        mode = part.stat().st_mode
        if not mode & needed:
            what = f"only its owner and group can read it: {part} has mode {stat.S_IMODE(mode):04o}"
            hint = f"a service that is not root, as the shipped unit's, needs chmod o+rX {part}"
            return [Issue(Place(name), what, hint=hint, is_warning=True)]
    return []


def _as_json(config: Config | None, issues: Sequence[Issue]) -> dict[str, object]:
    """Everything for a program: whether it can be used, rules, groups, and all problems."""
    rules = () if config is None else config.rules
    return {
        "ok": config is not None,
        "rules": [
            {
                "name": rule.name,
                "protocol": rule.protocol.value,
                "listen": str(rule.listen),
                "upstreams": [str(upstream) for upstream in rule.upstreams],
                "group": rule.group_name if rule.is_balanced else None,
            }
            for rule in rules
        ],
        "groups": _groups(rules),
        "issues": [
            {
                "file": issue.place.source,
                "line": issue.place.line,
                "column": issue.place.column,
                "severity": "warning" if issue.is_warning else "error",
                "message": issue.what,
                "allowed": issue.allowed,
                "hint": issue.hint,
            }
            for issue in issues
        ],
    }


def _groups(rules: Sequence[Rule]) -> list[dict[str, object]]:
    rules_of: dict[str, list[Rule]] = {}
    for rule in rules:
        if rule.is_balanced:
            rules_of.setdefault(rule.group_name, []).append(rule)
    return [
        {
            "name": name,
            "rules": [rule.name for rule in those],
            **_keys(OF_A_GROUP, those[0].group),
            "check": check(those[0].group.check) if those[0].group.check else None,
            "servers": [
                {"server": str(upstream), **_keys(OF_A_SERVER, upstream)}
                for upstream in those[0].upstreams
            ],
        }
        for name, those in rules_of.items()
    ]


def _keys(rows: Mapping[str, Key], part: object) -> dict[str, object]:
    """Values as a file has them, by key."""
    values = {name: key.shown(getattr(part, key.field)) for name, key in rows.items()}
    return {name: one.value if isinstance(one, Enum) else one for name, one in values.items()}
