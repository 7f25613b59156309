"""Quantised bases under a mixture, QLoRA style, on the CPU: outputs, gradients, training, generation, persistence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ENGINES = Path(sys.prefix) / "engines"  # the quantisation packages; see the Makefile
SCRIPT = Path(__file__).with_name("qlora.py")

# PEFT's own layer class serves each, ours mixed in; "Linear" where PEFT has none and base_layer(x) is called as it is.
LAYERS = {
    "bnb-nf4": "MoELoraLinear4bit",
    "bnb-int8": "MoELoraLinear8bitLt",
    "torchao-int8": "MoELoraTorchaoLoraLinear",
    "hqq": "MoELoraHqqLoraLinear",
    "quanto-int8": "MoELoraLinear",
    "quanto-int4": "MoELoraLinear",
}
# Against the same mixture on plain linears with the dequantised weights, in float32. int8 quantises activations too.
TOLERANCE = dict.fromkeys(LAYERS, 1e-4) | {"bnb-int8": 2e-2}

pytestmark = pytest.mark.engines


def run(kind, folder):
    path = os.pathsep.join([str(SCRIPT.parents[2]), str(ENGINES)])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), kind, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not ENGINES.is_dir(), reason="`make engines` installs the quantisation packages")
@pytest.mark.parametrize("kind", LAYERS)
def test_qlora(kind, tmp_path):
    process = run(kind, tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["layers"] == [LAYERS[kind]]
    assert result["fresh"] == 0, "a fresh adapter changed the base model's output"
    assert result["names"] and result["logits"] < TOLERANCE[kind] and result["gradients"] < TOLERANCE[kind]
    assert result["losses"][-1] < 0.5 * result["losses"][0]
    assert result["generated"] == [2, 9]
    assert result["reloaded"] == 0
    assert 0 < min(result["maturity"]) <= max(result["maturity"]) < 1
