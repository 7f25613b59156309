"""examples/fsdp2.py, on two processes of a CPU."""

import re

import pytest
import torch
from engines import ROOT, launch
from peft import PeftModel
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM


@pytest.mark.slow
def test_fsdp2(tmp_path):
    model = save_tiny_model(tmp_path / "model", max_length=256)
    script = ROOT / "examples" / "fsdp2.py"
    done = launch("fsdp2", "script", script, "--model", model, "--steps", "10", "--out", tmp_path / "out")
    count, before, after = re.search(r"(\d+) processes, loss (\S+) -> (\S+)", done.stdout).groups()
    assert count == "2" and float(after) < float(before) - 0.05
    assert done.stdout.count("The adapter is in") == 1
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "out")
    learned = [tensor for name, tensor in loaded.state_dict().items() if "lora_B" in name]
    assert learned and all(torch.isfinite(tensor).all() and tensor.abs().max() > 0 for tensor in learned)
