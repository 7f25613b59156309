"""A tiny model and texts for the tests of plug-ins."""

import pytest
from tiny import counting, save_tiny_model, write_jsonl


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with `model` and `data.jsonl`."""
    folder = tmp_path_factory.mktemp("tool")
    save_tiny_model(folder / "model")
    write_jsonl(folder / "data.jsonl", counting(64))
    return folder
