"""Makes the files beside it, with the code of the last commit before modules moved into folders:

    git worktree add /tmp/before e34edf5
    PYTHONPATH=/tmp/before python tests/saved_before_the_rooms/make.py

Later code would write later files, which prove nothing. The test takes `base_model`, `observe` and the like from here.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import moelora
from moelora import MoELoraConfig
from moelora.experts import from_lora, grow, remember

COMMIT = "e34edf5"
HERE = Path(__file__).parent
HIDDEN, VOCAB = 8, 16
TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(12).view(2, 6)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}


def base_model() -> LlamaForCausalLM:
    """Its weights come from their names: how transformers draws them is another matter in each version."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCAB,
        max_position_embeddings=16,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return draw(LlamaForCausalLM(config), "", std=0.4)


def draw(model: Any, part: str, std: float) -> Any:
    """Draw the weights whose names hold this part, each by its own name, in place."""
    for name, parameter in model.named_parameters():
        if part in name and parameter.dim() == 2:
            parameter.data.normal_(std=std, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return model


def observe(model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Logits [B, S, V] in evaluation; then all gradients [N] of a training step, and what it says and counts.

    Statistics and counters stand on top of what was counted before.
    """
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS, attention_mask=MASK).logits
    output = model.train()(**BATCH)
    output.loss.backward()
    gradients = [p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    numbers = {
        "losses": {name: float(output[name].detach()) for name in ("loss", "balancing_loss") if name in output},
        "routers": {name: asdict(stats) for name, stats in model.routing_stats().items()},
        "counters": {k: v.tolist() for k, v in model.state_dict().items() if "tokens_per_expert" in k},
    }
    return {"logits": logits, "gradients": torch.cat(gradients)}, numbers


def this_machine() -> dict[str, str]:
    """What decides how a product is rounded, as far as a program can know."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(encoding="utf-8").splitlines() if cpu_info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "processor": models[0] if models else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def libraries() -> dict[str, str]:
    """Versions of what a whole model's pickle holds objects of, apart from torch's, which outlive its versions."""
    return {"transformers": transformers.__version__, "peft": peft.__version__}


# ---- mixtures --------------------------------------------------------------------------------------------------------


def config(**options: Any) -> MoELoraConfig:
    fields = {"r": 1, "lora_alpha": 2, "target_modules": TARGETS, "num_experts": 3, "task_type": "CAUSAL_LM"}
    return MoELoraConfig(**(fields | {"maturity_tokens": 40} | options))


def train(model: Any, steps: int = 3) -> Any:
    """Draw experts and scores far apart, and take a few steps."""
    draw(model, "lora_", std=0.4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    for _ in range(steps):
        model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def mixture(**options: Any) -> Any:
    return train(get_peft_model(base_model(), config(**options)))


def expert_by_expert() -> Any:
    """Two experts named one by one and an adapter of two, all of which remember their domains."""
    options = {"top_k_experts": 1, "router_temperature": 0.7}
    model = get_peft_model(base_model(), config(**options), adapter_name="expert_0")
    model.add_adapter("expert_1", config(**options))
    grow(model, 2, name="law", freeze_experts=False, freeze_scores=False)
    train(model)
    for number, name in enumerate(model.active_adapters):
        remember(model, name, [{"input_ids": IDS + number, "attention_mask": MASK}], rank=2)
    return model


def with_attached_router() -> Any:
    model = mixture(router_type="learned")
    router = nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 3), nn.Softmax(dim=-1))
    model.attach_router(draw(router, "", std=1.0))
    return model


def with_imported_lora() -> Any:
    model = mixture(router_type="learned", router_temperature=1.0)
    with tempfile.TemporaryDirectory() as folder:
        options = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"}
        draw(get_peft_model(base_model(), LoraConfig(**options)), "lora_", std=0.4).save_pretrained(folder)
        from_lora(model, folder, "imported", is_trainable=True)
    return train(model)


def fixed() -> Any:
    model = mixture(router_type="fixed", routing_scale=3.0)
    model.set_routing_weights([0.5, 0.2, 0.3])
    return model


FOLDERS: dict[str, Callable[[], Any]] = {
    "block": mixture,
    "module": lambda: mixture(
        router_scope="module",
        router_hidden_size=4,
        load_balance_loss_type="switch",
        target_modules=["q_proj", "up_proj"],
    ),
    "model": lambda: mixture(
        router_scope="model",
        router_type="learned",
        top_k_experts=3,
        expert_capacity_factor=0.5,
        load_balance_loss_type="z_loss",
    ),
    "fixed": fixed,
    "expert_by_expert": expert_by_expert,
    "attached": with_attached_router,
    "imported": with_imported_lora,
    "rslora": lambda: mixture(
        use_rslora=True, rank_pattern={"q_proj": 3}, router_type="learned", expert_capacity_factor=0.8
    ),
}


def in_mid_life(model: Any) -> Any:
    """As a Trainer leaves it between two logs: statistics, a window of training steps, routed checkpoints."""
    from moelora.monitor import TrainingWindow

    model.base_model.routing.window = TrainingWindow()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.get_base_model().disable_input_require_grads()  # a hook that no pickle takes, for reentrant ones
    return train(model, steps=2)


PICKLED_MODELS: dict[str, Callable[[], Any]] = {
    "block": lambda: in_mid_life(mixture()),
    "expert_by_expert": lambda: in_mid_life(expert_by_expert()),
}


# ---- files -----------------------------------------------------------------------------------------------------------


def write_folders(tensors: dict[str, Tensor], expected: dict[str, Any]) -> None:
    for name, build in FOLDERS.items():
        model, folder = build(), HERE / "folders" / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(str(folder))
        (folder / "README.md").unlink()  # PEFT's model card
        loaded = PeftModel.from_pretrained(base_model(), folder, is_trainable=True)
        note(f"folders/{name}", loaded, model, tensors, expected)


def write_pickled_models(tensors: dict[str, Tensor], expected: dict[str, Any]) -> None:
    for name, build in PICKLED_MODELS.items():
        model, file = build(), HERE / "pickles" / f"model_{name}.pt"
        torch.save(model, file)
        note(f"pickles/model_{name}", torch.load(file, weights_only=False), model, tensors, expected)


def note(key: str, loaded: Any, model: Any, tensors: dict[str, Tensor], expected: dict[str, Any]) -> None:
    """Keep what the loaded model does, which is what the saved one does."""
    seen, expected[key] = observe(loaded)
    assert torch.equal(seen["logits"], observe(model)[0]["logits"]), key
    tensors.update({f"{key}/{kind}": tensor for kind, tensor in seen.items()})


def write_other_pickles(expected: dict[str, Any]) -> None:
    """A configuration, the output of a training forward, statistics."""
    model = mixture()
    output = model(**BATCH, use_cache=False)
    stats = list(model.routing_stats().values())
    torch.save(model.peft_config["default"], HERE / "pickles" / "config.pt")
    torch.save(output, HERE / "pickles" / "output.pt")
    torch.save(stats, HERE / "pickles" / "stats.pt")
    expected["pickles/output"] = {name: value.tolist() for name, value in output.items()}
    expected["pickles/stats"] = [asdict(each) for each in stats]
    expected["pickles/config"] = fields_of(model.peft_config["default"])


def fields_of(config: MoELoraConfig) -> dict[str, Any]:
    """A configuration's fields as JSON has them."""
    return json.loads(json.dumps(config.to_dict(), default=sorted))


# ---- names -----------------------------------------------------------------------------------------------------------


def names_in(pickled: bytes) -> set[str]:
    """The names of moelora that a pickle, or a file of torch.save, refers to, as module:name."""
    found, strings = set(), []
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL":
            found.add(argument.replace(" ", ":"))
        elif opcode.name == "STACK_GLOBAL":
            found.add(":".join(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
    return {name for name in found if name.startswith("moelora")}


def names_in_file(file: Path) -> set[str]:
    with zipfile.ZipFile(file) as archive:
        member = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        return names_in(archive.read(member))


def names_in_other_lives() -> set[str]:
    """What the files leave out: fixed routers, other PeftModels, a cache, a router that is awaited, a growth in
    mid-step. By protocol 2, in which every name stands in full."""
    from moelora.peft_model import _CLASSES

    objects: list[Any] = [build() for build in FOLDERS.values()]
    objects.append(expert_by_expert()(input_ids=IDS, use_cache=True))
    objects.append(awaiting_its_router())
    half = mixture().half()
    half(**BATCH)
    objects.append(half.base_model.routing.growth)
    peft_models = {f"{cls.__module__}:{cls.__name__}" for cls in _CLASSES.values()}
    return peft_models.union(*(names_in(pickle.dumps(each, protocol=2)) for each in objects))


class OwnRouter(nn.Linear):
    """A router that is code of the user's, which a folder does not hold."""


def awaiting_its_router() -> Any:
    model = mixture()
    model.attach_router(OwnRouter(HIDDEN, 3))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return PeftModel.from_pretrained(base_model(), folder)


def check_commit() -> None:
    """Exit where the package that was imported is another commit's."""
    package = Path(moelora.__file__).parent
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=package, capture_output=True, text=True)
    changed = subprocess.run(["git", "status", "--porcelain", "."], cwd=package, capture_output=True, text=True)
    if not asked.stdout.startswith(COMMIT) or changed.stdout:
        sys.exit(f"{package} is not moelora as commit {COMMIT} has it; see the top of {__file__}")


def main() -> None:
    check_commit()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    (HERE / "pickles").mkdir(exist_ok=True)
    tensors: dict[str, Tensor] = {}
    expected: dict[str, Any] = {"machine": this_machine(), "libraries": libraries()}
    write_folders(tensors, expected)
    write_pickled_models(tensors, expected)
    write_other_pickles(expected)
    names = set().union(*map(names_in_file, (HERE / "pickles").glob("*.pt")), names_in_other_lives())
    save_file(tensors, HERE / "expected.safetensors")
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")
    (HERE / "names_in_pickles.txt").write_text("".join(f"{name}\n" for name in sorted(names)), encoding="utf-8")


if __name__ == "__main__":
    main()
