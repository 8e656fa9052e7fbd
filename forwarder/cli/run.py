"""The commands that forward: ``run``, with flags to settings, and ``demo``.

They read the configuration, then hand over to the master.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from forwarder.cli import files, interrupt
from forwarder.cli.arguments import control_option
from forwarder.config.model import MAX_WORKERS, RelayMode
from forwarder.net.pipes import HAS_SPLICE
from forwarder.supervision.spec import MasterSpec
from forwarder.system import daemonlog
from forwarder.system.children import fill_standard

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from forwarder.config.model import Config


class WorkerCount(click.ParamType[int]):
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


@click.command("run", short_help="Forward until stopped; the name may be left out.")
@files.config_options
@click.option(
    "--workers", metavar="N|auto", type=WorkerCount(), help="Worker processes; auto = usable CPUs."
)
@click.option(
    "--relay",
    type=click.Choice([mode.value for mode in RelayMode]),
    help="How bulk is moved; auto = splice where the system has it.",
)
@control_option
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
def run_command(  # noqa: PLR0913 - one parameter per option is click's way
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
    from forwarder.master import Master  # noqa: PLC0415 - help and usage errors need it not

    interrupt.be_raised()
    sys.exit(Master(spec).run())


@click.command("demo", short_help="Push data through a forwarder of its own, to see it work.")
@click.option("--seconds", type=click.FloatRange(min=0.1), help="End by itself after this long.")
@click.option(
    "--workers", metavar="N|auto", type=WorkerCount(), default="auto", help="Worker processes."
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
    from forwarder.cli import demo  # noqa: PLC0415 - as above

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    interrupt.be_raised()
    sys.exit(demo.run(workers=workers or usable_cpus(), port=port, seconds=seconds))


def usable_cpus() -> int:
    """CPUs this process may use: its affinity mask where the system has one."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _refuse_missing_splice(relay: RelayMode) -> None:
    if relay is RelayMode.SPLICE and not HAS_SPLICE:
        raise click.UsageError("this system has no splice(2); use --relay auto or --relay copy")
