"""Plain LoRAs become experts: added to a mixture, or a mixture made of nothing else.

Shapes: E experts, H router input width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..config import SHARED_FIELDS, MoELoraConfig
from ..data.tokens import token_ids
from ..recipe import plain_name
from ..routing import Router
from ..schema import settable_fields
from ..storage.lora_file import LoraError, LoraFile, read_lora
from ..storage.mixture_files import misfit
from ..tuner._peft import BaseTunerLayer
from ..tuner.blocks import check_targets
from ..tuner.layer import MoELoraLayer
from ..tuner.model import MoELoraModel
from ..tuner.names import check_adapter_name
from .scoring import ARROW_UNITS, score_by_arrow, score_by_prototype

MIXTURES: dict[str, dict[str, Any]] = {
    "arrow": {"router_type": "learned", "router_scope": "module", "router_hidden_size": ARROW_UNITS},
    "prototype": {"router_type": "learned", "router_scope": "block"},
    "uniform": {"router_type": "fixed", "router_scope": "model"},
    "train": {"router_type": "learned_with_maturity", "router_scope": "block"},
}
"""What each way to get a router asks of the mixture."""


def build(
    base_model: nn.Module,
    experts: Mapping[str, str | Path | LoraFile],
    router: str = "arrow",
    *,
    top_k: int | None = None,
    temperature: float = 1.0,
    examples: Mapping[str, Sequence[str]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PeftModel:
    """A mixture of plain LoRAs, which stay as they are; in evaluation mode and frozen.

    Args:
        base_model: the model that the LoRAs were trained on.
        experts: where each LoRA is (a folder or a hub id), by the name it is to have.
        router: "arrow" (from the experts' own factors, Ostapenko et al., arXiv:2405.11157), "prototype" (from example
            texts), "uniform" (equal weights for every token, mergeable) or "train" (scores of zero, to be trained with
            [`moelora.experts.train_router`]).
        top_k: experts per token, 2 by default; "uniform" uses all.
        temperature: of the routers' softmax.
        examples: for "prototype": texts of each expert's kind, by its name.
        tokenizer: for "prototype".

    Raises:
        LoraError (a ValueError): a LoRA does not carry over or does not fit the model, or an argument is wrong.
    """
    if router not in MIXTURES:
        raise LoraError(f"`router` ({router!r}) is not one of {', '.join(MIXTURES)}")
    check_names(experts, base_model)
    top_k = min(2, len(experts)) if top_k is None else top_k
    if not 1 <= top_k <= len(experts):
        raise LoraError(f"`top_k` ({top_k}) must be from 1 to the number of experts ({len(experts)})")
    if router == "prototype" and (tokenizer is None or set(examples or ()) != set(experts)):
        raise LoraError("`examples` must hold texts for every expert, and `tokenizer` is needed, for 'prototype'")
    loras = {name: given if isinstance(given, LoraFile) else read_lora(given) for name, given in experts.items()}
    for lora in loras.values():
        check_fits(lora, base_model)
    if router == "prototype":
        assert tokenizer is not None and examples is not None
        check_examples(tokenizer, examples)
    shared = {"num_experts": max(2, len(loras)), "top_k_experts": top_k, "router_temperature": temperature}
    (first_name, first), *others = loras.items()
    model = _of_one(base_model, first_name, first, shared | MIXTURES[router])
    for name, lora in others:
        from_lora(model, lora, name, router="arrow" if router == "arrow" else "zero")
    if router == "arrow":
        score_by_arrow(model, [first_name])
    elif router == "prototype":
        assert tokenizer is not None and examples is not None
        score_by_prototype(model, tokenizer, examples)
    return model.eval()


def mixture_from_lora(
    base_model: nn.Module, path_or_id: str | Path | LoraFile, name: str = "default", **shared: Any
) -> PeftModel:
    """A mixture of one plain LoRA, which new experts may join ([`moelora.experts.grow`]); in evaluation mode, frozen.

    Alone it makes what PEFT makes of the LoRA, bit for bit. Its alpha is divided by `routing_scale`, which multiplies
    the weight of 1 that it has then; a scale that is no power of two therefore leaves a rounding. New experts need a
    `lora_alpha` of their own then.

    Args:
        base_model: the model that the LoRA was trained on.
        path_or_id: folder or hub id of the LoRA.
        name: of its adapter.
        shared: fields of `MoELoraConfig` that hold for all adapters of the mixture, such as `top_k_experts` and
            `routing_scale`; their defaults otherwise.

    Raises:
        LoraError (a ValueError): the LoRA does not carry over or does not fit the model, the name cannot be had, or a
            field is none that a mixture shares.
    """
    if apart := [field for field in shared if field not in SHARED_FIELDS]:
        raise LoraError(
            f"`{apart[0]}` is no field that all adapters of a mixture share: the LoRA has its own, and new experts get "
            "theirs from `grow`"
        )
    check_names([name], base_model)
    lora = path_or_id if isinstance(path_or_id, LoraFile) else read_lora(path_or_id)
    check_fits(lora, base_model)
    defaults = MoELoraConfig()
    shared = {field: shared.get(field, getattr(defaults, field)) for field in SHARED_FIELDS}
    return _of_one(base_model, name, lora, shared | {"num_experts": max(2, shared["top_k_experts"])}).eval()


def _of_one(base_model: nn.Module, name: str, lora: LoraFile, shared: Mapping[str, Any]) -> PeftModel:
    """A mixture of one expert, whose alpha makes up for `routing_scale`."""
    config = _fitted(expert_config(lora, shared), lora, base_model)
    if (scale := config.routing_scale) != 1:
        config.lora_alpha /= scale
        config.alpha_pattern = {key: alpha / scale for key, alpha in config.alpha_pattern.items()}
    model = get_peft_model(base_model, config, adapter_name=name)
    _fill(model, name, lora)
    return model


def from_lora(
    model: PeftModel, path_or_id: str | Path | LoraFile, name: str, *, router: str = "zero", is_trainable: bool = False
) -> None:
    """Add a plain LoRA to a mixture as one expert, active beside the others.

    Where all tokens are routed to it alone (`model.set_adapter(name)`, a routing weight of 1 by hand, or top-1), it
    makes in evaluation mode what PEFT makes of the LoRA, bit for bit. Rank, alpha, `use_rslora`, patterns and targets
    may differ from the other experts'. Its maturity is 0: with `router_type="learned_with_maturity"` it acts on
    every token at first.

    Args:
        model: a mixture, as `get_peft_model` or `PeftModel.from_pretrained` made it.
        path_or_id: folder or hub id of the LoRA.
        name: of the new adapter.
        router: how it is scored until somebody trains its router: "zero", or "arrow" (router_scope="module" only).
        is_trainable: whether its factors and router are to be trained; they are frozen otherwise.

    Raises:
        LoraError (a ValueError): a part of the LoRA does not carry over, it does not fit the model, the name is taken,
            or `router` cannot be had. The model has not changed then.
    """
    tuner = model.base_model
    if not isinstance(tuner, MoELoraModel) or tuner.routing_or_none is None:
        raise LoraError("`from_lora` adds to a mixture, which this model does not hold; make one with `build`")
    check_names([name], model.get_base_model(), taken=model.peft_config)
    governing: MoELoraConfig = tuner.routing.config
    if router not in ("zero", "arrow"):
        raise LoraError(f"`router` ({router!r}) is not one of zero, arrow")
    if router == "arrow" and (governing.router_scope != "module" or governing.router_kind.is_constant):
        raise LoraError(
            'router="arrow" scores what enters each linear, so it needs learned routers with router_scope="module"; '
            f"this mixture has router_scope={governing.router_scope!r} and router_type={governing.router_type!r}"
        )
    lora = path_or_id if isinstance(path_or_id, LoraFile) else read_lora(path_or_id)
    check_fits(lora, model.get_base_model())
    shared = {field: getattr(governing, field) for field in (*SHARED_FIELDS, "num_experts", "router_hidden_size")}
    if router == "arrow":
        shared["router_hidden_size"] = ARROW_UNITS
    config = _fitted(expert_config(lora, shared), lora, model.get_base_model())
    config.inference_mode = not is_trainable
    model.add_adapter(name, config)
    _fill(model, name, lora)
    if router == "arrow":
        score_by_arrow(model, [name])


def check_names(
    names: Sequence[str] | Mapping[str, Any], model: nn.Module | None = None, taken: Mapping[str, Any] | None = None
) -> None:
    """Raise LoraError for names that adapters cannot have, in this model if one is given."""
    if not names:
        raise LoraError("give at least one expert")
    for name in names:
        if fix := plain_name(name):
            raise LoraError(f"an expert cannot be named {name!r}: the name {fix}")
        try:
            check_adapter_name(
                name, nn.Module() if model is None else model, [other for other in names if other != name]
            )
        except ValueError as error:
            raise LoraError(str(error)) from error
        if name in (taken or {}):
            raise LoraError(f"the model has an adapter {name!r} already; choose another name")


def check_fits(lora: LoraFile, model: nn.Module) -> None:
    """Raise LoraError where the model lacks a linear of the LoRA's, or has it in another shape."""
    if problem := misfit(lora.shapes, model):
        trained_on = lora.config.base_model_name_or_path
        raise LoraError(
            f"{lora.source} was not trained on this model: {problem}"
            + (f". Its base model was {trained_on}" if trained_on else "")
        )
    try:
        check_targets(model, list(lora.factors))
    except ValueError as error:
        raise LoraError(f"{lora.source}: {error}") from error


