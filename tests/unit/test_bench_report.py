"""Figures on their way into tables, pages, files and back."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from bench import compare, page, parts, publish
from bench.__main__ import parse_args
from bench.measures import BY_NAME, EVERY
from bench.peers import all_peers, is_here
from bench.reloads import Reloads
from bench.report import Results, spread, table
from bench.rounds import CALLS_ROUND, fits
from bench.run import Run, Section, read

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FORWARDER = ["/bin/true"]  # is always there; nothing is started here
PEERS = all_peers(FORWARDER)
PICTURE = (
    '<?xml version="1.0"?><!DOCTYPE svg><svg xmlns="http://www.w3.org/2000/svg"><g id="a"/></svg>'
)


def section(title: str = "Measured", figures: Sequence[float] = (8.0, 10.0, 12.0, 14.0)) -> Section:
    """Four rounds of one measure: direct is twice as fast as the forwarder."""
    results = Results()
    for number, gbit_s in enumerate(figures):
        results.add("bulk1", "direct", number, {"gbit_s": 2 * gbit_s})
        results.add("bulk1", "forwarder", number, {"gbit_s": gbit_s, "cpu": 1 / gbit_s})
    results.add("bulk1", "forwarder", CALLS_ROUND, {"calls": 33.0})
    return Section(title, len(figures), 1, ["bulk1"], ["direct", "forwarder"], results)


def whole_run() -> Run:
    """One with everything in it, and with characters that HTML has a use for."""
    reloads = Reloads(50, 10, 1000)
    counts = {"served": 9, "refused": 0, "reset": 1, "cut": 0, "wrong": 0, "late": 0}
    reloads.add("nginx", {**counts, "seconds": 10, "left": 2})
    return Run(
        date="2026-01-02 03:04 UTC",
        machine={"kernel": "Linux <6>"},
        peers={"direct": ["", "none"], "forwarder": ["1.0", "a < b & c"]},
        absent=["oi"],
        failures=["bulk1 socat: <gone>"],
        sections=[section(), section("Again")],
        reloads=reloads,
    )


def test_a_figure_is_the_median_with_its_range() -> None:
    assert spread([3.0, 1.0, 2.0], 1) == "2.0 (1.0-3.0)"
    assert spread([1234.5], 0) == "1,234"
    assert spread([], 1) == "-"


def test_ratios_are_computed_round_by_round_and_a_missing_round_is_left_out() -> None:
    results = section().results
    del results.rounds["bulk1"]["direct"][1]
    assert results.ratios("bulk1", "direct", "gbit_s") == [0.5, 0.5, 0.5]


def test_a_table_has_the_columns_of_which_there_is_a_figure() -> None:
    found = table(BY_NAME["bulk1"], ["direct", "forwarder", "nginx"], section().results)
    head, direct, forwarder = found.rows
    assert [*head] == [
        *("", "Gbit/s", "CPU-s/GB", "system calls/MB"),
        *("forwarder / this: Gbit/s", "forwarder / this: CPU-s/GB"),
    ]
    assert [*direct] == ["direct", "22.00 (16.00-28.00)", "-", "-", "0.50 (0.50-0.50)", "-"]
    assert forwarder[3:] == ["33.00", "-", "-"]


def test_a_table_is_the_same_in_markdown_and_in_html() -> None:
    found = table(BY_NAME["bulk1"], ["direct", "forwarder"], section().results)
    lines = found.as_markdown().splitlines()
    assert lines[0].startswith("### bulk1: ")
    assert lines[4].startswith("| direct | 22.00 (16.00-28.00) | - |")
    assert found.as_html().count("<td>") == 2 * len(found.rows[0])


def test_a_run_that_is_written_and_read_is_the_same_run(tmp_path: Path) -> None:
    run = whole_run()
    run.write(tmp_path / "run.json")
    assert read(tmp_path / "run.json") == run


@pytest.mark.parametrize("content", ["[]", "{}", '{"sections": 1, "reloads": null}', "nothing"])
def test_another_file_is_not_taken_for_a_run(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match="not the JSON of a run"):
        read(tmp_path / "run.json")


def test_the_page_names_no_other_file_and_has_everything_in_it() -> None:
    text = page.html(whole_run(), {"Measured": PICTURE})
    for place in re.findall(r'(?:src|href|data)="([^"]*)"', text):
        assert place.startswith("data:image/svg+xml;base64,")
    assert text.count("<img ") == 1
    assert "http" not in text
    assert "url(" not in text
    assert "a &lt; b &amp; c" in text
    assert "bulk1 socat: &lt;gone&gt;" in text
    assert "not installed here, so not measured: oi" in text
    assert text.count("<table>") == 3


def test_the_markdown_names_the_pictures_and_what_went_wrong() -> None:
    text = page.markdown(whole_run(), {"Measured": "measured.svg"})
    assert text.count("![") == 1
    assert "![Measured](measured.svg)" in text
    assert "- went wrong: bulk1 socat: <gone>" in text
    assert "| nginx | 10 | 0 | 1 | 0 | 0 | 0 | 2 | 10 |" in text


def test_reloads_are_summed_over_the_rounds_and_processes_left_are_the_worst() -> None:
    reloads = Reloads(5, 10, 1000)
    for left in (3, 0):
        counts = {"served": 1000, "refused": 1, "reset": 0, "cut": 2, "wrong": 0, "late": 0}
        reloads.add("nginx", {**counts, "seconds": 10, "left": left})
    assert reloads.table().rows[1] == ["nginx", *["2,006", "2", "0", "4", "0", "0", "3", "20"]]


def test_two_runs_are_compared_figure_by_figure_and_better_is_told_from_worse() -> None:
    before, after = whole_run(), whole_run()
    after.sections = [section(figures=(80.0, 100.0, 120.0, 140.0))]
    ((found, lines),) = compare.tables(before, after)
    told = {(line.peer, line.figure.key): line.judgement for line in lines}
    assert told == {
        ("direct", "gbit_s"): "**better**, beyond the noise",
        ("forwarder", "gbit_s"): "**better**, beyond the noise",
        ("forwarder", "cpu"): "**better**, beyond the noise",
        ("forwarder", "calls"): "too few rounds",
    }
    assert found.rows[1][3:6] == ["22.00", "220.00", "10.000"]
    assert "3 of the others are beyond the noise" in compare.summary(lines)
    ((_, back),) = compare.tables(after, before, peers=["direct"])
    assert [line.judgement for line in back] == ["**worse**, beyond the noise"]
    assert not [*compare.tables(before, after, only=["conn"])]


def test_compare_prints_tables_and_leaves_with_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        whole_run().write(tmp_path / name)
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--peers", "forwarder"]) == 0
    text = capsys.readouterr().out
    assert text.count("within the noise") == 4
    assert "direct" not in text


def test_what_is_generated_goes_between_the_comments_and_nowhere_else(tmp_path: Path) -> None:
    results = tmp_path / "results"
    docs = tmp_path / "docs"
    results.mkdir()
    docs.mkdir()
    whole_run().write(results / "results.json")
    (results / "measured.svg").write_text(PICTURE)
    publish.publish(results, docs)
    text = (docs / "PERFORMANCE.md").read_text()
    for heading in ("Where we lead", "Where we do not, and why", "What was tried"):
        assert f"\n## {heading}\n" in text
    assert "![Measured](performance/measured.svg)" in text
    assert (docs / "performance" / "measured.svg").read_text() == PICTURE
    assert json.loads((docs / "performance" / "results.json").read_text())["absent"] == ["oi"]
    (docs / "PERFORMANCE.md").write_text(text.replace("Where we lead\n", "Where we lead\n\nHere."))
    publish.publish(results, docs)
    again = (docs / "PERFORMANCE.md").read_text()
    assert again == text.replace("Where we lead\n", "Where we lead\n\nHere.")
    with pytest.raises(ValueError, match="no place"):
        publish.replaced("# Performance\n", "new")


def test_every_measure_has_a_name_of_its_own() -> None:
    assert len(BY_NAME) == len(EVERY)


def test_the_whole_procedure_names_only_what_there_is_and_each_part_has_something_to_do() -> None:
    for part in parts.whole(PEERS, rounds=5, seconds=1):
        assert part.measures
        assert len(part.peers) > 1
        for measure in part.measures:
            assert any(fits(measure, peer) for peer in part.peers), (part.title, measure.name)


def test_a_peer_is_left_out_where_it_cannot_be_measured() -> None:
    assert not fits(BY_NAME["udp"], PEERS["haproxy"])
    assert not fits(BY_NAME["idle"], PEERS["direct"])
    assert not fits(BY_NAME["idle10000"], PEERS["haproxy"])
    assert not fits(BY_NAME["rr+10"], PEERS["socat"])
    assert fits(BY_NAME["idle10000"], PEERS["forwarder"])


def test_settings_name_no_directory_of_this_machine() -> None:
    peers = all_peers(["/opt/own/forwarder"], "/opt/own/oi")
    assert peers["forwarder"].settings.startswith("forwarder --workers 2 -c forwarder.toml\n")
    assert peers["forwarder-copy"].settings.startswith("forwarder --relay copy --workers 2 ")
    assert not [name for name, peer in peers.items() if "/opt" in peer.settings]


def test_without_options_the_usual_measures_are_taken_of_who_is_here() -> None:
    plan = parse_args(["--forwarder", *FORWARDER])
    (part,) = plan.parts
    assert (part.rounds, part.seconds, plan.reload_rounds) == (3, 5, 0)
    assert [m.name for m in part.measures][:2] == ["bulk1", "bulk8"]
    names = {peer.name for peer in part.peers}
    assert names == {name for name in parts.usual_peers(PEERS) if is_here(PEERS[name])}
    assert {*plan.absent} == {name for name, peer in PEERS.items() if not is_here(peer)}


def test_a_peer_that_was_named_is_not_left_out_when_it_is_missing() -> None:
    plan = parse_args(["--forwarder", *FORWARDER, "--oi", "/nowhere/oi", "--peers", "oi,forwarder"])
    assert [peer.name for peer in plan.peers] == ["forwarder", "oi"]
    assert plan.absent == []


def test_the_whole_procedure_can_be_narrowed_and_then_nobody_reloads() -> None:
    words = ["--all", "--only", "bulk8,rr", "--peers", "direct,forwarder"]
    plan = parse_args(["--forwarder", *FORWARDER, *words])
    assert {m.name for part in plan.parts for m in part.measures} == {"bulk8", "rr"}
    assert {peer.name for peer in plan.peers} == {"direct", "forwarder"}
    assert plan.reload_rounds == 0
    assert parse_args(["--forwarder", *FORWARDER, "--all"]).reload_rounds == 5
    alone = parse_args(["--forwarder", *FORWARDER, "--only", "reload"])
    assert (alone.parts, alone.reload_rounds) == ([], 3)


def test_a_name_that_nothing_has_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--only", "bulk3"])
    assert "unknown: bulk3" in capsys.readouterr().err
