"""Commands that read configuration files, and touch nothing else: check.

Also the options that say what to forward, which ``run`` has, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from forwarder import config
from forwarder.addr import UnixAddress
from forwarder.config.model import MAX_FLOWS, Config, Dialect, Framing, Rule

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.config import Loaded


def config_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say what to forward, shared by ``run`` and ``check``."""
    for option in (
        click.option(
            "-c",
            "--config",
            "--conf-file",
            "config_file",
            metavar="FILE",
            help="TOML if the name ends in .toml, else rinetd.conf.",
        ),
        click.option("--format", "dialect", type=click.Choice([d.value for d in Dialect])),
        click.option("-l", "--listen", "listens", metavar="ADDR", multiple=True),
        click.option("-r", "--remote", "remotes", metavar="ADDR", multiple=True),
    ):
        command = option(command)
    return command


def load(
    config_file: str | None, dialect: str | None, listens: tuple[str, ...], remotes: tuple[str, ...]
) -> Loaded:
    """Read what the options name. Raises ConfigError and click.UsageError."""
    if config_file is None:
        if not listens and not remotes:
            raise click.UsageError("nothing to forward: give -c FILE, or -l ADDR -r ADDR in pairs")
        return config.from_pairs(listens, remotes)
    if listens or remotes:
        raise click.UsageError("-c FILE and -l/-r exclude each other")
    path = Path(config_file)
    return config.load(path, dialect=Dialect(dialect) if dialect else None)


def warn(loaded: Loaded) -> None:
    """Print what the author of a configuration should know."""
    for issue in loaded.warnings:
        click.echo(str(issue), err=True)


@click.command("check")
@config_options
def check_command(
    config_file: str | None, dialect: str | None, listens: tuple[str, ...], remotes: tuple[str, ...]
) -> None:
    """Validate a configuration and print what it means. Opens no port; needs no privilege."""
    loaded = load(config_file, dialect, listens, remotes)
    warn(loaded)
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
    if rule.retries_bind:
        text += ", may wait for its address"
    return text


COMMANDS: Final = (check_command,)
