"""The command that says what a reload would change."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from forwarder.cli.files import format_option, load
from forwarder.cli.options import FILE
from forwarder.config.compare import compare
from forwarder.config.describe import label, way
from forwarder.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from forwarder.config.compare import Change, Comparison
    from forwarder.config.model import Config
    from forwarder.errors import Issue


@click.command("diff", short_help="Show what a reload would change.")
@click.argument("old", metavar="OLD", type=FILE)
@click.argument("new", metavar="NEW", type=FILE)
@format_option
@click.option("--json", "as_json", is_flag=True, help="One line of JSON with everything.")
@click.option("--all", "shows_all", is_flag=True, help="Show the rules that stay as they are, too.")
@click.pass_context
def diff_command(
    ctx: click.Context, old: str, new: str, dialect: str | None, *, as_json: bool, shows_all: bool
) -> None:
    """Show what a reload from OLD to NEW would change.

    Exit status: 0 no change, 1 changes, 78 invalid file.
    """
    before, after = _load_both(old, new, dialect)
    found = compare(before, after)
    for line in _compared_json(found) if as_json else _compared(found, after, shows_all=shows_all):
        click.echo(line)
    ctx.exit(ExitCode.OK if found.is_same else ExitCode.FAILED)


def _load_both(old: str, new: str, dialect: str | None) -> tuple[Config, Config]:
    """Read two files. Raises ConfigError with the problems of both."""
    configs: list[Config] = []
    issues: list[Issue] = []
    for name in (old, new):
        try:
            configs.append(load(name, dialect).config)
        except ConfigError as err:
            issues += err.issues
    if issues:
        raise ConfigError(issues)
    return configs[0], configs[1]


def _compared(found: Comparison, new: Config, *, shows_all: bool) -> list[str]:
    plan = found.plan
    added = [rule for rule in new.rules if rule.name in set(plan.added)]
    lines = [f"+ {label(rule, ': ')}{way(rule)}" for rule in added]
    lines += [f"- {name}" for name in plan.removed]
    for name, changes in found.rules.items():
        lines.append(f"~ {name}")
        lines += [f"    {change}" for change in changes]
    lines += [f"= {name}" for name in plan.unchanged] if shows_all else []
    for change in found.settings:
        late = "; takes effect at the next start or upgrade"
        lines.append(f"{change}{late if change.key in found.needs_restart else ''}")
    return [*lines, str(plan)]


def _compared_json(found: Comparison) -> list[str]:
    def pairs(changes: tuple[Change, ...]) -> dict[str, list[str]]:
        return {change.key: [change.old, change.new] for change in changes}

    value = {
        "same": found.is_same,
        "added": found.plan.added,
        "removed": found.plan.removed,
        "changed": {name: pairs(changes) for name, changes in found.rules.items()},
        "unchanged": found.plan.unchanged,
        "settings": pairs(found.settings),
        "needs_restart": found.needs_restart,
    }
    return [json.dumps(value)]
