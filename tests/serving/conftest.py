"""vLLM in this process, quiet and without network; set before anything imports it."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

for _name, _value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
}.items():
    os.environ.setdefault(_name, _value)

if find_spec("vllm") is None:  # `make serve-test` has it, in an environment of its own
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """The tiny Llama of most tests; its adapters and what transformers makes of them are kept for the session."""
    from harness import Bench

    return Bench(tmp_path_factory.mktemp("llama"))


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.serving)


@pytest.fixture(scope="session", autouse=True)
def _end_of_the_engine():
    from harness import RUNNING

    yield
    RUNNING.end()
