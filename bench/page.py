"""A run as Markdown and as one HTML page that needs no other file. Pure.

Pictures are SVG, by the title of their section.
"""

from __future__ import annotations

import base64
import re
from html import escape
from typing import TYPE_CHECKING, Final

from bench.measures import BY_NAME
from bench.report import rounds, table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from bench.report import Table
    from bench.run import Run, Section

_STYLE: Final = """\
body { font: 15px/1.5 sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px; margin-bottom: 1.5em }
th, td { border: 1px solid #ccc; padding: .2em .6em; text-align: right }
th:first-child, td:first-child { text-align: left }
th { background: #f3f3f3 }
pre { background: #f6f6f6; padding: .8em; overflow-x: auto; font-size: 12px }
img, object { max-width: 100%; height: auto }
"""
EXPLAINED: Final = (
    "A figure is the median of the rounds, with minimum and maximum. The columns with a ratio are "
    "computed round by round, then the median is taken: above 1 is better for rates, below 1 for "
    "CPU, memory and latency. System calls, where there are any, are from a pass of their own."
)
RELOADS: Final = "Reloads under load"
RESULTS: Final = "results.json"  # the raw data, beside the page


def tables(section: Section) -> Iterator[Table]:
    """One for each measure that has figures."""
    for name in section.measures:
        if section.results.rounds.get(name):
            yield table(BY_NAME[name], section.peers, section.results)


def markdown(run: Run, pictures: Mapping[str, str] | None = None) -> str:
    """The report; ``pictures`` are places of files."""
    return "\n".join([f"# Measured on {run.date}", "", *body(run, pictures or {})])


def body(run: Run, pictures: Mapping[str, str], level: int = 2) -> list[str]:
    """The lines of the report below its title; its parts have headings of a level."""
    mark = "#" * level
    lines = [*(f"- {line}" for line in _facts(run)), "", EXPLAINED, ""]
    for section in run.sections:
        lines += [f"{mark} {section.title}", "", _how(section), ""]
        if section.title in pictures:
            lines += [f"![{section.title}]({pictures[section.title]})", ""]
        lines += [found.as_markdown(level + 1) for found in tables(section)]
    if run.reloads:
        lines += [f"{mark} {RELOADS}", "", run.reloads.table().as_markdown(level + 1)]
    lines += [f"{mark} Settings", ""]
    for name, (version, settings) in run.peers.items():
        lines += [f"{mark}# {name}", "", version or "-", "", "```text", settings, "```", ""]
    return lines


def html(run: Run, pictures: Mapping[str, str]) -> str:
    """The report as a page; ``pictures`` are SVG documents."""
    parts = [bullets(_facts(run)), f"<p>{escape(EXPLAINED)}</p>"]
    for section in run.sections:
        parts += [f"<h2>{escape(section.title)}</h2>", f"<p>{escape(_how(section))}</p>"]
        if section.title in pictures:
            parts.append(picture(pictures[section.title], section.title))
        parts += [found.as_html() for found in tables(section)]
    if run.reloads:
        parts += [f"<h2>{RELOADS}</h2>", run.reloads.table().as_html()]
    parts.append("<h2>Settings</h2>")
    for name, (version, settings) in run.peers.items():
        parts.append(f"<h3>{escape(name)}</h3><p>{escape(version)}</p>")
        parts.append(f"<pre>{escape(settings)}</pre>")
    return document(f"forwarder and its peers, {run.date}", parts)


def document(title: str, parts: Iterable[str]) -> str:
    """A page of its own."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    top = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n<h1>{escape(title)}</h1>'
    return "\n".join([top, *parts, "</body></html>", ""])


def picture(svg: str, title: str, *, is_live: bool = False) -> str:
    """A picture that is part of the page.

    As a file of its own in a data URL, for the ids of two pictures in one document are the same.
    One with a script in it is live only as an object.
    """
    url = f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
    if is_live:
        return f'<object type="image/svg+xml" data="{url}">{escape(title)}</object>'
    return f'<img alt="{escape(title)}" src="{url}">'


def slug(title: str) -> str:
    """A title as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def bullets(lines: Iterable[str]) -> str:
    """A list."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _facts(run: Run) -> list[str]:
    lines = [f"{key}: {value}" for key, value in run.machine.items()]
    if run.absent:
        lines.append(f"not installed here, so not measured: {', '.join(run.absent)}")
    lines += [f"went wrong: {failure}" for failure in run.failures]
    return lines


def _how(section: Section) -> str:
    return f"{rounds(section.rounds)} of {section.seconds} s for each load."
