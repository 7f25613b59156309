"""A tool in a process of its own, and what a model says of a text."""

import os
import subprocess
import sys

import torch


def start(module, *arguments, cwd):
    """Run a module of the tool's as its command does, offline and without reports home; its output."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "USE_HF": "1"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def logits(model, tokens=(5, 6, 7, 8)):
    """[B, S, V] of a text, without gradients."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([tokens])).logits
