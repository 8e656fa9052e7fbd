"""Arguments and options that several modules of commands use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

# For the completion of names. Whether a file can be read is found by reading it, which says more.
FILE: Final = click.Path(readable=False)


def control_option(command: Callable[..., None]) -> Callable[..., None]:
    """The option that says where the control socket is."""
    option = click.option(
        "--control", metavar="PATH", type=FILE, help="The control socket of the instance."
    )
    return option(command)


def most_like(
    word: str, possible: Collection[str], count: int = 1, cutoff: float = 0.6
) -> list[str]:
    """Those that are most like a word, if any are."""
    from difflib import get_close_matches  # noqa: PLC0415 - it costs more than most commands

    return get_close_matches(word, possible, count, cutoff)
