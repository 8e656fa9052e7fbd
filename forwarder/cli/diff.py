"""The command that shows what a reload would change."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from forwarder.cli.arguments import FILE, control_option
from forwarder.cli.control import preview, preview_lines
from forwarder.cli.files import format_option, load
from forwarder.config.compare import as_lines, as_object, compare
from forwarder.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from forwarder.config.model import Config
    from forwarder.errors import Issue


@click.command("diff", short_help="Show what a reload would change.")
@click.argument("names", metavar="[OLD NEW]", type=FILE, nargs=-1)
@control_option
@format_option
@click.option("--json", "as_json", is_flag=True, help="One line of JSON with everything.")
@click.option("--all", "shows_all", is_flag=True, help="Show unchanged rules, too.")
@click.pass_context
def diff_command(
    ctx: click.Context,
    names: tuple[str, ...],
    control: str | None,
    dialect: str | None,
    *,
    as_json: bool,
    shows_all: bool,
) -> None:
    """Show what a reload from OLD to NEW would change.

    Without them: what a reload of the running instance would change now.

    Exit status: 0 no change, 1 changes, 78 invalid file.
    """
    if not names:
        answer = preview(control, shows_all=shows_all)
        found: dict[str, object] = {
            key: value for key, value in answer.items() if key not in ("ok", "lines")
        }
        lines = preview_lines(answer)
    elif len(names) == 2:
        before, after = _load_both(names[0], names[1], dialect)
        compared = compare(before, after)
        found, lines = as_object(compared), as_lines(compared, after, shows_all=shows_all)
    else:
        raise click.UsageError("give OLD and NEW, or neither to ask a running instance")
    for line in [json.dumps(found)] if as_json else lines:
        click.echo(line)
    ctx.exit(ExitCode.OK if found["same"] is True else ExitCode.FAILED)


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
