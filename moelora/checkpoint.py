"""Saving and loading a mixture: complete or not at all.

Layouts of a directory:
    one adapter: PEFT's own (adapter_config.json, adapter_model.safetensors).
    a mixture of several: the same two files. The configuration lists the adapters under `adapters`, with their places
        among the active ones; the weights are named "<adapter>/<PEFT's name>".
    an attached router is beside them in router.pt.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import cast_adapter_dtype
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from ._peft import hub_arguments
from .config import MoELoraConfig
from .router_file import ROUTER_NAME, load_router, save_router
from .staging import staging

if TYPE_CHECKING:
    from .peft_model import MixturePeftModel


# ---- saving ----------------------------------------------------------------------------------------------------------


def save(
    model: MixturePeftModel,
    save_as_peft: Callable[..., None],
    save_directory: str,
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    save_embedding_layers: bool | str = "auto",
    is_main_process: bool = True,
    **kwargs: Any,
) -> None:
    """Write model's adapters and attached router to save_directory; see [`MixturePeftModel.save_pretrained`].

    Raises:
        ValueError: save_directory is a file, an adapter does not exist, or several adapters are to be pickled.
    """
    if os.path.isfile(save_directory):
        raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
    as_peft = selected_adapters is not None or list(model.peft_config) == ["default"]
    if not as_peft and not safe_serialization:
        raise ValueError("`safe_serialization=False` cannot save a mixture of several adapters; leave it at True")
    if not is_main_process:  # sharded engines gather the weights on every process
        _state_dicts(model, save_embedding_layers, kwargs.get("state_dict"))
        return
    with _replacing(Path(save_directory)) as place:
        if as_peft:
            arguments = (str(place), safe_serialization, selected_adapters, save_embedding_layers)
            save_as_peft(*arguments, **kwargs)
        else:
            _save_mixture(model, place, save_embedding_layers, kwargs.get("state_dict"))
        if model.base_model.routing.attached is not None:
            save_router(model.base_model.routing.attached, place / ROUTER_NAME)


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A temporary directory whose files replace those in directory once the block has succeeded.

    It lies inside a directory that is there already, which may be a file system of its own or have no name (".").
    """
    with staging(directory / "adapter" if directory.is_dir() else directory) as place:
        place.mkdir()
        if (directory / "README.md").exists():
            shutil.copy(directory / "README.md", place)  # PEFT updates the model card that is there
        yield place
        staged = [path for path in place.rglob("*") if path.is_file()]
        staged.sort(key=lambda path: path.name == CONFIG_NAME)  # last: without it there is no adapter yet
        for path in staged:
            _flush(path)
        for path in staged:
            target = directory / path.relative_to(place)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        _remove_stale(directory, {path.relative_to(place) for path in staged})


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _remove_stale(directory: Path, written: set[Path]) -> None:
    """Remove what an earlier save left and a load would read in place of, or beside, what was written now."""
    formats = {SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME}
    stale = {path.with_name(name) for path in written if path.name in formats for name in formats} - written
    if Path(CONFIG_NAME) in written and Path(ROUTER_NAME) not in written:
        stale.add(Path(ROUTER_NAME))
    for path in stale:
        (directory / path).unlink(missing_ok=True)


def _state_dicts(model: MixturePeftModel, save_embedding_layers: Any, state_dict: Any) -> dict[str, dict[str, Tensor]]:
    return {
        name: get_peft_model_state_dict(
            model, state_dict=state_dict, adapter_name=name, save_embedding_layers=save_embedding_layers
        )
        for name in model.peft_config
    }


