"""The command that says what a configuration means, and what is wrong with it."""

from __future__ import annotations

import click

from forwarder import probing
from forwarder.addr import UnixAddress
from forwarder.cli.files import config_options, dialect_of, load, warn
from forwarder.config.advice import advise
from forwarder.config.model import MAX_FLOWS, Config, Framing, Rule
from forwarder.config.options import describe_options


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
