"""Writes the man pages beside this file: ``python docs/man/generate.py``.

Nothing is written twice: forwarder.toml(5) is docs/configuration.md, forwarder(8) is what the
commands say of themselves and parts of docs/command-line.md, with the README's example. With
``--check`` it writes nothing and fails if a page is not what it should be.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from forwarder import __version__
from forwarder.cli.main import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]

_INLINE: Final = re.compile(
    r"`([^`]+)`|\*\*([^*]+)\*\*|\[([^\]]+)\]\([^)]*\)|(?<![*\w])\*([^*\s][^*]*)\*"
)
# Of configuration.md: what is about another file, or about this one as a document.
_LEFT_OUT: Final = ("rinetd.conf",)
_KEY_TABLES: Final = ("key", "statement", "option")

_OPENING: Final = """\
.SH NAME
forwarder \\- forward TCP and UDP ports
.SH SYNOPSIS
.B forwarder
.RB [ run ]
.BR \\-c \\~\\c
.I FILE
.RI [ OPTION ]...
.br
.B forwarder
.RB [ run ]
.BR \\-l \\~\\c
.I ADDR
.BR \\-r \\~\\c
.I ADDR
.RI [ OPTION ]...
.br
.B forwarder
.I COMMAND
.RI [ OPTION ]...
.SH DESCRIPTION
.B forwarder
accepts connections and datagrams on some addresses and forwards them to others.
One master process supervises one worker for each CPU.
A file says what to forward, see
.BR forwarder.toml (5);
a name that does not end in .toml is read as rinetd.conf.
It stays in the foreground and logs to standard error.
.SH COMMANDS
Without the name of a command it is
.BR run .
"""
_CLOSING: Final = """\
.SH ENVIRONMENT
.TP
.BR RUNTIME_DIRECTORY ", " XDG_RUNTIME_DIR
Where an instance makes its control socket and commands look for it, unless
.B control
or
.B \\-\\-control
names another place.
.TP
.BR LISTEN_FDS ", " LISTEN_PID
Listening sockets of a service manager. The rules with their addresses use them.
.TP
.BR NOTIFY_SOCKET ", " WATCHDOG_USEC
Where the master notifies a service manager of readiness, reloads, its end and signs of life:
.BR sd_notify (3).
.SH FILES
.TP
.I /run/forwarder/control.sock
The control socket of an instance of root.
Others have theirs in
.IR $RUNTIME_DIRECTORY ,
.I $XDG_RUNTIME_DIR/forwarder
or
.IR /tmp/forwarder-UID .
.SH EXAMPLES
Forward a port of this host to a web server, with one worker per CPU:
.PP
.EX
forwarder \\-l 0.0.0.0:8080 \\-r 10.0.0.1:80
.EE
.PP
Check a file before it is used, see what a reload would change, and reload:
.PP
.EX
forwarder check \\-c /etc/forwarder/forwarder.toml
forwarder diff /etc/forwarder/forwarder.toml new.toml
forwarder reload
.EE
.PP
List the sessions of a rule, and end all of them:
.PP
.EX
forwarder sessions \\-\\-rule web
forwarder kill \\-\\-rule web \\-\\-yes
.EE
.PP
Have another worker go on with them:
.PP
.EX
forwarder move \\-\\-rule web \\-\\-to 1
.EE
.SH SEE ALSO
.BR forwarder.toml (5),
.BR rinetd (8),
.BR systemd.socket (5)
"""


# -- text


def escape(text: str) -> str:
    """Text as roff shows it; a minus is one that can be copied."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return text.replace("~", "\\(ti").replace("^", "\\(ha").replace("'", "\\(aq")


def inline(text: str) -> str:
    """A line of Markdown without its signs."""
    parts, end = [], 0
    for match in _INLINE.finditer(text):
        parts.append(escape(text[end : match.start()]))
        code, strong, link, stressed = match.groups()
        if link:
            parts.append(inline(link))
        else:
            parts.append(f"\\fB{escape(code or strong)}\\fR" if not stressed else "")
            parts.append(f"\\fI{escape(stressed)}\\fR" if stressed else "")
        end = match.end()
    return "".join(parts) + escape(text[end:])


def paragraph(lines: list[str]) -> list[str]:
    """Running text. Signs that go over the end of a line are joined first."""
    joined = inline(" ".join(line.strip() for line in lines))
    found = [line for line in re.split(r"(?<=[.:;]) +(?=\S)", joined) if line]
    return [f"\\&{line}" if line[0] in ".'" else line for line in found]


# -- Markdown


def sections(markdown: str) -> Iterator[tuple[int, str, list[str]]]:
    """Depth, title and lines of each section below the title of the document."""
    depth, title, lines = 1, "", []
    in_code = False
    for line in markdown.split("\n"):
        in_code ^= line.startswith("```")
        match = None if in_code else re.match(r"(#+) (.*)", line)
        if match is None:
            lines.append(line)
            continue
        yield depth, title, lines
        depth, title, lines = len(match[1]), match[2], []
    yield depth, title, lines


def body(lines: list[str]) -> Iterator[str]:
    """The blocks of a section."""
    for block in blocks(lines):
        first = block[0]
        if first.startswith("```"):
            yield from (".PP", ".EX", *(escape(line) or ".sp" for line in block[1:-1]), ".EE")
        elif first.startswith("|"):
            yield from table(block)
        elif match := re.match(r"(?:[-*]|[0-9]+\.) +", first):
            mark = "\\(bu" if first[0] in "-*" else first.split()[0]
            yield f".IP {mark} 4"
            yield from paragraph([first[match.end() :], *block[1:]])
        else:
            yield from (".PP", *paragraph(block))


def blocks(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines that belong together: a paragraph, an item of a list, a table, code."""
    block: list[str] = []
    in_code = False
    for line in lines:
        if line.startswith("```"):
            in_code = not in_code
            if not in_code:
                yield [*block, line]
                block = []
                continue
        is_new = not in_code and (not line.strip() or re.match(r"(?:[-*]|[0-9]+\.) |<!--", line))
        if (is_new or line.startswith("```")) and block and (not in_code or block[0] != "```"):
            yield block
            block = []
        if in_code or (line.strip() and not line.startswith("<!--")):
            block.append(line)
    if block:
        yield block


def table(rows: list[str]) -> Iterator[str]:
    """A table as a list: the first cell is what the others are about."""
    header, *cells = (
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row.strip()[1:-1])]
        for row in rows
        if "|---" not in row
    )
    for first, *rest in cells:
        yield ".TP"
        yield inline(first).replace("\\fR", "").replace("\\fB", ".B ", 1).replace("\\fB", "")
        if header[0] in _KEY_TABLES:
            yield from key(dict(zip(header[1:], rest, strict=True)))
        else:
            told = [f"{name}: {cell}" for name, cell in zip(header[1:], rest, strict=False)]
            yield from paragraph([rest[0] if len(rest) == 1 else "; ".join(told)])


def key(cells: dict[str, str]) -> list[str]:
    """What a key is: meaning first, then its kind and default, and an example."""
    kind = ", ".join(cell for cell in (cells["type"], cells["unit"]) if cell)
    lines = paragraph([f"{cells['meaning']}."]) if cells["meaning"] else []
    lines += paragraph([f"({kind}; default: {cells['default']}; since {cells['since']})"])
    return [*lines, ".br", *paragraph([f"Example: {cells['example']}"])]


def section_of(markdown: str, wanted: str) -> list[str]:
    """The blocks of one section."""
    return next(list(body(lines)) for _, title, lines in sections(markdown) if title == wanted)


# -- the pages


def heading(name: str, number: int) -> str:
    """The first line of a page."""
    comment = '.\\" Made by docs/man/generate.py; changes belong into what it reads.\n'
    return f'{comment}.TH {name} {number} "" "forwarder {__version__}"\n'


def page_toml() -> str:
    """forwarder.toml(5)."""
    lines = [heading("forwarder.toml", 5) + ".SH NAME"]
    lines += ["forwarder.toml \\- configuration of forwarder(8)", ".SH DESCRIPTION"]
    is_left_out = False
    for depth, title, content in sections((ROOT / "docs" / "configuration.md").read_text()):
        if depth == 2:
            is_left_out = title in _LEFT_OUT
        if is_left_out:
            continue
        if depth == 2:
            lines.append(f'.SH "{inline(title).upper()}"')
        elif depth == 3:
            lines.append(f'.SS "{inline(title)}"')
        lines += body(content)
    lines += [".SH EXAMPLE", *example(), ".SH SEE ALSO", ".BR forwarder (8)"]
    return "\n".join(lines) + "\n"


def example() -> list[str]:
    """The configuration of the README's first screen."""
    readme = (ROOT / "README.md").read_text()
    found = re.search(r"^```toml.*?\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert found is not None  # noqa: S101 - a page without it is not to be made
    return [".EX", *(escape(line) or ".sp" for line in found[1].splitlines()), ".EE"]


def page_command() -> str:
    """forwarder(8)."""
    page = (ROOT / "docs" / "command-line.md").read_text()
    context = click.Context(cli, info_name="forwarder")
    lines = []
    for name in cli.list_commands(context):
        lines += command(cli.commands[name], "forwarder")
    lines += [".SS Options without a command", *options(cli)]
    lines += [".TP", ".B \\-h, \\-\\-help", "Show the options, also behind a command."]
    lines += [".SH SIGNALS", *section_of(page, "Signals to the master")]
    lines += [".SH EXIT STATUS", *section_of(page, "Exit codes")]
    return heading("forwarder", 8) + _OPENING + "\n".join(lines) + "\n" + _CLOSING


# Written out here, and not as click does, which has changed its ways from version to version.
def command(found: click.Command, of: str) -> list[str]:
    """A command of ``of``: how it is called, what it says of itself, its options.

    After a group come its commands, in the order in which they are defined.
    """
    arguments = [
        metavar(parameter) for parameter in found.params if isinstance(parameter, click.Argument)
    ]
    name = f"{of} {found.name}"
    usage = escape(" ".join((name, *arguments)))
    told = inspect.cleandoc(found.help or "").split("\n\n")
    text = [line for part in told for line in (".PP", *paragraph(part.split("\n")))][1:]
    lines = [f'.SS "{usage}"', *text, *options(found)]
    for one in found.commands.values() if isinstance(found, click.Group) else ():
        lines += command(one, name)
    return lines


def options(found: click.Command) -> list[str]:
    """The options of a command."""
    lines = []
    for parameter in found.params:
        if isinstance(parameter, click.Option):
            value = "" if parameter.is_flag else f" \\fI{escape(metavar(parameter))}\\fR"
            lines += [".TP", f"\\fB{escape(', '.join(parameter.opts))}\\fR{value}"]
            lines += paragraph([parameter.help or ""])
            if parameter.show_default:
                lines += paragraph([f"Default: {parameter.default}."])
    return lines


def metavar(parameter: click.Parameter) -> str:
    """What stands for the value of a parameter."""
    if isinstance(parameter.type, click.Choice):
        return "|".join(parameter.type.choices)
    return parameter.metavar or parameter.type.name.upper().removesuffix(" RANGE")


PAGES: Final = {"forwarder.8": page_command, "forwarder.toml.5": page_toml}


def main() -> int:
    """Write the pages, or look at them."""
    stale = []
    for name, make in PAGES.items():
        path, text = HERE / name, make()
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            stale.append(name)
    if stale:
        print(f"not up to date: {', '.join(stale)}; run `make man`", file=sys.stderr)  # noqa: T201
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
