"""docs/quality.md shows what is in benchmarks/quality/results, and its plot what the study has."""

from __future__ import annotations

from benchmarks.quality import plot, tables

from tests.house.tree import ROOT


def test_tables_are_those_of_the_results() -> None:
    page = (ROOT / tables.PAGE).read_text(encoding="utf-8")
    assert tables.filled(page) == page


def test_the_plot_has_a_line_for_every_recipe_that_ran() -> None:
    drawn = (ROOT / plot.OUT).read_text(encoding="utf-8")
    names = [name for name, _ in plot.series()]
    assert names
    assert all(f">{name}</text>" in drawn for name in names)
