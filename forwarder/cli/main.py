"""The command line: errors to messages and exit codes, and where each command is.

The only module that ends the process. Each command is imported when it is called: probes and
scripts call some of them often, and would spend most of their time on the others.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Final, NoReturn

import click

from forwarder.cli import group, interrupt
from forwarder.cli.arguments import control_option
from forwarder.errors import ConfigError, ExitCode, ForwarderError
from forwarder.succession.line import tell_end

# Command to module of this folder; the function is called as the command.
_COMMANDS: Final = {
    "check": "check",
    "completion": "completion",
    "convert": "convert",
    "demo": "run",
    "diff": "diff",
    "help": "group",
    "kill": "sessions",
    "move": "sessions",
    "reload": "control",
    "run": "run",
    "sessions": "sessions",
    "status": "control",
    "stop": "control",
    "upgrade": "control",
    "upstream": "upstream",
    "workers": "control",
}
_EXAMPLES: Final = """\b
Examples:
  forwarder -l :8080 -r 10.0.0.1:80
  forwarder -l udp::5353 -r 10.0.0.53:53
  forwarder -c /etc/forwarder/forwarder.toml
  forwarder check /etc/forwarder/forwarder.toml
  forwarder status
"""


def _print_version(ctx: click.Context, _: click.Parameter, is_asked: bool) -> None:  # noqa: FBT001 - click's way
    if is_asked and not ctx.resilient_parsing:
        _show_version()
        ctx.exit()


def _show_version() -> None:
    from forwarder.cli import features  # noqa: PLC0415 - as each command

    for line in features.report():
        click.echo(line)


@click.group(
    cls=group.RunByDefault,
    commands=group.Commands(_COMMANDS),
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EXAMPLES,
)
@control_option
@click.option(
    "-V",
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show versions and the features of this system.",
)
@click.pass_context
def cli(ctx: click.Context, control: str | None) -> None:
    """Forward TCP and UDP ports: the kernel moves the bytes, one worker per CPU.

    If no command is named, `run` is meant.
    """
    if control is None:
        return
    name = str(ctx.invoked_subcommand)
    ctx.default_map = {name: group.with_control(cli.commands[name], control, ctx)}


@cli.command("version", short_help="Same as --version.")
def version_command() -> None:
    """Show versions and the features of this system, as --version does."""
    _show_version()


def main() -> NoReturn:
    """Run the command line and exit with a code of ExitCode, or by SIGINT."""
    try:
        _main()
    except SystemExit as err:
        tell_end(err.code if isinstance(err.code, int) else ExitCode.OK)
        raise
    finally:
        interrupt.be_silent()  # while the interpreter ends


def _main() -> NoReturn:
    try:
        code = cli(standalone_mode=False, prog_name=group.PROGRAM)
    except click.ClickException as err:
        err.show()
        sys.exit(err.exit_code)
    except KeyboardInterrupt:
        interrupt.end()
    except click.Abort as err:
        if isinstance(err.__cause__ or err.__context__, KeyboardInterrupt):
            interrupt.end()
        sys.exit(ExitCode.FAILED)
    except ConfigError as err:
        for issue in err.issues:
            click.echo(str(issue), err=True)
        sys.exit(err.exit_code)
    except ForwarderError as err:
        click.echo(f"forwarder: {err}", err=True)
        sys.exit(err.exit_code)
    except OSError as err:
        # Above all a standard output that takes nothing: a full disk, a pipe whose reader has gone.
        with contextlib.suppress(OSError):
            click.echo(f"forwarder: {err}", err=True)
        sys.exit(ExitCode.FAILED)
    except Exception:  # a bug; the traceback is what a report needs
        logging.getLogger(__name__).exception("forwarder: internal error, please report it")
        sys.exit(ExitCode.INTERNAL)
    # What a command gives ctx.exit; others return None.
    sys.exit(code if isinstance(code, int) else ExitCode.OK)
