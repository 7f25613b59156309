"""The notebooks in examples/notebooks, executed with a tiny model in place of the one in their first cell."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from tiny import save_tiny_model

NOTEBOOKS = Path(__file__).parents[1] / "examples" / "notebooks"
ALL = sorted(file.stem for file in NOTEBOOKS.glob("*.ipynb"))
NUMBER = r"\d+\.\d+"


def parameters_of(cells):
    """The place of the one cell that says what the notebook is run with, by papermill's tag."""
    (place,) = [i for i, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", [])]
    return place


@pytest.mark.parametrize("name", ALL)
def test_it_is_committed_without_outputs(name):
    book = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert not [cell for cell in code if cell["outputs"] or cell["execution_count"]], f"clear the outputs of {name}"
    parameters = "".join(book["cells"][parameters_of(book["cells"])]["source"])
    assert re.search(r'^MODEL = "\S+"', parameters) and "STEPS = " in parameters


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """A function that runs a notebook in an empty folder, and returns what it printed and how many pictures it drew."""
    import nbformat  # part of the extra `dev`, as is nbclient
    from nbclient import NotebookClient

    model = save_tiny_model(tmp_path / "model", max_length=512)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOKS.parents[1]), *filter(None, sys.path)]))
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))

    def call(name, steps):
        book = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        given = nbformat.v4.new_code_cell(f"MODEL, STEPS = {str(model)!r}, {steps}")
        book.cells.insert(parameters_of(book.cells) + 1, given)
        kernel = {"kernel_name": "python3", "resources": {"metadata": {"path": str(tmp_path)}}}
        NotebookClient(book, timeout=200, **kernel).execute()
        outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
        shown = [output["data"] for output in outputs if "data" in output]
        printed = [output["text"] for output in outputs if output.get("name") == "stdout"]
        printed += [data["text/plain"] for data in shown if "text/plain" in data]
        return "\n".join(printed), sum("image/png" in data for data in shown)

    return call


@pytest.mark.slow
def test_first_steps(execute, tmp_path):
    printed, pictures = execute("first_steps", 6)
    before, after = map(float, re.search(rf"^loss: ({NUMBER}) -> ({NUMBER})", printed, re.MULTILINE).groups())
    assert after < before - 0.03
    assert "the loaded mixture is the saved one: True" in printed and pictures == 1
    rows = re.findall(rf"^\d+ +model\.layers\.1 +\d+ +0 .* ([0-3]) +({NUMBER})$", printed, re.MULTILINE)
    assert len(rows) == 12 and all(0.25 <= float(weight) <= 1 for _, weight in rows)
    assert (tmp_path / "runs" / "first_steps" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_second_skill(execute, tmp_path):
    printed, pictures = execute("second_skill", 8)
    rows = {
        name: tuple(map(float, losses))
        for name, *losses in re.findall(rf"^(\S+ \S+) +({NUMBER}) +({NUMBER})$", printed, re.MULTILINE)
    }
    base, first, both = rows["base model"], rows["first skill"], rows["both skills"]
    assert first[0] < base[0] - 0.05 and both[0] == pytest.approx(first[0], abs=0.01), "the first is remembered"
    assert both[1] < first[1] - 0.02, "the second is learned"
    assert "the old experts are what they were: True" in printed and pictures == 2
    numbers = int(re.search(r"^([\d,]+) numbers, and no text", printed, re.MULTILINE).group(1).replace(",", ""))
    assert numbers > 0
    shares = re.findall(rf"^(?:rooms|sql)? +(first|second) +({NUMBER})$", printed, re.MULTILINE)
    assert [round(float(share)) for _, share in shares] == [0, 1, 1, 0], (
        "rooms take the second's experts, sql the first's"
    )
    config = json.loads((tmp_path / "runs" / "second_skill" / "adapter_config.json").read_text())
    assert [adapter["name"] for adapter in config["adapters"]] == ["default", "grown_1"]


def test_each_notebook_is_executed_and_on_the_page():
    page = (NOTEBOOKS.parents[1] / "docs" / "examples.md").read_text(encoding="utf-8")
    assert all(f"(../examples/notebooks/{name}.ipynb)" in page for name in ALL)
    assert ALL == ["first_steps", "second_skill"] and all(f"test_{name}" in globals() for name in ALL)