def check_examples(tokenizer: PreTrainedTokenizerBase, examples: Mapping[str, Sequence[Any]]) -> None:
    """Raise LoraError for an expert whose example texts leave nothing to score it by."""
    for name, texts in examples.items():
        if not any(token_ids(text, tokenizer) for text in texts):
            raise LoraError(f"`examples`: the texts of {name!r} hold no token; give texts of its kind")


def expert_config(lora: LoraFile, shared: Mapping[str, Any]) -> MoELoraConfig:
    """The LoRA's own settings, as one expert of a mixture with the shared ones."""
    own = {name: copy.deepcopy(getattr(lora.config, name)) for name in settable_fields(LoraConfig)}
    return MoELoraConfig(
        **own
        | dict(shared)
        | {"init_lora_weights": True, "eva_config": None, "inference_mode": True, "single_expert": True}
    )


def _fitted(config: MoELoraConfig, lora: LoraFile, model: nn.Module) -> MoELoraConfig:
    """config, with the file's linears by name where its own description of them finds others in this model."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    names = (name for name, _ in model.named_modules() if name and not name.startswith(inside))
    found = {name for name in names if check_target_module_exists(config, name)}
    if found != lora.factors.keys():
        config.target_modules, config.exclude_modules = set(lora.factors), None
        config.layers_to_transform = config.layers_pattern = None
    return config


@torch.no_grad()
def _fill(model: PeftModel, name: str, lora: LoraFile) -> None:
    """Copy the factors into the adapter that was made for them, and set its scores to zero."""
    layers = {
        module.link.name: module
        for module in model.modules()
        if isinstance(module, MoELoraLayer) and name in module.lora_A
    }
    for linear, (lora_A, lora_B) in lora.factors.items():
        layers[linear].lora_A[name].weight.copy_(lora_A)
        layers[linear].lora_B[name].weight.copy_(lora_B)
    for router in model.base_model.routing.routers.values():
        if name in router.lora_router and isinstance(scorer := router[name], Router):
            scorer.weight.zero_()
