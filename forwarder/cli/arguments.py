"""Types of arguments that several modules of commands use."""

from __future__ import annotations

from typing import Final

import click

# For the completion of names. Whether a file can be read is found by reading it, which says more.
FILE: Final = click.Path(readable=False)
