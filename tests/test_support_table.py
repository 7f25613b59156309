"""docs/support.md: every cell names a test that exists, or says why there is none."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`(?:\[([\w -]+)\])?")


def cells():
    """(row, cell) of every table, without headings and first columns."""
    for line in TABLE.splitlines():
        if line.startswith("|") and not set(line) <= set("|- "):
            name, *rest = [cell.strip() for cell in line.strip("|").split("|")]
            if name not in ("engine", "base", "what"):
                yield from ((name, cell) for cell in rest)


def functions(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_cell_is_tested_or_explained():
    found = list(cells())
    assert len(found) > 30
    for row, cell in found:
        assert cell.startswith(("tested by ", "not supported because ", "not tested because ")), f"{row}: {cell!r}"
        assert not cell.startswith("tested by ") or TEST.search(cell), f"{row}: {cell!r} names no test"


def test_every_named_test_exists_with_the_case_it_names():
    named = TEST.findall(TABLE)
    assert len(named) > 20
    for file, name, case in named:
        path = ROOT / file
        assert path.is_file(), file
        assert name in functions(path), f"{file}::{name}"
        assert not case or f'"{case}"' in path.read_text(), f"{file}::{name} has no case {case!r}"
