"""accelerate's engines on CPU processes, and on two GPUs or one that the processes share.

accelerate runs FSDP and DeepSpeed only where it finds an accelerator. Nothing in either needs one, so on CPUs the
worker tells it that there is one, whose device is the CPU and whose backend is gloo; all the rest is what a GPU
machine runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import transformers

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
CONFIGS = ROOT / "examples" / "accelerate"
ENGINES = Path(sys.prefix) / "engines"  # DeepSpeed and quantisation packages; see the Makefile
WORLD = 2
DEVICE = os.environ.get("MOELORA_TEST_DEVICE", "cpu")  # in the worker


def launch(
    engine: str,
    *arguments: object,
    precision: str = "no",
    check: bool = True,
    device: str = "cpu",
    packages: bool = False,
    **environment: str,
) -> subprocess.CompletedProcess:
    """Run the worker on WORLD processes with the accelerate configuration of an engine; precision "no" is float32.

    packages: let it find DeepSpeed, which its own engines need anyway, and the quantisation packages.
    """
    tests = Path(__file__).parents[1]
    paths = [str(ROOT), str(tests), str(tests / "quantised")]
    paths += [str(ENGINES)] if packages or engine.startswith("zero") else []
    paths += filter(None, [os.environ.get("PYTHONPATH")])  # the packages that this process was given
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "MOELORA_TEST_TRANSFORMERS": transformers.__version__,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MOELORA_TEST_DEVICE": device,
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        env |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{engine}.yaml")]
    command += ["--mixed_precision", precision, "--num_processes", str(WORLD), "--main_process_port", "0"]
    command += [str(WORKER), engine, *map(str, arguments)]
    result = subprocess.run(command, env=env | environment, capture_output=True, text=True, check=False)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def pretend_accelerator() -> None:
    """In the worker, before any Accelerator."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from transformers import training_args

    training_args.is_torch_bf16_gpu_available = lambda: True
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_XPU)
