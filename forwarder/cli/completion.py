"""The command that prints the completion script of a shell."""

from __future__ import annotations

import click
from click.shell_completion import ShellComplete, get_completion_class

from forwarder.cli.group import PROGRAM

SHELLS = ("bash", "zsh", "fish")

VARIABLE = "_FORWARDER_COMPLETE"


@click.command("completion", short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell: source <(forwarder completion bash)."""
    made_by = get_completion_class(shell) or ShellComplete
    complete = made_by(ctx.find_root().command, {}, PROGRAM, VARIABLE)
    # click's class for bash would run bash to check its version; 4.4 is of 2016.
    click.echo(ShellComplete.source(complete))
