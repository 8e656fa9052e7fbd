"""The man pages are up to date, well formed, and name every key and option there is."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest
from support.programs import debian

from forwarder.cli.main import cli
from forwarder.config.keys import OF_CHECKS
from forwarder.config.toml_check import CHECK_KEYS
from forwarder.config.toml_conf import ACCESS_KEYS, LOG_KEYS, RULE_KEYS, TOP_KEYS
from forwarder.config.toml_upstreams import GROUP_KEYS, SERVER_KEYS

if TYPE_CHECKING:
    from collections.abc import Iterator

MAN = Path(__file__).parents[2] / "docs" / "man"
PAGES = ["forwarder.8", "forwarder.toml.5"]


def test_the_pages_are_made_of_what_the_documentation_says_now() -> None:
    """Result: when this fails, `make man` mends it."""
    ran = subprocess.run(
        [sys.executable, str(MAN / "generate.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")


@debian("man", "groff")
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_formatted_without_a_warning(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANWIDTH", "80")
    monkeypatch.setenv("MANROFFSEQ", "")
    command = ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", str(MAN / name)]
    ran = subprocess.run(command, capture_output=True, check=False)
    assert (ran.returncode, ran.stderr.decode()) == (0, "")
    assert len(ran.stdout) > 5000


def subsections(name: str) -> dict[str, str]:
    """Text by heading, as a reader sees both."""
    text = (MAN / name).read_text()
    parts = re.split(r'^\.S[HS] "?(.*?)"?$', text, flags=re.MULTILINE)
    return {plain(title): body for title, body in zip(parts[1::2], parts[2::2], strict=True)}


def plain(text: str) -> str:
    return re.sub(r"\\f[BIR]", "", text).replace("\\-", "-")


@pytest.mark.parametrize(
    ("heading", "keys"),
    [
        ("Top level", TOP_KEYS),
        ("In a [[forwarding_rules]] table", RULE_KEYS),
        ("In a [[groups]] table", GROUP_KEYS),
        ("In a server table", SERVER_KEYS),
        ("In a check table", CHECK_KEYS),
        ("In the [checks] table", tuple(OF_CHECKS)),
        ("In a [[logs]] table", LOG_KEYS),
        ("In a [[global_rules]] or [[forwarding_rules.rules]] table", ACCESS_KEYS),
    ],
)
def test_the_page_of_the_file_has_every_key_and_no_other(
    heading: str, keys: tuple[str, ...]
) -> None:
    body = subsections("forwarder.toml.5")[heading]
    assert set(re.findall(r"^\.TP\n\.B (\S+)$", body, flags=re.MULTILINE)) == set(keys)


def test_the_page_of_the_command_has_every_command_and_option_and_no_other() -> None:
    found = {
        " ".join(takewhile(is_a_name, title.split()[1:])): options_in(body)
        for title, body in subsections("forwarder.8").items()
        if title.startswith("forwarder ")
    }
    assert found == {name: options_of(command) for name, command in commands_of(cli)}
    assert options_in(subsections("forwarder.8")["Options without a command"]) == {
        *options_of(cli),
        "-h",
        "--help",
    }


def is_a_name(word: str) -> bool:
    """Whether a word of a usage is a part of the name of a command, and no argument."""
    return word.isalpha() and word.islower()


def commands_of(group: click.Group, before: str = "") -> Iterator[tuple[str, click.Command]]:
    """All commands by their names, those of groups too."""
    for name, command in group.commands.items():
        yield before + name, command
        if isinstance(command, click.Group):
            yield from commands_of(command, f"{before}{name} ")


def options_in(body: str) -> set[str]:
    lines = [plain(line) for line in re.findall(r"^\.TP\n(.*)$", body, flags=re.MULTILINE)]
    return {word for line in lines for word in re.findall(r"(?<![\w-])-{1,2}[a-zA-Z][a-z-]*", line)}


def options_of(command: click.Command) -> set[str]:
    parameters = [item for item in command.params if isinstance(item, click.Option)]
    return {name for parameter in parameters for name in parameter.opts}


def test_every_option_says_what_it_does() -> None:
    for _, command in commands_of(cli):
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (command.name, parameter.name)
