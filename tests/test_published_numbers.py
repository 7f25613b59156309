"""Tables in the repository are what its commands make of the recorded rows, and the pages quote these tables."""

import re
from pathlib import Path

import pytest

from benchmarks import table
from benchmarks.quality.sweep import read_rows
from benchmarks.quality.table import entries, markdown
from benchmarks.record import read

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUALITY = RESULTS / "quality"


def quality_tables(split):
    rows = list(read_rows([QUALITY / "rows.jsonl"]))
    suites = dict.fromkeys(row["suite"] for row in rows)
    return "\n".join(markdown(entries(rows, suite, split), suite, split) for suite in suites)


def test_the_quality_table_is_that_of_its_rows():
    assert (QUALITY / "test.md").read_text(encoding="utf-8") == quality_tables("test")


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in RESULTS.glob("*/results.csv")))
def test_speed_tables_are_those_of_their_rows(folder):
    expected = table.render(*read([RESULTS / folder / "results.csv"]))
    assert (RESULTS / folder / "results.md").read_text(encoding="utf-8") == expected


def test_the_quality_page_quotes_its_tables():
    page = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    results = page[page.index("## Results") :]
    quoted = re.findall(r"[+-]?\d\.\d{4}(?: ± \d\.\d{4})?", results)
    tables = quality_tables("test") + quality_tables("validation")
    assert len(quoted) > 100 and [number for number in quoted if number not in tables] == []
