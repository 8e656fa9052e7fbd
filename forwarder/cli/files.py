"""The options that say what to forward, and reading what they name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from forwarder import config
from forwarder.cli.arguments import FILE
from forwarder.config.likeness import Likeness, likeness
from forwarder.config.loading import MAX_FILE_BYTES, text_of
from forwarder.config.model import Dialect

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.config import Loaded

# The name of standard input, as in other programs.
STDIN: Final = "-"

format_option = click.option(
    "--format",
    "dialect",
    type=click.Choice([dialect.value for dialect in Dialect]),
    help="Read files in this format, whatever their names.",
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
            help="Where that rule leads; the first -r is for the first -l.",
        ),
        click.option(
            "--udp",
            "is_udp",
            is_flag=True,
            help="These rules are UDP; for one alone put udp: before its address.",
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
    """Read what the options name; blocks on standard input if that is ``STDIN``.

    Raises ConfigError and click.UsageError.
    """
    if config_file is None:
        if not listens and not remotes:
            raise click.UsageError("nothing to forward: give -c FILE, or -l ADDR -r ADDR in pairs")
        return config.from_pairs(listens, remotes, is_udp=is_udp)
    if listens or remotes:
        raise click.UsageError("-c FILE and -l/-r exclude each other")
    if is_udp:
        raise click.UsageError("--udp is for -l and -r; in a file write protocol, or /udp")
    if config_file != STDIN:
        return config.load(Path(config_file), dialect=dialect_of(config_file, dialect))
    text = text_of("<stdin>", sys.stdin.buffer.read(MAX_FILE_BYTES + 1))
    is_rinetd = likeness(text) is Likeness.RINETD
    guessed = Dialect.RINETD if is_rinetd else Dialect.TOML
    return config.parse(text, "<stdin>", Dialect(dialect) if dialect else guessed)


def dialect_of(config_file: str | None, dialect: str | None) -> Dialect:
    """The format of a file: as given, else by its name."""
    if dialect:
        return Dialect(dialect)
    return Dialect.of(Path(config_file)) if config_file else Dialect.TOML


def warn(loaded: Loaded) -> None:
    """Print the warnings about a configuration."""
    for issue in loaded.warnings:
        click.echo(str(issue), err=True)
