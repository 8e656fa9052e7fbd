"""Figures to tables: medians with their range, ratios round by round; Markdown and HTML. Pure.

A round that lacks a peer (the bench was cut short) is left out of that peer's figures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.loads import Figures
    from bench.measures import Figure, Measure

SUBJECT = "forwarder"  # the peer that every ratio is about


@dataclass(slots=True)
class Results:
    """Every figure: by measure, then peer, then round (0 is the first)."""

    rounds: dict[str, dict[str, dict[int, Figures]]] = field(default_factory=dict)

    def add(self, measure: str, peer: str, number: int, figures: Figures) -> None:
        self.rounds.setdefault(measure, {}).setdefault(peer, {})[number] = figures

    def values(self, measure: str, peer: str, key: str) -> dict[int, float]:
        """Return one figure of one peer by round."""
        by_round = self.rounds.get(measure, {}).get(peer, {})
        return {number: figures[key] for number, figures in by_round.items() if key in figures}

    def ratios(self, measure: str, peer: str, key: str, subject: str = SUBJECT) -> list[float]:
        """Return the subject's figure over the peer's, for each round that has both."""
        ours = self.values(measure, subject, key)
        theirs = self.values(measure, peer, key)
        return [ours[number] / theirs[number] for number in ours if theirs.get(number)]


@dataclass(frozen=True, slots=True)
class Table:
    """A heading, and cells; the first row is that of the columns."""

    heading: str
    rows: Sequence[Sequence[str]]

    def as_markdown(self, level: int = 3) -> str:
        """The table below a heading, with an empty line at its end."""
        head, *rows = self.rows
        title = f"{'#' * level} {self.heading}"
        lines = [title, "", _row(head), _row(["---"] * len(head)), *map(_row, rows)]
        return "\n".join([*lines, ""])

    def as_html(self) -> str:
        """The table as a figure."""
        head, *rows = self.rows
        lines = [f"<h3>{escape(self.heading)}</h3>", "<table>", _html_row(head, "th")]
        return "\n".join([*lines, *(_html_row(row, "td") for row in rows), "</table>"])


def rounds(count: int) -> str:
    """How many rounds, in words."""
    return f"{count} round{'' if count == 1 else 's'}"


def spread(values: Sequence[float], digits: int) -> str:
    """Write a median with its range, as ``12.3 (11.9-13.0)``; the range only from two values on."""
    if not values:
        return "-"
    middle = f"{median(values):,.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def table(measure: Measure, peers: Sequence[str], results: Results) -> Table:
    """The table of one measure: a row per peer, then the ratios of the subject to it."""
    measured = [peer for peer in peers if peer in results.rounds.get(measure.name, {})]
    columns = [
        figure
        for figure in measure.columns
        if any(results.values(measure.name, peer, figure.key) for peer in measured)
    ]
    compared = [figure for figure in columns if figure.has_ratio and SUBJECT in measured]
    head = ["", *(figure.heading for figure in columns)]
    head += [f"{SUBJECT} / this: {figure.heading}" for figure in compared]
    rows = [head]
    for peer in measured:
        cells = [_figure(results, measure, peer, figure) for figure in columns]
        ratios = [_ratio(results, measure, peer, figure) for figure in compared]
        rows.append([peer, *cells, *ratios])
    return Table(f"{measure.name}: {measure.title}", rows)


def _figure(results: Results, measure: Measure, peer: str, figure: Figure) -> str:
    return spread(list(results.values(measure.name, peer, figure.key).values()), figure.digits)


def _ratio(results: Results, measure: Measure, peer: str, figure: Figure) -> str:
    if peer == SUBJECT:
        return "-"
    return spread(results.ratios(measure.name, peer, figure.key), 2)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _html_row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
