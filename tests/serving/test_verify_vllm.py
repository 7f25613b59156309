"""`moelora verify --runtime vllm` with a real engine; tests/test_verify.py has one that stands for it."""

import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from moelora import MoELoraConfig
from moelora.cli.commands import main


def saved(model, folder):
    """The folder of an adapter with weights that act, and of what transformers makes of it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    assert main(["verify", str(folder), "--write"]) == 0
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """vLLM's attention needs heads of 64."""
    return save_tiny_model(tmp_path_factory.mktemp("vllm") / "model", hidden_size=128, max_length=128)


@pytest.fixture(scope="module")
def lora(base):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=3)
    return saved(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config), base.parent / "lora")


def verify(folder):
    """The command in a process of its own, whose engine leaves that of other tests alone; it logs as users have it."""
    command = [sys.executable, "-m", "moelora", "verify", str(folder), "--runtime", "vllm"]
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "INFO"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=250)


def test_a_lora_does_in_vllm_what_it_did_in_transformers(lora):
    done = verify(lora)
    assert done.returncode == 0, done.stderr
    assert "does what it did in training" in done.stdout.splitlines()[-1]
    assert "INFO" not in done.stdout


def test_a_mixture_does_in_vllm_what_it_did_in_transformers(base):
    config = MoELoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=3, num_experts=4, top_k_experts=2)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    done = verify(saved(model, base.parent / "mixture"))
    assert done.returncode == 0, done.stderr
    assert "does what it did in training" in done.stdout.splitlines()[-1]


def test_a_lora_of_another_strength_differs_in_vllm(lora):
    config = lora / "adapter_config.json"
    before = config.read_text()
    config.write_text(before.replace('"lora_alpha": 8', '"lora_alpha": 16'))
    try:
        done = verify(lora)
    finally:
        config.write_text(before)
    assert done.returncode == 1, done.stderr
    assert "is loaded, but differs" in done.stderr.splitlines()[-1]
