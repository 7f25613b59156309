"""transformers' server with our adapters, asked by OpenAI's own client."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel
from tiny import save_tiny_adapter, tiny_tokenizer
from transformers import AutoModelForCausalLM

from moelora.serving.transformers_server import sharing_weights

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytestmark = pytest.mark.slow

TOKENS = 12
PROMPTS = ("one plus one", "HELLO NUMBER", "7")


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
    """A client of `moelora serve` in a process of its own, which ends by Ctrl-C."""
    port = free_port()
    log = folder / f"{port}.log"
    code = "import sys; from moelora.cli.commands import main; sys.exit(main())"
    at = words.index("--") if "--" in words else len(words)
    command = ["serve", *words[:at], "--engine", "transformers", "--port", str(port), *words[at:]]
    with open(log, "w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *command], cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        try:
            printed = next((line for line in process.stdout if "Serving on" in line), None)
            assert printed == f"Serving on http://127.0.0.1:{port}/v1; Ctrl-C ends it\n", (log).read_text()
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=10)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130, (log).read_text()
        finally:
            process.kill()
            process.wait()
    assert "Traceback" not in (log).read_text()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture(scope="module")
def expected(folder):
    """What generate answers to a prompt, by the names that are served."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer, found = tiny_tokenizer(), {}

    def answer(model, prompt):
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def answers(model):
        return {prompt: answer(model, prompt) for prompt in PROMPTS}

    with torch.no_grad():
        found["base"] = answers(base)
        found["adapter"] = answers(PeftModel.from_pretrained(base, folder / "adapter"))
    assert found["base"] != found["adapter"]
    return found


@pytest.fixture(scope="module")
def client(folder):
    with running(folder, "adapter") as found:
        yield found


def complete(client, model, prompt, **options):
    return client.completions.create(model=model, prompt=prompt, max_tokens=TOKENS, temperature=0, **options)


def test_models_are_listed(client, folder):
    assert [model.id for model in client.models.list()] == [str(folder / "model"), "adapter"]


def test_base_and_adapter_answer_by_their_names(client, folder, expected):
    for prompt in PROMPTS:
        assert complete(client, "adapter", prompt).choices[0].text == expected["adapter"][prompt]
        assert complete(client, str(folder / "model"), prompt).choices[0].text == expected["base"][prompt]


def test_several_requests_at_once(client, folder, expected):
    names = {"adapter": "adapter", str(folder / "model"): "base"}
    asked = [(name, prompt) for prompt in PROMPTS for name in names] * 2
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda pair: complete(client, *pair).choices[0].text, asked))
    assert answers == [expected[names[name]][prompt] for name, prompt in asked]


def test_an_answer_is_streamed(client, expected):
    chunks = [chunk.choices[0] for chunk in complete(client, "adapter", PROMPTS[0], stream=True)]
    assert "".join(chunk.text for chunk in chunks) == expected["adapter"][PROMPTS[0]]
    assert len(chunks) > 3 and chunks[-1].finish_reason == "length"


def test_a_stop_string_ends_it(client, expected):
    text = expected["adapter"][PROMPTS[0]]
    stop = next(pair for i in range(1, TOKENS) if (pair := text[i : i + 2]).isascii())
    stopped = complete(client, "adapter", PROMPTS[0], stop=[stop]).choices[0]
    assert stopped.finish_reason == "stop" and stopped.text == text[: text.index(stop) + len(stop)]


def test_a_chat(client):
    messages = [{"role": "user", "content": "one plus one"}]
    options = {"model": "adapter", "messages": messages, "max_tokens": TOKENS, "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0].message.content
    chunks = client.chat.completions.create(**options, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed and whole.startswith(streamed)  # the rest is bytes that are no characters


def test_an_unknown_model_is_named(client, folder):
    with pytest.raises(openai.NotFoundError) as caught:
        complete(client, "gpt", "x")
    expected = f"no model 'gpt' is served here; there are {folder}/model, adapter"
    assert caught.value.response.json() == {"detail": expected}


def test_continuous_batching(folder, expected):
    with running(folder, "mix=adapter", "--", "--continuous-batching", "--cb-num-blocks", "16") as client:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda prompt: complete(client, "mix", prompt).choices[0].text, PROMPTS))
        assert answers == list(expected["adapter"].values())
        streamed = complete(client, "mix", PROMPTS[0], stream=True)
        assert "".join(chunk.choices[0].text for chunk in streamed) == expected["adapter"][PROMPTS[0]]


def test_ctrl_c_during_an_answer(folder):
    with running(folder, "adapter") as client:
        stream = client.completions.create(model="adapter", prompt="x", max_tokens=100_000, stream=True)
        next(iter(stream))


def test_models_of_a_server_share_their_weights(folder):
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    shared = sharing_weights(base)
    adapted = PeftModel.from_pretrained(shared, folder / "adapter")
    weights = {weight.data_ptr() for weight in base.parameters()}
    assert {p.data_ptr() for name, p in adapted.named_parameters() if "lora_" not in name} == weights
    assert not [name for name, _ in base.named_modules() if "lora" in name]
