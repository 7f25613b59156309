"""Loading a mixture: all of it is read and compared with the model before anything in the model changes."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import cast_adapter_dtype
from peft.utils import CONFIG_NAME
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from ..config import MoELoraConfig
from ..files.adapter_files import AdapterFiles, check_tensors, read_adapter, refuse
from ..files.atomic_save import SaveError
from .attached_router import check_loads_into, router_for, unpickle_router

Tensors = dict[str, Tensor]


def load(
    model: PeftModel,
    load_as_peft: Callable[..., Any],
    model_id: str,
    adapter_name: str,
    is_trainable: bool = False,
    router: nn.Module | None = None,
    allow_pickled_router: bool = False,
    load_embedding_layers: bool = False,
    **kwargs: Any,
) -> Any:
    """Load the adapters saved at model_id; see [`MixturePeftModel.load_adapter`].

    Raises:
        ValueError: the checkpoint is damaged, mixed up or does not fit; nothing has changed then.
    """
    files = _renamed(read_adapter(model_id, _hub_arguments(kwargs)), kwargs.get("key_mapping"))
    saved = configurations(files, adapter_name)
    _check_same_save(model, files, saved)
    is_mixture = bool(files.config.get("adapters"))
    per_adapter = files.by_adapter(saved) if is_mixture else {adapter_name: files.weights}
    attached = _router_to_attach(model, files, router, allow_pickled_router)
    new = {name: config for name, config in saved.items() if name not in model.peft_config}
    with _taking_back(model, list(new)):
        for name, config in new.items():
            config.inference_mode = not is_trainable
            model._add_inactive_adapter(name, config, **_building_options(kwargs))
        any_size = bool(kwargs.get("ignore_mismatched_sizes"))
        left_out = _check_fit(model, per_adapter, files.source, any_size, load_embedding_layers)
        files.refuse_damage()
    for name, weights in per_adapter.items():
        if not is_mixture and _is_offloaded(model):  # only PEFT knows how accelerate's hooks go back
            load_as_peft(model_id, name, is_trainable=is_trainable, **kwargs)
        own = {key: tensor for key, tensor in weights.items() if key not in left_out}
        _set_weights(model, name, own, kwargs, always_cast=not is_mixture)
    if not is_mixture and new and is_trainable:
        model.set_requires_grad(adapter_name)
    if attached is not None:
        _attach(model, *attached)
    if not is_trainable:
        model.eval()
    return _IncompatibleKeys([], [])


# ---- what is read ----------------------------------------------------------------------------------------------------


def configurations(files: AdapterFiles, adapter_name: str = "default") -> dict[str, MoELoraConfig]:
    """The configurations of all adapters of a save, by name.

    Args:
        adapter_name: of the one that is saved as PEFT saves it, without a name.

    Raises:
        ValueError: the adapter is of another kind, or a field is out of range.
    """
    if (kind := files.config.get("peft_type")) != "MOELORA":
        raise ValueError(
            f"{files.source!r}: `peft_type` is {kind!r}, not 'MOELORA'; a plain LoRA joins a mixture by "
            "`moelora.experts.from_lora`"
        )
    whole = _configuration(files, files.config)
    if not whole.adapters:
        return {adapter_name: whole}
    return {entry["name"]: _configuration(files, entry["config"]) for entry in whole.adapters}


def _configuration(files: AdapterFiles, settings: Mapping[str, Any]) -> MoELoraConfig:
    try:
        own = {name: value for name, value in settings.items() if name != "runtime_config"}
        return cast(MoELoraConfig, MoELoraConfig.from_peft_type(**own))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{CONFIG_NAME} in {files.source!r}: {error}") from error


def _hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of load_adapter's keyword arguments that say where on the hub to look, as PEFT finds them."""
    known = {*inspect.signature(hf_hub_download).parameters, "use_auth_token"}
    return {name: value for name, value in kwargs.items() if name in known}


def _check_same_save(model: PeftModel, files: AdapterFiles, saved: Mapping[str, MoELoraConfig]) -> None:
    """Refuse weights of a save that came after the one whose configuration `from_pretrained` built the model by."""
    for name, config in model.peft_config.items():
        source, save_id = config.read_from or (None, None)
        if source != files.source or save_id == files.save_id:
            continue
        if name not in saved or _what_counts(config) != _what_counts(saved[name]):
            raise SaveError(
                f"{files.source!r} was saved anew, with another configuration, while it was being read; load it again"
            )


def _what_counts(config: MoELoraConfig) -> dict[str, Any]:
    """The fields that say how an adapter computes."""
    fields = json.loads(json.dumps(config.to_dict(), default=sorted))
    return {name: value for name, value in fields.items() if name not in _NOTES}