def _save_mixture(model: MixturePeftModel, directory: Path, save_embedding_layers: Any, state_dict: Any) -> None:
    per_adapter = _state_dicts(model, save_embedding_layers, state_dict)
    tensors = {
        f"{name}/{key}": tensor.detach().cpu().contiguous().clone()
        for name, entries in per_adapter.items()
        for key, tensor in entries.items()
    }
    save_file(tensors, directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    position = {name: index for index, name in enumerate(model.active_adapters)}
    config = copy.deepcopy(model.peft_config[model.active_adapters[0]])
    config.adapters = [
        {"name": name, "active": position.get(name), "config": _plain(adapter_config)}
        for name, adapter_config in model.peft_config.items()
    ]
    base = model.get_base_model()
    config.base_model_name_or_path = config.base_model_name_or_path or base.__dict__.get("name_or_path") or None
    config.inference_mode = True
    auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    config.save_pretrained(str(directory), auto_mapping_dict=None if config.task_type else auto_mapping)
    model.create_or_update_model_card(str(directory))


def _plain(config: MoELoraConfig) -> dict[str, Any]:
    """config as JSON values."""
    return json.loads(json.dumps(config.to_dict(), default=sorted))


# ---- loading ---------------------------------------------------------------------------------------------------------


def load(
    model: MixturePeftModel,
    load_as_peft: Callable[..., Any],
    model_id: str,
    adapter_name: str,
    is_trainable: bool = False,
    **kwargs: Any,
) -> Any:
    """Load the adapters saved at model_id; see [`MixturePeftModel.load_adapter`].

    Raises:
        ValueError: the checkpoint is damaged or does not fit.
    """
    hub_kwargs = hub_arguments(kwargs)
    config = MoELoraConfig.from_pretrained(model_id, **hub_kwargs)
    weights = read_weights(model_id, kwargs.get("key_mapping"), hub_kwargs)
    if getattr(config, "adapters", None):
        result = _load_mixture(model, config, model_id, weights, is_trainable, _building_options(kwargs))
    else:
        result = _load_adapter(model, load_as_peft, config, model_id, adapter_name, is_trainable, weights, kwargs)
    load_router(model.base_model, _router_file(model_id, hub_kwargs))
    return result


def _building_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of load_adapter's keyword arguments that add_adapter takes too."""
    return {name: kwargs[name] for name in ("low_cpu_mem_usage", "autocast_adapter_dtype") if name in kwargs}


def _router_file(model_id: str, hub_kwargs: dict[str, Any]) -> Path | None:
    """Where the attached router of a folder or hub id lies; None where there is none."""
    if os.path.isdir(model_id):
        path = Path(model_id, hub_kwargs.get("subfolder") or "", ROUTER_NAME)
        return path if path.is_file() else None
    arguments = {"token" if name == "use_auth_token" else name: value for name, value in hub_kwargs.items()}
    try:
        return Path(hf_hub_download(model_id, ROUTER_NAME, **arguments))
    except EntryNotFoundError:
        return None


def read_weights(
    model_id: str, key_mapping: dict[str, str] | None = None, hub_kwargs: dict[str, Any] | None = None
) -> dict[str, Tensor]:
    """The tensors of an adapter saved at model_id, a folder or a hub id, by PEFT's names.

    Raises:
        ValueError: there are none, or their file is damaged.
    """
    try:
        return load_peft_weights(model_id, device="cpu", key_mapping=key_mapping, **hub_kwargs or {})
    except (SafetensorError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"the weights in {model_id!r} are damaged or truncated ({error}); restore them from a copy or an earlier "
            "checkpoint"
        ) from error


def _load_adapter(
    model: MixturePeftModel,
    load_as_peft: Callable[..., Any],
    config: MoELoraConfig,
    model_id: str,
    adapter_name: str,
    is_trainable: bool,
    weights: dict[str, Tensor],
    kwargs: dict[str, Any],
) -> Any:
    is_new = adapter_name not in model.peft_config
    if is_new:
        config.inference_mode = not is_trainable
        model._add_inactive_adapter(adapter_name, config, **_building_options(kwargs))
    try:
        _check_fit(model, {adapter_name: weights}, model_id, kwargs.get("ignore_mismatched_sizes", False))
        result = load_as_peft(model_id, adapter_name, is_trainable=is_trainable, **kwargs)
        if kwargs.get("low_cpu_mem_usage"):  # PEFT has rounded them to the base's dtype on the way
            mismatched = kwargs.get("ignore_mismatched_sizes", False)
            set_peft_model_state_dict(model, weights, adapter_name, ignore_mismatched_sizes=mismatched)
    except Exception:
        if is_new:
            model.delete_adapter(adapter_name)
        raise
    if is_new and is_trainable:
        model.set_requires_grad(adapter_name)
    return result


def _load_mixture(
    model: MixturePeftModel,
    config: MoELoraConfig,
    model_id: str,
    weights: dict[str, Tensor],
    is_trainable: bool,
    options: dict[str, Any],
) -> Any:
    per_adapter: dict[str, dict[str, Tensor]] = {entry["name"]: {} for entry in config.adapters or []}
    for key, tensor in weights.items():
        name, _, rest = key.partition("/")
        if name not in per_adapter:
            raise ValueError(f"{model_id!r} holds weights {key!r} of no adapter it lists ({', '.join(per_adapter)})")
        per_adapter[name][rest] = tensor
    new = [entry for entry in config.adapters or [] if entry["name"] not in model.peft_config]
    try:
        for entry in new:
            adapter_config = MoELoraConfig.from_peft_type(**entry["config"])
            adapter_config.inference_mode = not is_trainable
            model._add_inactive_adapter(entry["name"], adapter_config, **options)
        _check_fit(model, per_adapter, model_id)
    except Exception:
        for entry in new:
            if entry["name"] in model.peft_config:
                model.delete_adapter(entry["name"])
        raise
    for name, entries in per_adapter.items():
        _set_weights(model, name, entries, autocast=options.get("autocast_adapter_dtype", True))
    if not is_trainable:
        model.eval()
    return _IncompatibleKeys([], [])


def _set_weights(model: MixturePeftModel, name: str, weights: dict[str, Tensor], autocast: bool) -> None:
    """Load one adapter's weights; what was saved in float32 stays float32 on any base, if autocast."""
    if any(parameter.is_meta for parameter in model.parameters()):  # makes them real, rounded to the base's dtype
        set_peft_model_state_dict(model, weights, adapter_name=name, low_cpu_mem_usage=True)
    is_float32 = all(tensor.dtype == torch.float32 for key, tensor in weights.items() if "lora_A" in key)
    if autocast and is_float32:  # PEFT's constructor casts an adapter that is called "default" alone
        cast_adapter_dtype(model, name)
    set_peft_model_state_dict(model, weights, adapter_name=name)


def _check_fit(
    model: MixturePeftModel,
    per_adapter: dict[str, dict[str, Tensor]],
    model_id: str,
    ignore_mismatched_sizes: bool = False,
) -> None:
    """Compare names and shapes with what the model would save, before anything is overwritten."""
    state_dict = model.state_dict()
    problems = []
    for name, weights in per_adapter.items():
        expected = get_peft_model_state_dict(
            model, state_dict=state_dict, adapter_name=name, save_embedding_layers=False
        )
        if not weights:
            problems.append(f"adapter {name!r} is missing")
            continue
        problems += [f"{key!r} of adapter {name!r} is missing" for key in expected if key not in weights]
        extra = [key for key in weights if key not in expected and not _is_base_weight(key)]
        problems += [f"{key!r} of adapter {name!r} has no place in the model" for key in extra]
        if not ignore_mismatched_sizes:
            problems += [
                f"{key!r} of adapter {name!r} has shape {list(weights[key].shape)}, the model {list(tensor.shape)}"
                for key, tensor in expected.items()
                if key in weights and weights[key].shape != tensor.shape
            ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(
            f"the checkpoint {model_id!r} does not fit the model: {shown}. Load it into the base model it was trained "
            "on, with the configuration it was saved with"
        )


def _is_base_weight(key: str) -> bool:
    """Whether PEFT saved a weight of the base model along (`save_embedding_layers`, `bias`)."""
    return not any(part.startswith("lora_") for part in key.split("."))
