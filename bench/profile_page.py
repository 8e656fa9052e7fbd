"""What was found by profiling, as Markdown and as one HTML page. Pure, but for writing them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Final

from bench.counters import HARDWARE
from bench.judgement import judge
from bench.page import bullets, document, picture
from bench.report import Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from bench.counters import Call
    from bench.judgement import Finding, Seen

_CALLS: Final = 15  # in the table; the rest is noise, as a rule
TITLES: Final = {
    "perf": "CPU, by perf record -F 199 -g",
    "py-spy": "Python and what it calls, by py-spy record --native",
}


@dataclass(slots=True)
class Profile:
    """What was found about one peer under one load; what could not be looked at is empty.

    ``graphs`` are SVG documents by the tool; ``notes`` what is missing, and why.
    """

    name: str
    title: str
    peer: str
    seconds: int
    unit: str
    units: float = 0.0
    figures: Mapping[str, float] = field(default_factory=dict)
    seen: Seen | None = None
    counted: Mapping[str, float | None] = field(default_factory=dict)
    samples: int = 0
    kinds: Mapping[str, float] = field(default_factory=dict)
    hottest: Sequence[tuple[str, float]] = ()
    folded: str = ""
    calls: Sequence[Call] = ()
    graphs: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def heading(self) -> str:
        return f"{self.peer} under {self.name}: {self.title}"

    def findings(self) -> list[Finding]:
        """The result in words."""
        return judge(replace(self.seen, kinds=self.kinds)) if self.seen else []

    def remarks(self) -> list[str]:
        """What has to be known to read the tables."""
        found = list(self.notes)
        if self.counted and all(self.counted.get(event) is None for event in HARDWARE):
            found.append(
                "this machine counts no hardware events, as is usual of a virtual one, so perf "
                "samples by a clock, whose interrupt waits while the kernel keeps interrupts off: "
                "that time shows at the function that lets them in again, as "
                "_raw_spin_unlock_irqrestore and finish_task_switch do"
            )
        return found

    def tables(self) -> Iterator[Table]:
        """Those that there is something for."""
        if self.seen:
            rows = [(name, f"{share:.0%}") for name, share in self.seen.threads]
            rows.append(("all CPUs of the machine, by anybody", f"{self.seen.machine:.0%}"))
            yield Table("Share of a CPU", [["thread", ""], *rows])
        if self.kinds:
            rows = [(kind, f"{share:.0%}") for kind, share in self.kinds.items()]
            yield Table(f"{self.samples:,} samples, by what was done", [["", ""], *rows])
            rows = [(name, f"{share:.1%}") for name, share in self.hottest]
            yield Table("Functions with most samples of their own", [["", ""], *rows])
        if self.counted:
            yield Table(
                "Counters, by perf stat", [["", "", f"for each {self.unit}"], *self._counters()]
            )
        if self.calls:
            most = [
                (call.name, f"{call.count:,}", f"{call.errors:,}", f"{call.time_percent:.1f}")
                for call in self.calls[:_CALLS]
            ]
            head = ["", "calls", "of which failed", "% of the time in calls"]
            yield Table("System calls, by strace -f -c, which slows the program", [head, *most])

    def _counters(self) -> Iterator[tuple[str, str, str]]:
        for event, count in self.counted.items():
            if count is None:
                yield event, "not supported", ""
            else:
                name = f"{event}, ms" if event == "task-clock" else event
                yield name, f"{count:,.0f}", f"{count / self.units:,.3f}"
        cycles, instructions = self.counted.get("cycles"), self.counted.get("instructions")
        if cycles and instructions:
            yield "instructions per cycle", f"{instructions / cycles:.2f}", ""


def markdown(facts: Sequence[str], profiles: Sequence[Profile]) -> str:
    """The page; the graphs are files beside it."""
    lines = ["# Profiles", "", *(f"- {fact}" for fact in facts), ""]
    for profile in profiles:
        lines += [f"## {profile.heading}", ""]
        lines += [f"- **{finding.name}**: {finding.answer}" for finding in profile.findings()]
        lines += [f"- {remark}" for remark in profile.remarks()]
        lines.append("")
        lines += [table.as_markdown() for table in profile.tables()]
        for tool in profile.graphs:
            lines += [f"### {TITLES[tool]}", "", f"![{tool}]({graph_name(profile, tool)})", ""]
    return "\n".join(lines)


def html(facts: Sequence[str], profiles: Sequence[Profile]) -> str:
    """The page, with the graphs in it."""
    parts = [bullets(facts)]
    for profile in profiles:
        parts.append(f"<h2>{escape(profile.heading)}</h2>")
        words = [f"{finding.name}: {finding.answer}" for finding in profile.findings()]
        parts.append(bullets([*words, *profile.remarks()]))
        parts += [table.as_html() for table in profile.tables()]
        for tool, svg in profile.graphs.items():
            parts.append(f"<h3>{escape(TITLES[tool])}</h3>")
            parts.append(picture(svg, f"{profile.heading}: {tool}", is_live=True))
    return document("Profiles", parts)


def graph_name(profile: Profile, tool: str) -> str:
    """The file of a graph."""
    return f"{profile.peer}-{profile.name}-{tool}.svg"


def write(facts: Sequence[str], profiles: Sequence[Profile], directory: Path) -> None:
    """Write the page twice, the graphs, and the folded stacks for other renderers."""
    directory.mkdir(parents=True, exist_ok=True)
    for profile in profiles:
        for tool, svg in profile.graphs.items():
            (directory / graph_name(profile, tool)).write_text(svg)
        if profile.folded:
            (directory / f"{profile.peer}-{profile.name}.folded").write_text(profile.folded)
    (directory / "profile.md").write_text(markdown(facts, profiles))
    (directory / "profile.html").write_text(html(facts, profiles))
