"""Pictures of figures. They need the extra ``bench``."""

from __future__ import annotations

import pytest

from bench import parts
from bench.peers import all_peers
from bench.rounds import fits
from bench.run import Run, Section

pictures = pytest.importorskip("bench.pictures", reason="needs matplotlib, of the extra bench")


def whole_run(*, with_figures: bool) -> Run:
    """Every part with every measure and peer, two rounds; what each costs is its place in line."""
    run = Run("now", {}, {}, [])
    for part in parts.whole(all_peers(["forwarder"]), rounds=2, seconds=1):
        section = Section.of(part)
        for measure in part.measures:
            for place, peer in enumerate(part.peers, start=1):
                if with_figures and fits(measure, peer):
                    figures = {figure.key: float(place) for figure in measure.columns}
                    for number in range(2):
                        section.results.add(measure.name, peer.name, number, figures)
        run.sections.append(section)
    return run


@pytest.fixture(autouse=True, scope="module")
def open_fonts() -> None:
    """Draw once: matplotlib opens its fonts for it and keeps them, which is no leak."""
    pictures.draw(whole_run(with_figures=True))


def test_every_part_has_its_picture_and_the_same_figures_give_the_same_one() -> None:
    run = whole_run(with_figures=True)
    drawn = pictures.draw(run)
    assert [*drawn] == [section.title for section in run.sections]
    assert all("<svg" in svg for svg in drawn.values())
    assert len({*drawn.values()}) == len(drawn)
    assert pictures.draw(run) == drawn


def test_a_part_without_figures_has_no_picture() -> None:
    assert pictures.draw(whole_run(with_figures=False)) == {}


def test_a_run_that_was_cut_short_can_be_drawn() -> None:
    """Only the first measure of each part has been taken, of one peer."""
    run = whole_run(with_figures=True)
    for section in run.sections:
        name = section.measures[0]
        first = next(iter(section.results.rounds[name]))
        by_round = section.results.rounds[name][first]
        section.results.rounds = {name: {first: by_round}}
    assert len(pictures.draw(run)) == len(run.sections)
