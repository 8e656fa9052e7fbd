"""The command line: flags to settings, errors to messages and exit codes.

The only module that ends the process. Reads the configuration, then hands over to the master. Only
the commands that run the service import it: probes and scripts call the others often, which would
spend half of their time on that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import click

from forwarder.cli import (
    check,
    completion,
    control,
    convert,
    diff,
    files,
    group,
    interrupt,
    sessions,
)
from forwarder.config.model import MAX_WORKERS, RelayMode
from forwarder.errors import ConfigError, ExitCode, ForwarderError
from forwarder.net.pipes import HAS_SPLICE
from forwarder.succession import upgrade
from forwarder.supervision.spec import MasterSpec
from forwarder.system import daemonlog
from forwarder.system.children import fill_standard

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from forwarder.config.model import Config
_EXAMPLES: Final = """\b
Examples:
  forwarder -l :8080 -r 10.0.0.1:80
  forwarder -l udp::5353 -r 10.0.0.53:53
  forwarder -c /etc/forwarder/forwarder.toml
  forwarder check /etc/forwarder/forwarder.toml
  forwarder status
"""


class _WorkerCount(click.ParamType[int]):
    """``auto`` or a number of processes."""

    name = "N|auto"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Complete the only word."""
        return click.Choice(["auto"]).shell_complete(ctx, param, incomplete)

    def convert(  # noqa: RET503 - fail() does not return
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        text = str(value)
        if text == "auto":
            return 0
        is_number = len(text) <= 9 and text.isascii() and text.isdigit()
        if is_number and 1 <= int(text) <= MAX_WORKERS:
            return int(text)
        what = f"{text[:40]!r} is neither 'auto' nor a number from 1 to {MAX_WORKERS}"
        self.fail(what, param, ctx)


def _print_version(ctx: click.Context, _: click.Parameter, is_asked: bool) -> None:  # noqa: FBT001 - click's way
    if is_asked and not ctx.resilient_parsing:
        _show_version()
        ctx.exit()


def _show_version() -> None:
    from forwarder.cli import features  # noqa: PLC0415 - see above

    for line in features.report():
        click.echo(line)


@click.group(
    cls=group.RunByDefault,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EXAMPLES,
)
@control.control_option
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
    if all(parameter.name != "control" for parameter in cli.commands[name].params):
        raise click.UsageError(f"{name} asks no instance: leave out --control", ctx)
    # The command's own option wins over this.
    ctx.default_map = {name: {"control": control}}


@cli.command("version", short_help="Same as --version.")
def version_command() -> None:
    """Show versions and the features of this system, as --version does."""
    _show_version()


@cli.command(short_help="Forward until stopped; the name may be left out.")
@files.config_options
@click.option(
    "--workers", metavar="N|auto", type=_WorkerCount(), help="Worker processes; auto = usable CPUs."
)
@click.option(
    "--relay",
    type=click.Choice([mode.value for mode in RelayMode]),
    help="How bulk is moved; auto = splice where the system has it.",
)
@control.control_option
@click.option("--user", metavar="NAME", help="User the workers run as; needs root.")
@click.option("--group", metavar="NAME", help="Group the workers run as.")
@click.option(
    "--drain-timeout",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Limit for sessions that have to end; 0 = none.  [default: 30 at a stop, else none]",
)
@click.option("--keep-going", is_flag=True, help="Start without rules whose address is missing.")
@click.option("-f", "--foreground", is_flag=True, help="Accepted for rinetd users; always so.")
@click.option("-v", "--verbose", is_flag=True, help="Log every session as it ends.")
def run(  # noqa: PLR0913 - one parameter per option is click's way
    config_file: str | None,
    dialect: str | None,
    listens: tuple[str, ...],
    remotes: tuple[str, ...],
    is_udp: bool,  # noqa: FBT001
    workers: int | None,
    relay: str | None,
    control: str | None,
    user: str | None,
    group: str | None,
    drain_timeout: float | None,
    keep_going: bool,  # noqa: FBT001
    foreground: bool,  # noqa: ARG001, FBT001
    verbose: bool,  # noqa: FBT001
) -> None:
    """Forward until stopped: SIGTERM lets sessions end first, SIGINT does not wait."""
    with contextlib.suppress(OSError):  # a container without /dev/null
        fill_standard()
    daemonlog.start(verbose=verbose)

    def load() -> Config:
        """Read the configuration; the command line overrides it."""
        if config_file == files.STDIN:
            raise click.UsageError("a service reads its file again; `check -` reads standard input")
        loaded = files.load(config_file, dialect, listens, remotes, is_udp=is_udp)
        files.warn(loaded)
        given = {
            "workers": workers,
            "relay": relay and RelayMode(relay),
            "control": control,
            "user": user,
            "group": group,
            "drain_timeout_s": drain_timeout,
        }
        settings = dataclasses.replace(
            loaded.config.settings,
            **{key: value for key, value in given.items() if value is not None},  # type: ignore[arg-type]  # one field each
        )
        settings = dataclasses.replace(settings, workers=settings.workers or usable_cpus())
        _refuse_missing_splice(settings.relay)
        rules = loaded.config.rules
        if keep_going:
            rules = tuple(dataclasses.replace(rule, retries_bind=True) for rule in rules)
        return dataclasses.replace(loaded.config, settings=settings, rules=rules)

    spec = MasterSpec(
        config=load(),
        title=Path(config_file).name if config_file else "command line",
        load=load if config_file else None,
        has_control=True,
    )
    from forwarder.master import Master  # noqa: PLC0415 - see above

    interrupt.be_raised()
    sys.exit(Master(spec).run())


@cli.command("demo", short_help="Push data through a forwarder of its own, to see it work.")
@click.option("--seconds", type=click.FloatRange(min=0.1), help="End by itself after this long.")
@click.option(
    "--workers", metavar="N|auto", type=_WorkerCount(), default="auto", help="Worker processes."
)
@click.option(
    "--port",
    type=click.IntRange(1, 65534),
    default=9000,
    show_default=True,
    help="Where to listen; the server is on the next one.",
)
def demo_command(seconds: float | None, workers: int, port: int) -> None:
    """Forward 127.0.0.1:9000 to a small built-in server and push data through."""
    from forwarder.cli import demo  # noqa: PLC0415 - see above

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    interrupt.be_raised()
    sys.exit(demo.run(workers=workers or usable_cpus(), port=port, seconds=seconds))


for _command in (
    *control.COMMANDS,
    *sessions.COMMANDS,
    check.check_command,
    diff.diff_command,
    completion.completion_command,
    convert.convert_command,
    group.help_command,
):
    cli.add_command(_command)


def usable_cpus() -> int:
    """CPUs this process may use: its affinity mask where the system has one."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _refuse_missing_splice(relay: RelayMode) -> None:
    if relay is RelayMode.SPLICE and not HAS_SPLICE:
        raise click.UsageError("this system has no splice(2); use --relay auto or --relay copy")


def main() -> NoReturn:
    """Run the command line and exit with a code of ExitCode, or by SIGINT."""
    try:
        _main()
    except SystemExit as err:
        upgrade.tell_end(err.code if isinstance(err.code, int) else ExitCode.OK)
        raise
    finally:
        interrupt.be_silent()  # while the interpreter ends


def _main() -> NoReturn:
    try:
        code = cli(standalone_mode=False, prog_name=completion.PROGRAM)
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