_NOTES = frozenset(
    ("inference_mode", "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "adapters", "checkpoint")
)


def _renamed(files: AdapterFiles, key_mapping: Mapping[str, str] | None) -> AdapterFiles:
    """The same weights under the names that the model's class has given its modules since; PEFT's `key_mapping`."""
    if not key_mapping:
        return files
    return replace(files, weights={_renamed_key(key, key_mapping): tensor for key, tensor in files.weights.items()})


def _renamed_key(key: str, key_mapping: Mapping[str, str]) -> str:
    adapter, slash, name = key.rpartition("/")
    prefix = next((prefix for prefix in ("base_model.model.", "base_model.") if name.startswith(prefix)), "")
    rest = name.removeprefix(prefix)
    for pattern, replacement in key_mapping.items():
        changed, count = re.subn(pattern, replacement, rest)
        if count:
            rest = changed
            break
    return f"{adapter}{slash}{prefix}{rest}"


def _building_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of load_adapter's keyword arguments that add_adapter takes too."""
    return {name: kwargs[name] for name in ("low_cpu_mem_usage", "autocast_adapter_dtype") if name in kwargs}


@contextmanager
def _taking_back(model: PeftModel, names: list[str]) -> Iterator[None]:
    """Delete the adapters that the block has added, where it fails."""
    try:
        yield
    except BaseException:
        for name in names:
            if name in model.peft_config:
                model.delete_adapter(name)
        raise


# ---- whether it fits -------------------------------------------------------------------------------------------------


def _check_fit(
    model: PeftModel,
    per_adapter: Mapping[str, Tensors],
    source: str,
    any_size: bool,
    load_embedding_layers: bool,
) -> set[str]:
    """Compare names, shapes and dtypes with what the model would save; names of what is not to be loaded.

    Raises:
        ValueError: listing what does not fit.
    """
    state_dict = model.state_dict()
    problems: list[str] = []
    left_out: set[str] = set()
    for name, weights in per_adapter.items():
        expected = get_peft_model_state_dict(
            model, state_dict=state_dict, adapter_name=name, save_embedding_layers=False
        )
        of_base = {key: state_dict[key] for key in _embedding_keys(model, state_dict) if key in weights}
        left_out |= of_base.keys()
        if not load_embedding_layers:
            changed = [key for key, there in of_base.items() if not _is_same(weights[key], there)]
            problems += [
                f"{key!r} would replace the base model's own embeddings, for good; pass `load_embedding_layers=True` "
                "if that is wanted"
                for key in changed
            ]
        problems += check_tensors(name, weights, expected | of_base, any_size)
    refuse(source, problems)
    return set() if load_embedding_layers else left_out


def _embedding_keys(model: PeftModel, state_dict: Mapping[str, Any]) -> list[str]:
    """Names of the weights of input and output embeddings, which PEFT saves along if they were resized or adapted."""
    base = model.get_base_model()
    found: list[Any] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layer = getattr(base, getter)()
            found += [layer, getattr(layer, "base_layer", layer)]
        except (AttributeError, NotImplementedError):  # no text model
            continue
    names = [name for name, module in model.named_modules() if any(module is layer for layer in found)]
    return [key for key in state_dict if key.rpartition(".")[0] in names]


def _is_same(saved: Tensor, there: Tensor) -> bool:
    if saved.shape != there.shape or saved.dtype != there.dtype or there.is_meta:
        return False
    return bool(torch.equal(saved, there.detach().cpu()))


# ---- weights ---------------------------------------------------------------------------------------------------------


def _is_offloaded(model: PeftModel) -> bool:
    """Whether parts of the base model lie on the CPU or the disk until they are needed."""
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    return bool(places & {"cpu", "disk"})


def _set_weights(model: PeftModel, name: str, weights: Tensors, kwargs: Mapping[str, Any], always_cast: bool) -> None:
    """Load one adapter's weights; what was saved in float32 stays float32 on any base, if autocast."""
    mismatched = bool(kwargs.get("ignore_mismatched_sizes"))
    autocast = kwargs.get("autocast_adapter_dtype", True)
    if any(parameter.is_meta for parameter in model.parameters()):  # makes them real, rounded to the base's dtype
        set_peft_model_state_dict(model, weights, name, ignore_mismatched_sizes=mismatched, low_cpu_mem_usage=True)
    is_float32 = all(tensor.dtype == torch.float32 for key, tensor in weights.items() if "lora_A" in key)
    if autocast and (is_float32 or always_cast):  # PEFT's constructor casts an adapter that is called "default" alone
        cast_adapter_dtype(model, name)
    set_peft_model_state_dict(model, weights, name, ignore_mismatched_sizes=mismatched)


# ---- the attached router ---------------------------------------------------------------------------------------------


def _router_to_attach(
    model: PeftModel, files: AdapterFiles, given: nn.Module | None, allow_pickled_router: bool
) -> tuple[nn.Module, Tensors | None] | None:
    """The router that the save has (the user's module, or one made for it) and what to load into it; None without."""
    state = model.base_model.routing_or_none
    there = given or (state.attached if state else None)
    if files.pickled_router is not None:
        unpickled = unpickle_router(files.pickled_router, allow_pickled_router)
        if there is None:
            return unpickled, None
        check_loads_into(there, type(unpickled).__name__, unpickled.state_dict(), files.source)
        return there, unpickled.state_dict()
    if files.router is not None:
        described = files.config["checkpoint"].get("router", {})
        router = router_for(files.source, described, files.router, model.base_model.routing.num_experts, there)
        return router, files.router if router is there else None
    if given is not None:
        raise ValueError(
            f"`router` ({type(given).__name__}) was given, and {files.source!r} was saved without an attached router; "
            "leave it out, and call `attach_router(module)` after loading"
        )
    return None


def _attach(model: PeftModel, router: nn.Module, weights: Tensors | None) -> None:
    if weights is not None:
        router.load_state_dict(weights)
    if router is not model.base_model.routing.attached:
        model.base_model.attach_router(router)
