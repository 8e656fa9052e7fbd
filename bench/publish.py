"""Put a run into the documentation: ``python -m bench.publish DIR`` after ``bench --out DIR``.

The pictures and the raw data go to docs/performance, the tables between two comments of
docs/PERFORMANCE.md. What is said about them outside of these is left alone.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.page import RESULTS, body, slug
from bench.run import Run, read

if TYPE_CHECKING:
    from collections.abc import Sequence

DOCS: Final = Path(__file__).parents[1] / "docs"
BEGIN: Final = "<!-- figures: python -m bench.publish -->"
END: Final = "<!-- end of figures -->"
_NEW: Final = f"""\
# Performance

How it is measured, and what the figures do not say: [bench/README.md](../bench/README.md). Every
single figure: [results.json](performance/{RESULTS}).

## Where we lead

## Where we do not, and why

## What was tried

{BEGIN}
{END}
"""


def publish(directory: Path, docs: Path) -> None:
    """Copy a run. Raises OSError or ValueError if there is none, or no place for it."""
    run = read(directory / RESULTS)
    place = docs / "performance"
    place.mkdir(exist_ok=True)
    for old in place.glob("*.svg"):
        old.unlink()
    shutil.copy(directory / RESULTS, place)
    pictures = {}
    for section in run.sections:
        name = f"{slug(section.title)}.svg"
        if (directory / name).exists():
            shutil.copy(directory / name, place)
            pictures[section.title] = f"performance/{name}"
    path = docs / "PERFORMANCE.md"
    text = path.read_text() if path.exists() else _NEW
    path.write_text(replaced(text, figures(run, pictures)))


def figures(run: Run, pictures: dict[str, str]) -> str:
    """The part of the page that is generated: the report, one level below the page."""
    lines = [f"## Measured on {run.date}", "", *body(run, pictures, level=3)]
    return "\n".join(lines)


def replaced(text: str, new: str) -> str:
    """A page with other text between the two comments. Raises ValueError if they are not there."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no place for figures: {BEGIN} ... {END}")
    return f"{head}{BEGIN}\n\n{new}\n{END}{tail}"


def main(argv: Sequence[str]) -> int:
    """Copy and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.publish", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR")
    args = parser.parse_args(argv)
    try:
        publish(args.directory, DOCS)
    except (OSError, ValueError) as err:
        print(f"bench: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
