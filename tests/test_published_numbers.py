"""Tables in the repository are what its commands make of the recorded rows; the page on quality quotes them rightly."""

import re
from pathlib import Path

import pytest

from benchmarks import table
from benchmarks.quality.sweep import read_rows
from benchmarks.quality.table import BASELINE, SUMMARY, baseline_of, entries, markdown, summary
from benchmarks.record import read

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROWS = list(read_rows([RESULTS / "quality" / "rows.jsonl"]))
PAGE = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
SECTIONS = {"lm": "### Several domains at once", "tasks": "### Several tasks at once"}


def quality_tables(split):
    suites = dict.fromkeys(row["suite"] for row in ROWS)
    return "\n".join(markdown(entries(ROWS, suite, split), suite, split) for suite in suites)


def section(heading):
    return PAGE[PAGE.index(heading) :].partition("\n#")[0]


def tables(text):
    """Each table of a text as its rows, as dictionaries by heading."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = ([cell.strip(" *") for cell in line.strip("|").split("|")] for line in block.splitlines())
        yield [dict(zip(head, cells, strict=True)) for cells in rows]


def what_a_row_should_say(done, row):
    """Of the method that ends the first cell in backticks."""
    first = next(iter(row.values()))
    steps = row.get("steps") or (re.search(r"(\d+) steps", first) or ["", 300])[1]
    entry = done[re.findall(r"`([^`]+)`", first)[-1], int(steps)]
    head = next(iter(row))
    if head in ("loss", "accuracy"):
        return {domain: str(entry.of_domain(domain, head)) for domain in entry.first["scores"]}
    cells = dict(zip(SUMMARY, summary(entry, baseline_of(entry, list(done.values()))), strict=True))
    cells[f"minus {BASELINE}"] = cells.pop("difference")
    return {name: re.sub(r" \(.*\)", "", text) for name, text in cells.items() if name != "method"}


def test_the_quality_table_is_that_of_its_rows():
    assert (RESULTS / "quality" / "test.md").read_text(encoding="utf-8") == quality_tables("test")


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in RESULTS.glob("*/results.csv")))
def test_speed_tables_are_those_of_their_rows(folder):
    expected = table.render(*read([RESULTS / folder / "results.csv"]))
    assert (RESULTS / folder / "results.md").read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("suite", SECTIONS)
def test_every_cell_of_the_pages_tables_is_that_of_its_row(suite):
    done = {(entry.method, entry.steps): entry for entry in entries(ROWS, suite, "test") if entry.runs}
    rows = [row for found in tables(section(SECTIONS[suite])) for row in found if "`" in next(iter(row.values()))]
    assert len(rows) >= 8
    for row in rows:
        expected = what_a_row_should_say(done, row)
        said = {name: text for name, text in list(row.items())[1:] if text}  # an empty cell says nothing
        assert said == {name: expected[name] for name in said}, row


def test_the_page_that_compares_quotes_the_page_on_quality():
    quoted = re.findall(r"\d\.\d+ ± \d\.\d+", (ROOT / "docs" / "compare.md").read_text(encoding="utf-8"))
    assert len(quoted) >= 4 and [number for number in quoted if number not in PAGE] == []


def test_every_loss_of_a_setting_was_measured():
    quoted = re.findall(r"\d\.\d{4}(?: ± \d\.\d{4})?", section("### Settings"))
    measured = quality_tables("test") + quality_tables("validation")
    assert len(quoted) > 30 and [number for number in quoted if number not in measured] == []


@pytest.mark.parametrize(
    ("heading", "suite", "split"),
    [(SECTIONS["lm"], "lm", "test"), (SECTIONS["tasks"], "tasks", "test"), ("### Settings", "lm", "validation")],
)
def test_every_difference_of_the_page_is_one_between_two_methods(heading, suite, split):
    quoted = re.findall(r"\d\.\d{3}\s±\s\d\.\d{3}(?!\d)", section(heading))
    done = [entry for entry in entries(ROWS, suite, split) if entry.runs]
    pairs = (one.difference(other) for one in done for other in done)
    measured = {f"{abs(pair.mean):.3f} ± {pair.half:.3f}" for pair in pairs if pair is not None}
    assert len(quoted) >= 5 and [text for text in quoted if re.sub(r"\s+", " ", text) not in measured] == []
