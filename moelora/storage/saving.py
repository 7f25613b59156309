"""Saving a mixture: complete or not at all.

Layouts of a directory:
    one adapter: PEFT's own (adapter_config.json, adapter_model.safetensors).
    a mixture of several: the same two files. The configuration lists the adapters under `adapters`, with their places
        among the active ones; the weights are named "<adapter>/<PEFT's name>".
    an attached router is beside them in router.safetensors.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..config import MoELoraConfig
from ..files.atomic_save import CARD_NAME, ID_KEY, ROUTER_NAME, checksum, flush, new_id, put_in_place
from ..files.staging import staging
from .attached_router import describe, save_router

Tensors = dict[str, Tensor]


def save(
    model: PeftModel,
    save_directory: str,
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    save_embedding_layers: bool | str = "auto",
    is_main_process: bool = True,
    path_initial_model_for_weight_conversion: str | None = None,
    state_dict: Tensors | None = None,
    **kwargs: Any,
) -> None:
    """Write model's adapters and attached router to save_directory; see [`MixturePeftModel.save_pretrained`].

    Raises:
        ValueError: save_directory is a file, an adapter does not exist, several adapters are to be pickled, or what
            was gathered of an adapter is not all of it.
    """
    directory = Path(save_directory)
    if directory.is_file():
        raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
    if path_initial_model_for_weight_conversion is not None:
        raise ValueError(
            "`path_initial_model_for_weight_conversion` is for LoRAs that changed the base weights when they were "
            "made, which no mixture does; leave it out"
        )
    names = _wanted(model, selected_adapters)
    as_one = selected_adapters is None and names != ["default"]
    if as_one and not safe_serialization:
        raise ValueError("`safe_serialization=False` cannot save a mixture of several adapters; leave it at True")
    # Sharded engines gather the weights on every process.
    gathered = {name: _state_dict_of(model, name, state_dict, save_embedding_layers) for name in names}
    if not is_main_process:
        return
    for name in names:
        _check_complete(model, name, gathered[name])
    with_router = _saves_router(model, names)
    with staging(directory / "adapter" if directory.is_dir() else directory) as place:
        written = dict(_write_all(model, gathered, as_one, safe_serialization, with_router, directory, place))
        for target, folder in written.items():
            put_in_place(folder, target)


def _wanted(model: PeftModel, selected: list[str] | None) -> list[str]:
    there = list(model.peft_config)
    if missing := [name for name in selected or () if name not in there]:
        raise ValueError(f"`selected_adapters` has {missing[0]!r}; the model's adapters are {', '.join(there)}")
    return there if selected is None else list(selected)


def _state_dict_of(
    model: PeftModel, name: str, state_dict: Tensors | None, save_embedding_layers: bool | str
) -> Tensors:
    return get_peft_model_state_dict(
        model, state_dict=state_dict, adapter_name=name, save_embedding_layers=save_embedding_layers
    )


def _check_complete(model: PeftModel, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Compare what is to be written with what the model has: a save that lacks a part is found out years later."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and name in m.lora_A]
    state = model.base_model.routing_or_none  # none where all that is adapted are a base's native experts
    routers = [r[name] for r in (state.routers.values() if state else ()) if name in r.lora_router]
    expected = 2 * len(layers) + sum(len(router.state_dict()) for router in routers)
    found = sum(".lora_A.weight" in key or ".lora_B.weight" in key or ".lora_router." in key for key in tensors)
    if found != expected:
        raise ValueError(
            f"adapter {name!r} has {expected} tensors of experts and routers, and {found} were gathered; nothing was "
            "written. Pass the whole model's `state_dict`, or leave it out"
        )


def _saves_router(model: PeftModel, names: list[str]) -> bool:
    """Whether an attached router is saved with adapters: it knows the experts of all active ones by their number."""
    state = model.base_model.routing_or_none
    if state is None or state.attached is None:
        return False
    if set(model.active_adapters) <= set(names):
        return True
    warnings.warn(
        f"the attached router serves {', '.join(model.active_adapters)} together and is not saved with "
        f"{', '.join(names)} alone",
        stacklevel=5,
    )
    return False


# ---- files -----------------------------------------------------------------------------------------------------------


def _write_all(
    model: PeftModel,
    gathered: Mapping[str, Tensors],
    as_one: bool,
    safe_serialization: bool,
    with_router: bool,
    directory: Path,
    place: Path,
) -> list[tuple[Path, Path]]:
    """Write every adapter's files below place; for each folder, where it is to go, and where it is."""
    if as_one:
        tensors = {f"{name}/{key}": tensor for name, own in gathered.items() for key, tensor in own.items()}
        parts = [(directory, tensors, _mixture_config(model))]
    else:
        folders = {name: directory if name == "default" else directory / name for name in gathered}
        parts = [(folders[name], own, _adapter_config(model, name)) for name, own in gathered.items()]
    written = []
    for number, (target, tensors, config) in enumerate(parts):
        folder = place / str(number)
        folder.mkdir(parents=True)
        _write(model, tensors, config, safe_serialization, folder, with_router and target == directory)
        written.append((target, folder))
    card = written[0][1] if written and written[0][0] == directory else place / "card"
    card.mkdir(exist_ok=True)
    if (directory / CARD_NAME).exists():
        shutil.copy(directory / CARD_NAME, card)  # PEFT updates the model card that is there
    model.create_or_update_model_card(str(card))
    return written if written and written[0][1] == card else [*written, (directory, card)]


