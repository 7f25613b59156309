import copy

import pytest
from tiny import tiny_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recipe")


@pytest.fixture(scope="module")
def valid(folder):
    return tiny_recipe(folder)


@pytest.fixture
def recipe(valid):
    return copy.deepcopy(valid)
