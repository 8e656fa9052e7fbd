"""The command line as a whole: ``run`` may be left out, and a wrong word gets a hint."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# Words of other programs, and the command for that here. Likeness would lead from "top" to "stop".
_MEANT: Final = {
    "configtest": "check",
    "connections": "sessions",
    "info": "status",
    "list": "sessions",
    "ls": "sessions",
    "ps": "sessions",
    "quit": "stop",
    "restart": "upgrade",
    "serve": "run",
    "show": "status",
    "shutdown": "stop",
    "start": "run",
    "stats": "status",
    "test": "check",
    "top": "status",
    "validate": "check",
}
# Commands that are suggested for the slip of a letter only: by mistake they cost sessions.
_NEVER_GUESSED: Final = frozenset({"kill", "stop"})


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
        near = get_close_matches(name, own | of_run, 1)
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
        near = [_MEANT[word]] if word in _MEANT else get_close_matches(word, guessed, 1)
        # A slip of one letter, and no word of its own.
        near = near or get_close_matches(word, _NEVER_GUESSED, 1, 0.85)
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
