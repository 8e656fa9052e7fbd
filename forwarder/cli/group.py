"""The command line as a whole: ``run`` may be left out, and a wrong word gets a hint.

Commands are imported when they are called.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from importlib import import_module
from typing import TYPE_CHECKING, Final

import click

from forwarder.cli.arguments import most_like

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from click.shell_completion import CompletionItem

PROGRAM: Final = "forwarder"

# Words of other programs, and the command for that here. Likeness would lead from "top" to "stop".
_MEANT: Final = {
    "backends": "upstream list",
    "configtest": "check",
    "connections": "sessions",
    "disable": "upstream disable",
    "drain": "upstream drain",
    "enable": "upstream enable",
    "info": "status",
    "list": "sessions",
    "ls": "sessions",
    "ps": "sessions",
    "quit": "stop",
    "restart": "upgrade",
    "serve": "run",
    "servers": "upstream list",
    "show": "status",
    "shutdown": "stop",
    "start": "run",
    "stats": "status",
    "test": "check",
    "top": "status",
    "upstreams": "upstream list",
    "validate": "check",
    "weight": "upstream weight",
}
# Commands that are suggested for the slip of a letter only: by mistake they cost sessions.
_NEVER_GUESSED: Final = frozenset({"kill", "stop"})


class Commands(MutableMapping[str, click.Command]):
    """Commands by name, each imported when it is wanted."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        """``modules``: for each command the module of this folder that has ``NAME_command``."""
        self._modules = dict(modules)
        self._known: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self._known:
            module = import_module(f"forwarder.cli.{self._modules[name]}")
            self._known[name] = getattr(module, f"{name}_command")
        return self._known[name]

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._known[name] = command

    def __delitem__(self, name: str) -> None:
        del self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._known or name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter({**self._modules, **self._known})

    def __len__(self) -> int:
        return len({**self._modules, **self._known})


def with_control(command: click.Command, control: str, ctx: click.Context) -> dict[str, object]:
    """Defaults of a command, or of each of a group, that asks the instance at ``control``.

    The command's own option wins over it. Raises click.UsageError for one that asks no instance.
    """
    if isinstance(command, click.Group):
        return {name: with_control(one, control, ctx) for name, one in command.commands.items()}
    if all(parameter.name != "control" for parameter in command.params):
        raise click.UsageError(f"{command.name} asks no instance: leave out --control", ctx)
    return {"control": control}


class RunByDefault(click.Group):
    """``forwarder -c FILE`` means ``forwarder run -c FILE``, as users of rinetd and oi type it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``run`` where it was left out: before the first option that is not of the group."""
        own = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        at = 0
        while at < len(args) and args[at].startswith("--control"):
            at += 1 if "=" in args[at] else 2
        if at < len(args) and args[at].startswith("-") and args[at] not in own:
            self._refuse_unknown(ctx, args[at], own)
            args = [*args[:at], "run", *args[at:]]
        elif args and at == len(args):
            args = [*args, "run"]
        return super().parse_args(ctx, args)

    def _refuse_unknown(self, ctx: click.Context, word: str, own: set[str]) -> None:
        """Refuse an unknown option that looks like one of the group, unknown to ``run``."""
        name = word.partition("=")[0]
        of_run = {opt for parameter in self.commands["run"].params for opt in parameter.opts}
        if not name.startswith("--") or any(option.startswith(name) for option in of_run):
            return
        near = most_like(name, own | of_run)
        if near and near[0] in own - of_run:
            raise click.NoSuchOption(name, possibilities=near, ctx=ctx)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; for an unknown word suggest one."""
        word = args[0]
        if word in self.commands or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        guessed = sorted(self.commands.keys() - _NEVER_GUESSED)
        near = [_MEANT[word]] if word in _MEANT else most_like(word, guessed)
        # A slip of one letter, and no word of its own.
        near = near or most_like(word, _NEVER_GUESSED, cutoff=0.85)
        hint = (
            f"did you mean {near[0]!r}?"
            if near
            else f"there are: {', '.join(sorted(self.commands))}"
        )
        raise click.UsageError(f"No such command {word!r}; {hint}", ctx)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the options of ``run``, too, where its name may be left out."""
        found = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-"):
            known = {item.value for item in found}
            of_run = self.commands["run"].shell_complete(ctx, incomplete)
            found += [item for item in of_run if item.value not in known]
        return found


def _group_of(ctx: click.Context) -> click.Group:
    group = ctx.find_root().command
    assert isinstance(group, click.Group)  # noqa: S101 - it is what main has made
    return group


@click.command("help", short_help="Show the help of a command.")
@click.argument("command", metavar="[COMMAND]", required=False)
@click.pass_context
def help_command(ctx: click.Context, command: str | None) -> None:
    """Show the help of a command, or of all together."""
    root, group = ctx.find_root(), _group_of(ctx)
    if command is None:
        click.echo(root.get_help())
        return
    name, found, _ = group.resolve_command(root, [command])
    if found is not None:
        with click.Context(found, info_name=name, parent=root) as inner:
            click.echo(found.get_help(inner))
