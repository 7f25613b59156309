"""Tests of this folder share modules with the processes that they start."""

import pytest
from engines import ENGINES


def pytest_collection_modifyitems(items):
    missing = pytest.mark.skip(reason=f"DeepSpeed is not in {ENGINES}; `make engines` installs it")
    for item in items:
        if item.get_closest_marker("engines") and not ENGINES.is_dir():
            item.add_marker(missing)
