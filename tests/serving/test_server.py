"""The command of vLLM and the client of OpenAI, as users have them: the plug-in is found by its entry point."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import BASE, NEW_TOKENS, TOLERANCE, prompts
from openai import APIStatusError, OpenAI

ADAPTERS = ["sparse", "plain", "domains"]
VLLM = Path(sys.executable).parent / "vllm"


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(server, url, log, seconds=150):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            return urllib.request.urlopen(f"{url}/health", timeout=5).status
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"the server did not start:\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def client(llama, tmp_path_factory):
    """A client of a server with fewer slots than adapters."""
    url, log = f"http://127.0.0.1:{free_port()}", tmp_path_factory.mktemp("server") / "log"
    modules = [f"{name}={llama.adapter(name)}" for name in ADAPTERS]
    command = [VLLM, "serve", llama.model, "--served-model-name", BASE, "--host", "127.0.0.1", "--port"]
    command += [url.rpartition(":")[2], "--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    command += ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "32", "--lora-target-modules", *llama.linears]
    command += ["--lora-modules", *modules]
    environment = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as out:
        server = subprocess.Popen([str(part) for part in command], stdout=out, stderr=out, env=environment)
    try:
        wait_for(server, url, log)
        yield OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    finally:
        server.terminate()
        server.wait(60)


def answer(client, name, prompt):
    extra = {"return_token_ids": True, "ignore_eos": True, "prompt_logprobs": 0}
    options = {"max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 0, "extra_body": extra}
    return client.completions.create(model=name, prompt=list(prompt), **options).choices[0]


def assert_served(llama, name, prompt, choice):
    tokens = [*prompt, *choice.token_ids]
    expected = llama.reference(name).logprobs(tokens)
    assert choice.token_ids == expected.argmax(-1)[len(prompt) - 1 : -1].tolist(), name
    found = [next(iter(place.values()))["logprob"] for place in choice.prompt_logprobs[1:]]
    found += choice.logprobs.token_logprobs
    following = [row[token].item() for row, token in zip(expected, tokens[1:], strict=False)]
    assert found == pytest.approx(following, abs=TOLERANCE), name


def post(client, path, **body):
    return client.post(path, body=body, cast_to=str)


def test_thirty_two_requests_at_once(llama, client):
    names = [BASE, *ADAPTERS]
    jobs = [(names[number % 4], prompt) for number, prompt in enumerate(prompts([5 + 4 * n for n in range(32)]))]
    with ThreadPoolExecutor(32) as pool:
        choices = list(pool.map(lambda job: answer(client, *job), jobs))
    for job, choice in zip(jobs, choices, strict=True):
        assert_served(llama, *job, choice)


def test_adapters_are_listed_beside_the_base(client):
    assert {model.id for model in client.models.list()} >= {BASE, *ADAPTERS}


def test_a_mixture_is_loaded_and_unloaded_while_it_runs(llama, client):
    prompt = prompts((40,))[0]
    with pytest.raises(APIStatusError):
        answer(client, "dense", prompt)
    post(client, "/load_lora_adapter", lora_name="dense", lora_path=str(llama.adapter("dense")))
    assert_served(llama, "dense", prompt, answer(client, "dense", prompt))
    post(client, "/unload_lora_adapter", lora_name="dense")
    with pytest.raises(APIStatusError):
        answer(client, "dense", prompt)
    assert_served(llama, "sparse", prompt, answer(client, "sparse", prompt))


def test_what_cannot_be_served_is_refused_and_the_server_stays_up(llama, client):
    with pytest.raises(
        APIStatusError, match=r"\b64\b.*\b32\b|\b32\b.*\b64\b"
    ):  # 16 experts of rank 4, --max-lora-rank 32
        post(client, "/load_lora_adapter", lora_name="large", lora_path=str(llama.adapter("multi_domain")))
    prompt = prompts((40,))[0]
    for name in (BASE, *ADAPTERS):
        assert_served(llama, name, prompt, answer(client, name, prompt))


def test_answers_are_streamed(llama, client):
    prompt = prompts((40,))[0]
    extra = {"ignore_eos": True, "return_token_ids": True}
    options = {"max_tokens": NEW_TOKENS, "temperature": 0, "stream": True, "extra_body": extra}
    parts = list(client.completions.create(model="sparse", prompt=list(prompt), **options))
    tokens = [token for part in parts for choice in part.choices for token in choice.token_ids or []]
    assert len(parts) > 1
    assert tokens == llama.reference("sparse").logprobs([*prompt, *tokens]).argmax(-1)[len(prompt) - 1 : -1].tolist()
