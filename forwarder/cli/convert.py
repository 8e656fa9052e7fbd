"""The command that turns other programs' configurations into ours: reads, writes, reports."""

from __future__ import annotations

import glob
import socket
from pathlib import Path

import click

from forwarder import migrate
from forwarder.cli.arguments import FILE
from forwarder.config.loading import read_bytes, read_text, text_with_comments
from forwarder.errors import ForwarderError


@click.command("convert", short_help="Turn another program's configuration into TOML.")
@click.argument("file", metavar="FILE", type=FILE)
@click.option(
    "--from",
    "kind",
    type=click.Choice([kind.value for kind in migrate.Kind]),
    help="Whose format FILE has.  [default: by its name and words]",
)
@click.option("-o", "--output", metavar="FILE", type=FILE, help="Write to FILE, not to stdout.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
def convert_command(file: str, kind: str | None, output: str | None, *, force: bool) -> None:
    """Turn a configuration of rinetd, rinetd-uv or oxidinetd into TOML; report what differs."""
    path = Path(file)
    text, notes = text_with_comments(file, read_bytes(path))
    outside = migrate.Outside(service_port=socket.getservbyname, find=find_files)
    which = migrate.Kind(kind) if kind else migrate.guess(path, text)
    converted = migrate.convert(text, file, which, outside)
    for issue in (*notes, *converted.report):
        click.echo(str(issue), err=True)
    if output is None:
        click.echo(converted.text, nl=False)
        return
    _write(Path(output), converted.text, force=force)
    if not output.endswith(".toml"):
        hint = f"read it with: forwarder check --format toml -c {output}"
        click.echo(f"{output}: warning: the name does not end in .toml; hint: {hint}", err=True)


def _write(path: Path, text: str, *, force: bool) -> None:
    """Write a whole file. Raises ForwarderError, and OSError for a full disk and the like."""
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ForwarderError(f"{path} exists already; hint: --force overwrites it") from None


def find_files(pattern: str, including: str) -> list[tuple[str, str]]:
    """Files that an ``include`` names, relative to the file that has it, with their texts."""
    names = sorted(glob.glob(str(Path(including).parent / pattern)))  # noqa: PTH207 - absolute ones, too
    return [(name, read_text(Path(name))) for name in names if not Path(name).is_dir()]
