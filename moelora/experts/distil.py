"""The single LoRA that does what a mixture does, as nearly as one LoRA of its rank can on given data.

In every adapted linear a token x gets the delta y(x) = Σ_e w_e(x) s_e B_e A_e x. The LoRA's product W minimises

    Σ_t |y(x_t) - W x_t|² + λ |W - W̄|²,     W̄ = Σ_e w̄_e s_e B_e A_e,     rank W <= N

over the tokens t of the data as they pass through the mixture: reduced-rank regression. W̄, the mean delta, is what W
falls back on in directions that the data does not visit; λ is `ridge` times the mean of the diagonal of Σ x xᵀ. Where
weights are constant W̄ is exact, and so is W once N reaches the experts' ranks together.

Everything but Σ x xᵀ [D, D] stays in the experts' own low rank, and no [O, D] product is formed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn

from ..config import MoELoraConfig
from ..storage.lora_file import Factor, Factors, peft_tensors
from .covariance import InputCovariance, ModelInputs, gather, in_passes, linears_of, readers
from .low_rank import reduced_rank_regression


@dataclass(frozen=True)
class ClosedForm:
    """The LoRA's factors, A [N, D] and B [O, N], by linear, and what they leave out: Σ |y - W x|² as a share of Σ |y|²
    on the data."""

    factors: Factors
    error: dict[str, float]


def closed_form(
    model: PeftModel,
    batches: Callable[[], Iterable[ModelInputs]],
    rank: int,
    ridge: float = 1e-3,
    memory: float = 2**32,
) -> ClosedForm:
    """Fit a LoRA of a rank to a mixture; see the module.

    Args:
        batches: gives the data anew for every pass: input_ids and attention_mask on the model's device.
        ridge: weight of the mean delta, relative to the data.
        memory: bytes that the sums of one pass may take, 8 D² for every distinct input of a linear; more passes are
            made where that does not hold them all.
    """
    groups = readers(model, next(iter(batches())))
    factors, error = {}, {}
    for some in in_passes(model, groups, memory):
        for name, covariance in gather(model, batches(), some).items():
            factors[name] = fit(covariance, rank, ridge)
            error[name] = covariance.error(*factors[name])
    return ClosedForm(factors, error)


def fit(covariance: InputCovariance, rank: int, ridge: float) -> Factor:
    """The best factors for one linear."""
    width = len(covariance.second)
    strength = ridge * max(float(covariance.second.diagonal().mean()), torch.finfo(torch.float64).tiny)
    mean_N1 = (covariance.weight / max(covariance.tokens, 1))[:, None]
    beyond_mean = covariance.cross - mean_N1 * covariance.unweighted
    second = covariance.second + strength * torch.eye(width, dtype=torch.float64, device=beyond_mean.device)
    return reduced_rank_regression(covariance.left, mean_N1 * covariance.lora_A, beyond_mean, second, rank)


# ---- students --------------------------------------------------------------------------------------------------------


def base_of(model: PeftModel) -> nn.Module:
    """The base model without the mixture, beside it: modules of its own, the same weights."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared).unload()


def fresh_lora(model: PeftModel, rank: int, scaling: float) -> PeftModel:
    """A new plain LoRA of a rank on the linears that the mixture adapts, with a base model from [`base_of`]."""
    config = cast(MoELoraConfig, model.peft_config[model.base_model.routing.active_adapters[0]])
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank * scaling,
        target_modules=list(linears_of(model)),
        task_type=config.task_type,
        fan_in_fan_out=config.fan_in_fan_out,
    )
    return get_peft_model(base_of(model), lora)


def lora_of(model: PeftModel, factors: Factors) -> PeftModel:
    """A plain LoRA with these factors, its scaling 1."""
    rank = len(next(iter(factors.values()))[0])
    student = fresh_lora(model, rank, scaling=1.0)
    set_peft_model_state_dict(student, {key: tensor.float() for key, tensor in peft_tensors(factors).items()})
    return student
