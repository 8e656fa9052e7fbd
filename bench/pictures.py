"""Pictures of a run, as SVG, by matplotlib (the extra ``bench``)."""

from __future__ import annotations

import io
from statistics import median
from typing import TYPE_CHECKING, Final

import matplotlib as mpl

mpl.use("svg")
# So that the same figures give the same file.
mpl.rcParams["svg.hashsalt"] = "forwarder"

from matplotlib.figure import Figure as Canvas  # noqa: E402 - after the choice of a backend

from bench.measures import BY_NAME, HELD, RR_SHAPES, STREAMS, rr_name  # noqa: E402
from bench.parts import BESIDE, BY_SHAPE, BY_STREAMS  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes

    from bench.run import Run, Section

COLOURS: Final = {
    "direct": "#9a9a9a",
    "forwarder": "#d1242f",
    "forwarder-copy": "#e8868c",
    "forwarder-1": "#f2b5b9",
    "forwarder-4": "#8f1a22",
    "forwarder-1000-rules": "#5e1117",
    "rinetd": "#7d5a9e",
    "haproxy": "#1f6feb",
    "haproxy-copy": "#8fb8f5",
    "nginx": "#1a7f37",
    "socat": "#b08800",
    "oi": "#bf5af2",
}


def draw(run: Run) -> dict[str, str]:
    """One picture for each section that has figures, by its title."""
    return {
        section.title: _svg(_DRAWN.get(section.title, _bars)(section))
        for section in run.sections
        if section.results.rounds
    }


def _svg(canvas: Canvas) -> str:
    out = io.StringIO()
    canvas.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _canvas(count: int, columns: int, height: float) -> tuple[Canvas, list[Axes]]:
    rows = -(-count // columns)
    canvas = Canvas(figsize=(4.2 * columns, height * rows), layout="constrained")
    axes = list(canvas.subplots(rows, columns, squeeze=False).flat)
    for empty in axes[count:]:
        empty.set_axis_off()
    return canvas, axes


def _bars(section: Section) -> Canvas:
    """A chart for each measure's first figure and its CPU, a bar for each peer with its range."""
    charts = []
    for name in section.measures:
        measure, by_peer = BY_NAME[name], section.results.rounds.get(name)
        if by_peer:
            keys = [measure.figures[0], *(c for c in measure.columns if c.key == "cpu")]
            charts += [(name, figure) for figure in keys]
    canvas, axes = _canvas(len(charts), 4, 2.6)
    for axis, (name, figure) in zip(axes, charts, strict=False):
        found = {
            peer: sorted(section.results.values(name, peer, figure.key).values())
            for peer in reversed(section.peers)
        }
        found = {peer: values for peer, values in found.items() if values}
        middles = [median(values) for values in found.values()]
        below = [m - v[0] for m, v in zip(middles, found.values(), strict=True)]
        above = [v[-1] - m for m, v in zip(middles, found.values(), strict=True)]
        colours = [COLOURS.get(peer, "#555") for peer in found]
        axis.barh(list(found), middles, xerr=[below, above], color=colours, error_kw={"lw": 0.8})
        axis.set_title(f"{name}: {figure.heading}", fontsize=9)
        axis.tick_params(labelsize=8)
    return canvas


def _by_streams(section: Section) -> Canvas:
    canvas, axes = _canvas(2, 2, 3.4)
    names = [f"bulk{count}" for count in STREAMS]
    for axis, key, label in zip(axes, ("gbit_s", "cpu"), ("Gbit/s", "CPU-s/GB"), strict=True):
        _lines(axis, section, STREAMS, names, key)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("streams")
        axis.set_ylabel(label)
    _legend(axes[0])
    return canvas


def _by_shape(section: Section) -> Canvas:
    counts = sorted({count for count, _ in RR_SHAPES})
    sizes = sorted({size for _, size in RR_SHAPES})
    canvas, axes = _canvas(2 * len(counts), len(counts), 3.0)
    for number, count in enumerate(counts):
        names = [rr_name(count, size) for size in sizes]
        for axis, key, label in (
            (axes[number], "per_s", "requests/s"),
            (axes[number + len(counts)], "p99_us", "p99, us"),
        ):
            _lines(axis, section, sizes, names, key)
            axis.set_yscale("log")
            axis.set_title(f"{count} connections", fontsize=9)
            axis.set_xlabel("bytes")
            axis.set_ylabel(label)
    _legend(axes[0])
    return canvas


def _by_held(section: Section) -> Canvas:
    charts = (
        ("bulk8", "gbit_s", "Gbit/s"),
        ("rr", "per_s", "requests/s"),
        ("rr", "p99_us", "p99, us"),
    )
    canvas, axes = _canvas(len(charts), 3, 3.2)
    for axis, (name, key, label) in zip(axes, charts, strict=True):
        _lines(axis, section, HELD, [f"{name}+{count}" for count in HELD], key)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("idle sessions beside")
        axis.set_ylabel(f"{name}: {label}")
    _legend(axes[0])
    return canvas


def _legend(axis: Axes) -> None:
    if axis.get_lines():  # a run that was cut short may have nothing to tell apart
        axis.legend(fontsize=7)


def _lines(
    axis: Axes, section: Section, places: Sequence[int], names: Sequence[str], key: str
) -> None:
    """A line for each peer through its medians."""
    for peer in section.peers:
        found = [list(section.results.values(name, peer, key).values()) for name in names]
        points = [(x, median(v)) for x, v in zip(places, found, strict=True) if v]
        if points:
            axis.plot(
                *zip(*points, strict=True), "o-", ms=3, lw=1.2, label=peer, color=COLOURS.get(peer)
            )
    axis.set_xscale("log")
    axis.set_xticks(places, [f"{place:,}" for place in places])
    axis.set_xticks([], minor=True)
    axis.tick_params(labelsize=8)


_DRAWN: Final[dict[str, Callable[[Section], Canvas]]] = {
    BY_STREAMS: _by_streams,
    BY_SHAPE: _by_shape,
    BESIDE: _by_held,
}
