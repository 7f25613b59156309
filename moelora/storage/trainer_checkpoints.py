"""The Trainer's checkpoints in an output folder: which of them are whole, and what going on from one lacks."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import safe_globals

from ..console import number_from_launcher
from ..files.adapter_files import Place, read_adapter, read_config
from ..files.opening import open_regular, read_json
from ..recipe import Recipe
from ..schema import shorten

STATE_FILE = "trainer_state.json"
NEEDED = {
    "optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    "learning rate schedule": ("scheduler.pt", "global_step*"),
    "random number generators": ("rng_state*.pth",),
}
"""What a run that goes on exactly reads besides the adapter, as patterns of which one matches: engines differ."""


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    complete = _complete(output_dir)
    return complete[-1] if complete else None


def last_whole_checkpoint(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint all of whose files can be read, and what is wrong with each that is newer."""
    damaged: list[str] = []
    for checkpoint in reversed(_complete(output_dir)):
        if (damage := _damage(checkpoint)) is None:
            return checkpoint, damaged
        damaged.append(f"{checkpoint.name} is damaged: {damage}")
    return None, damaged


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which it was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def has_all_steps(recipe: Recipe, checkpoint: Path, steps: int = 0) -> bool:
    """Whether nothing is left to train from a checkpoint; the Trainer would make one step more all the same.

    Args:
        checkpoint: a whole one.
        steps: of the run, which may have gone on from the checkpoint.
    """
    max_steps = recipe.training.get("max_steps", -1)
    if max_steps > 0:
        return max(steps, step_of(checkpoint)) >= max_steps
    epoch = read_json(checkpoint / STATE_FILE)["epoch"]
    return epoch >= recipe.training.get("num_train_epochs", TrainingArguments.num_train_epochs)


def what_it_lacks(checkpoint: Path) -> list[str]:
    """Why a run that goes on from a whole checkpoint will not be the one that was never interrupted."""
    found = [
        f"{checkpoint.name} holds no state of the {name} ({patterns[0].replace('*', '')}), which begins anew"
        for name, patterns in NEEDED.items()
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns)
    ]
    wrote, now = len(list(checkpoint.glob("rng_state*.pth"))), number_from_launcher("WORLD_SIZE", 1)
    if wrote not in (0, now):
        found.append(
            f"{checkpoint.name} was written by {wrote} process(es), and {now} go on from it: texts come in another "
            "order, with other random numbers"
        )
    return found


def _complete(output_dir: Path) -> list[Path]:
    """The Trainer's checkpoints, oldest first, without those that were cut short."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    # The Trainer writes trainer_state.json last.
    return sorted((path for path in found if (path / STATE_FILE).exists()), key=step_of)


# ---- damage ----------------------------------------------------------------------------------------------------------


def _damage(checkpoint: Path) -> str | None:
    """The first file of a checkpoint that does not hold what the Trainer reads from it, and why."""
    for pattern, check in _CHECKS.items():
        for path in sorted(checkpoint.glob(pattern)):
            try:
                check(path)
            except Exception as error:  # a damaged pickle raises whatever it likes
                reason = shorten(" ".join(str(error).split()) or repr(error), 200)
                return f"{path.relative_to(checkpoint)} cannot be read ({reason})"
    if not (checkpoint / SAFETENSORS_WEIGHTS_NAME).exists():
        return f"{SAFETENSORS_WEIGHTS_NAME} is missing"
    return None


def _check_state(path: Path) -> None:
    record = read_json(path)
    if not isinstance(record, dict):
        raise ValueError("no mapping")
    state = TrainerState(**record)
    expected: dict[str, Any] = {"global_step": int, "epoch": (int, float), "log_history": list}
    if wrong := next((name for name, kind in expected.items() if not isinstance(getattr(state, name), kind)), None):
        raise ValueError(f"{wrong} = {getattr(state, wrong)!r}")
    if state.global_step != step_of(path.parent):
        raise ValueError(f"global_step = {state.global_step}")


def _check_config(path: Path) -> None:
    read_config(Place(str(path.parent)))


def _check_weights(path: Path) -> None:
    """As they will be loaded: with the configuration, and the checksums, of the save that they belong to."""
    read_adapter(path.parent).refuse_damage()


def _holding(*keys: str) -> Callable[[Path], None]:
    """A check that a file of torch's holds a mapping with these keys; nothing in it is run."""

    def check(path: Path) -> None:
        try:
            with open_regular(path) as stream, safe_globals():
                content: Any = torch.load(stream, map_location="cpu", weights_only=True)
        except UnpicklingError:  # torch's own words say how to run what is in there
            raise ValueError("it is damaged, or holds what is no tensor, number, text, list or mapping") from None
        if not isinstance(content, Mapping) or not set(keys) <= content.keys():
            raise ValueError(f"no mapping with {', '.join(keys)}" if keys else "no mapping")

    return check


def _check_archive(path: Path) -> None:
    """Of what nothing reads: where it is damaged, the rest of the folder is not to be trusted."""
    with open_regular(path) as stream, zipfile.ZipFile(stream):
        pass


_CHECKS: dict[str, Callable[[Path], None]] = {
    STATE_FILE: _check_state,
    CONFIG_NAME: _check_config,
    "*/" + CONFIG_NAME: _check_config,
    SAFETENSORS_WEIGHTS_NAME: _check_weights,
    "*/" + SAFETENSORS_WEIGHTS_NAME: _check_weights,
    "optimizer.pt": _holding("state", "param_groups"),
    "optimizer.bin": _holding(),
    "scheduler.pt": _holding(),
    "scaler.pt": _holding(),
    "rng_state*.pth": _holding("python", "numpy", "cpu"),
    "training_args.bin": _check_archive,
}
"""By pattern of a file's name. Folders of shards (FSDP2, DeepSpeed) are left to the engines that wrote them."""
