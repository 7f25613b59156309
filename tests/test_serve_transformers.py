"""transformers' server with our adapters, asked by OpenAI's own client."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel
from tiny import save_tiny_adapter, tiny_tokenizer
from transformers import AutoModelForCausalLM

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytestmark = pytest.mark.slow

TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("served")
    save_tiny_adapter(made, top_k_experts=2)
    return made


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(folder, *words):
    """A client of a server in a process of its own, which ends by Ctrl-C."""
    port = free_port()
    code = "import sys; from moelora.cli.commands import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", *words[:1], "--engine", "transformers", "--port", str(port), *words[1:]]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    errors = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr), daemon=True)
    reader.start()
    try:
        started = [line for line in iter(process.stdout.readline, "") if "Serving on" in line or not errors.append("")][-1:]
        assert started, "".join(errors)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=20)
        yield client
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130, "".join(errors)
        assert "Traceback" not in "".join(errors), "".join(errors)
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    finally:
        process.kill()
        process.wait()
