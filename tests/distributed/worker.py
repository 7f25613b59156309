"""A process that tests/distributed starts with accelerate launch: `worker.py ENGINE TASK OUT [NAME ...]`."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, GradScalerKwargs
from cases import CASES, LR, QUANTISED, ROWS, Case, build, loss_from_logits, reference, routing_state, share, steps_of
from engines import DEVICE, WORLD, pretend_accelerator
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, __version__
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from moelora.cli import main as cli

assert __version__ == os.environ["MOELORA_TEST_TRANSFORMERS"], "another transformers than the test's"


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor's whole value, on the CPU."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().cpu().clone()


def run(engine: str, case: Case, out: Path) -> dict[str, Any]:
    """What cases.reference does, by accelerate, on this process's share of every batch."""
    accelerator = accelerator_for(engine, case.accumulation)
    model = build(case)
    if accelerator.is_main_process:  # a forward that no other process makes must not wait for one
        with torch.no_grad():
            model(**next(steps_of(case))[0][0])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert_sharded(engine, model)
    losses, gradients = [], []
    for micros, num_items in steps_of(case):
        step = []
        for rows in micros:
            with accelerator.accumulate(model):
                mine = {n: t.to(accelerator.device) for n, t in share(rows, accelerator.process_index).items()}
                num_items = num_items.to(accelerator.device)
                if case.own_loss:
                    loss, _ = loss_from_logits(model, mine, num_items)
                else:
                    loss = model(**mine, num_items_in_batch=num_items).loss
                # As the Trainer does: engines average over processes, accelerate over micro-batches.
                accelerator.backward(loss * WORLD * case.accumulation)
                step.append(loss.detach())
                if accelerator.sync_gradients:
                    gradients.append(gradients_of(engine, accelerator.unwrap_model(model)))
                optimizer.step()
                optimizer.zero_grad()
        losses.append(torch.stack(step))
        dist.all_reduce(losses[-1])
    inner = accelerator.unwrap_model(model)
    state = accelerator.get_state_dict(model)
    # As accelerate's documentation says to save; every process calls it.
    inner.save_pretrained(out, state_dict=state, is_main_process=accelerator.is_main_process)
    trainable = {n.removeprefix("module.") for n, p in inner.named_parameters() if p.requires_grad}
    return {
        "losses": [loss.cpu() for loss in losses],
        "gradients": gradients,
        "parameters": {n: full(state[n]) for n in trainable} if state else {},
        "buffers": {name: buffer.cpu() for name, buffer in routing_state(inner).items()},
    }


def accelerator_for(engine: str, accumulation: int) -> Accelerator:
    accelerator = Accelerator(
        # FSDP2 whose gradients are not reduced in each micro-batch computes other numbers at times: docs/support.md.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=accumulation, sync_each_batch=engine == "fsdp2"
        ),
        cpu=engine == "ddp" and DEVICE == "cpu",
        # float16 only: torch's own start may overflow, and a step that is skipped is one of the few there are.
        kwargs_handlers=[GradScalerKwargs(init_scale=128.0)],
    )
    replicated = DistributedType.MULTI_CPU if DEVICE == "cpu" else DistributedType.MULTI_GPU
    wanted = {"ddp": replicated, "fsdp2": DistributedType.FSDP}.get(engine, DistributedType.DEEPSPEED)
    assert accelerator.distributed_type == wanted, accelerator.distributed_type
    assert accelerator.num_processes == WORLD
    if engine.startswith("zero"):
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": ROWS // WORLD,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": ROWS * accumulation,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,  # plain SGD
        }
    if engine == "zero3":  # parameters of a tiny model would otherwise stay whole on every process
        keep_nothing = dict.fromkeys(("param_persistence_threshold", "max_live_parameters", "max_reuse_distance"), 0)
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero |= {f"stage3_{name}": value for name, value in keep_nothing.items()}
    return accelerator


def assert_sharded(engine: str, model: torch.nn.Module) -> None:
    """The engine is at work: no process holds what another should."""
    blocks = [m for m in model.modules() if isinstance(m, LlamaDecoderLayer)]
    if engine == "ddp":
        assert isinstance(model, DistributedDataParallel) and not model.find_unused_parameters
    if engine == "fsdp2":
        assert all(isinstance(block, FSDPModule) for block in blocks)
        assert all(isinstance(p, DTensor) for p in model.parameters())
    if engine == "zero3":
        assert all(p.numel() == 0 and not p.ds_persist for p in model.parameters())


def gradients_of(engine: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    if engine.startswith("zero"):
        return {}  # DeepSpeed steps inside backward
    return {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def equality(engine: str, out: Path, names: list[str]) -> None:
    for name in names:
        torch.save(run(engine, (CASES | QUANTISED)[name], out / name), out / f"{name}.{dist.get_rank()}.pt")


def quantised(engine: str, out: Path, names: list[str]) -> None:
    """As equality; what one process does is computed here too, because the tests' own has no quantisation packages."""
    if os.environ["RANK"] == "0":  # before any Accelerator: one process
        for name in names:
            torch.save(reference(QUANTISED[name]), out / f"{name}.pt")
    equality(engine, out, names)


def recipe(engine: str, out: Path, arguments: list[str]) -> None:
    """`moelora train` on the recipe in `out`, once per comma-separated list of arguments; KILL=WHEN:OUTPUT_DIR dies."""
    when, _, doomed = os.environ.get("KILL", "").partition(":")
    original = {"step": Trainer._maybe_log_save_evaluate, "save": Trainer._save_optimizer_and_scheduler}.get(when)

    def die(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        victim = {"step": WORLD - 1, "save": 0}[when]
        is_time = self.state.global_step == {"step": 5, "save": 4}[when]
        if is_time and dist.get_rank() == victim and Path(self.args.output_dir).name == doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    if original is not None:
        setattr(Trainer, original.__name__, die)
    for words in arguments:
        assert cli(["train", str(out / "recipe.yaml"), *words.split(",")]) == 0


def script(engine: str, path: Path, arguments: list[str]) -> None:
    """A script, as `accelerate launch` would run it."""
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


TASKS = {"equality": equality, "quantised": quantised, "recipe": recipe, "script": script}


def main() -> None:
    torch.set_num_threads(1)
    engine, task, out, *names = sys.argv[1:]
    if engine != "ddp" and DEVICE == "cpu":
        pretend_accelerator()
    if DEVICE == "cuda" and torch.cuda.device_count() < WORLD:  # ranks share a GPU
        os.environ["LOCAL_RANK"] = "0"
    TASKS[task](engine, Path(out), names)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