def _write(
    model: PeftModel,
    tensors: Tensors,
    config: MoELoraConfig,
    safe_serialization: bool,
    folder: Path,
    with_router: bool,
) -> None:
    save_id = new_id()
    if safe_serialization:
        name, tensors = SAFETENSORS_WEIGHTS_NAME, _without_aliases(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt", ID_KEY: save_id})
    else:
        name = WEIGHTS_NAME
        torch.save(tensors, folder / name)
    files = {name: _sum_while_flushing(folder / name, tensors)}
    router = model.base_model.routing.attached if with_router else None
    if router is not None:
        files[ROUTER_NAME] = checksum(save_router(router, folder, save_id))
    config.checkpoint = {"id": save_id, "files": files}
    if router is not None:
        config.checkpoint["router"] = describe(router, model.base_model.routing.num_experts)
    base = model.get_base_model()
    auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=None if config.task_type else auto_mapping)


def _sum_while_flushing(path: Path, tensors: Tensors) -> str:
    """The checksum of a file's tensors; while the disk takes the file, a processor has time for it."""
    with ThreadPoolExecutor(1) as other:
        flushing = other.submit(flush, path)
        summed = checksum(tensors)
        flushing.result()
    return summed


def _without_aliases(tensors: Mapping[str, Tensor]) -> Tensors:
    """Contiguous tensors, each with memory of its own, as safetensors wants them."""
    seen: set[tuple[torch.device, int]] = set()
    plain: Tensors = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        memory = tensor.device, tensor.untyped_storage().data_ptr()
        plain[key] = tensor.clone() if memory in seen and tensor.numel() else tensor
        seen.add(memory)
    return plain


# ---- configurations --------------------------------------------------------------------------------------------------


def _adapter_config(model: PeftModel, name: str) -> MoELoraConfig:
    config = copy.deepcopy(model.peft_config[name])
    base = model.get_base_model()
    config.base_model_name_or_path = config.base_model_name_or_path or base.__dict__.get("name_or_path") or None
    config.inference_mode = True
    return config


def _mixture_config(model: PeftModel) -> MoELoraConfig:
    position = {name: index for index, name in enumerate(model.active_adapters)}
    config = _adapter_config(model, model.active_adapters[0])
    config.adapters = [
        {"name": name, "active": position.get(name), "config": _plain(adapter_config)}
        for name, adapter_config in model.peft_config.items()
    ]
    return config


def _plain(config: MoELoraConfig) -> dict[str, Any]:
    """config as JSON values; what a save says of itself stands at the top alone."""
    values = json.loads(json.dumps(config.to_dict(), default=sorted))
    return values | {"checkpoint": None}
