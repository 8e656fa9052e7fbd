"""Commands that read configuration files, and touch nothing else: check and diff.

Also the options that say what to forward, which ``run`` has, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from forwarder import config, probing
from forwarder.addr import UnixAddress
from forwarder.cli.options import FILE
from forwarder.config.advice import advise
from forwarder.config.compare import compare
from forwarder.config.model import MAX_FLOWS, Config, Dialect, Framing, Rule
from forwarder.config.options import describe_options
from forwarder.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.config import Loaded
    from forwarder.config.compare import Change, Comparison
    from forwarder.errors import Issue


format_option = click.option(
    "--format",
    "dialect",
    type=click.Choice([dialect.value for dialect in Dialect]),
    help="Read files as this, whatever their names.",
)


def config_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say what to forward, shared by ``run`` and ``check``."""
    for option in (
        click.option(
            "-c",
            "--config",
            "--conf-file",
            "config_file",
            metavar="FILE",
            type=FILE,
            help="TOML if the name ends in .toml, else rinetd.conf.",
        ),
        format_option,
        click.option(
            "-l",
            "--listen",
            "listens",
            metavar="ADDR",
            multiple=True,
            help="A rule without a file: where it listens. May be repeated, with as many -r.",
        ),
        click.option(
            "-r",
            "--remote",
            "remotes",
            metavar="ADDR",
            multiple=True,
            help="Where that rule leads, the first with the first.",
        ),
        click.option(
            "--udp",
            "is_udp",
            is_flag=True,
            help="These rules are UDP; udp: before an address says it of one alone.",
        ),
    )[::-1]:
        command = option(command)
    return command


def load(
    config_file: str | None,
    dialect: str | None,
    listens: tuple[str, ...] = (),
    remotes: tuple[str, ...] = (),
    *,
    is_udp: bool = False,
) -> Loaded:
    """Read what the options name. Raises ConfigError and click.UsageError."""
    if config_file is None:
        if not listens and not remotes:
            raise click.UsageError("nothing to forward: give -c FILE, or -l ADDR -r ADDR in pairs")
        return config.from_pairs(listens, remotes, is_udp=is_udp)
    if listens or remotes:
        raise click.UsageError("-c FILE and -l/-r exclude each other")
    if is_udp:
        raise click.UsageError("--udp is for -l and -r; in a file write protocol, or /udp")
    return config.load(Path(config_file), dialect=dialect_of(config_file, dialect))


def dialect_of(config_file: str | None, dialect: str | None) -> Dialect:
    """The language of a file: what was said, else what its name tells."""
    if dialect:
        return Dialect(dialect)
    return Dialect.of(Path(config_file)) if config_file else Dialect.TOML


def warn(loaded: Loaded) -> None:
    """Print what the author of a configuration should know."""
    for issue in loaded.warnings:
        click.echo(str(issue), err=True)


@click.command("check", short_help="Validate a configuration and print what it means.")
@config_options
def check_command(
    config_file: str | None,
    dialect: str | None,
    listens: tuple[str, ...],
    remotes: tuple[str, ...],
    *,
    is_udp: bool,
) -> None:
    """Validate a configuration and print what it means. Opens no port; needs no privilege."""
    loaded = load(config_file, dialect, listens, remotes, is_udp=is_udp)
    warn(loaded)
    probing.check(loaded.config)
    for issue in advise(loaded.config, dialect_of(config_file, dialect)):
        click.echo(str(issue), err=True)
    for line in describe(loaded.config, config_file or "command line"):
        click.echo(line)


def describe(loaded: Config, title: str) -> list[str]:
    """What a configuration means, a line per fact."""
    settings = loaded.settings
    lines = [
        f"{title}: {len(loaded.rules)} rule(s), workers {settings.workers or 'auto'}, "
        f"relay {settings.relay.value}"
    ]
    lines += [f"global {rule.verdict.value} {rule.pattern}" for rule in loaded.access]
    for rule in loaded.rules:
        lines.append(f"{rule.name}: {_describe_rule(rule)}")
        lines += [f"{rule.name}: {entry.verdict.value} {entry.pattern}" for entry in rule.access]
    return lines


def _describe_rule(rule: Rule) -> str:
    """Where a rule listens and leads, and what is not as usual."""
    upstreams = ", ".join(map(str, rule.upstreams))
    text = f"{rule.protocol.value} {rule.listen} -> {upstreams}"
    if rule.source:
        text += f", from {rule.source}"
    if isinstance(rule.listen, UnixAddress) and rule.listen.path.startswith("/"):
        text += f", mode {rule.unix_mode:04o}"
    if rule.max_flows != MAX_FLOWS:
        text += f", at most {rule.max_flows} flows"
    if rule.framing is not Framing.RAW:
        text += f", framing {rule.framing.value}"
    if options := describe_options(rule.options):
        text += f", {options}"
    if rule.retries_bind:
        text += ", may wait for its address"
    return text


@click.command("diff", short_help="Show what a reload would change.")
@click.argument("old", metavar="OLD", type=FILE)
@click.argument("new", metavar="NEW", type=FILE)
@format_option
@click.option("--json", "as_json", is_flag=True, help="One line of JSON with everything.")
@click.pass_context
def diff_command(
    ctx: click.Context, old: str, new: str, dialect: str | None, *, as_json: bool
) -> None:
    """Show what a reload from OLD to NEW would do. Status 0: nothing; 1: something."""
    found = compare(*_load_both(old, new, dialect))
    for line in _compared_json(found) if as_json else _compared(found):
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


def _compared(found: Comparison) -> list[str]:
    plan = found.plan
    lines = [f"+ {name}" for name in plan.added] + [f"- {name}" for name in plan.removed]
    for name, changes in found.rules.items():
        lines.append(f"~ {name}")
        lines += [f"    {change}" for change in changes]
    lines += [f"= {name}" for name in plan.unchanged]
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


COMMANDS: Final = (check_command, diff_command)
