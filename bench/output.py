"""Where a report goes: the page, its Markdown, the pictures, and the raw data beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import page
from bench.pictures import draw

if TYPE_CHECKING:
    from pathlib import Path

    from bench.run import Run


def write(run: Run, directory: Path) -> None:
    """Write everything into a directory, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    run.write(directory / page.RESULTS)
    pictures = draw(run)
    names = {title: f"{page.slug(title)}.svg" for title in pictures}
    for title, svg in pictures.items():
        (directory / names[title]).write_text(svg)
    (directory / "report.md").write_text(page.markdown(run, names))
    (directory / "report.html").write_text(page.html(run, pictures))
