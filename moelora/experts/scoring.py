"""Routers without training: from the experts' own factors, or from a few texts of each expert's kind.

Shapes: D in, O out, r rank, T tokens, H router input width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.tokens import token_ids
from ..report.observe import before
from ..routing import Router, rms_norm
from ..tuner.layer import MoELoraLayer
from ..tuner.model import MoELoraModel

ARROW_UNITS = 2  # hidden units of the router that scores |v . h|
_SHARPNESS = 1024.0  # a power of two, exact in every floating type
EXAMPLE_TOKENS = 8192  # read of each expert's texts: means over tokens settle long before


@torch.no_grad()
def score_by_arrow(model: PeftModel, names: Sequence[str]) -> None:
    """Score experts by how well what enters a linear lies along the direction that they stretch most.

    Arrow (Ostapenko et al., 2024, arXiv:2405.11157): `score_e = |v_e . h|`, v_e being the first right singular vector
    of B_e A_e. Here h is divided by its root mean square, as every router of ours does: which experts are chosen is not
    affected, but the softmax over them is, as if the temperature went with the length of h.

    The absolute value needs no router of its own: with two hidden units `z = c (v . h)` and `-z`, `silu(z) + silu(-z) =
    z tanh(z / 2)`, which is `|z|` but for `|z| < 20`, and grows with `|z|` everywhere; so the chosen experts are
    Arrow's.

    Args:
        model: a mixture with router_scope="module".
        names: adapters of one expert each, with `router_hidden_size` 2.
    """
    for layer in model.modules():
        if not isinstance(layer, MoELoraLayer):
            continue
        for name in names:
            if name in layer.lora_A:
                direction = top_right_singular_vector(layer.lora_A[name].weight, layer.lora_B[name].weight)
                router = cast(Router, layer.moe_router[name])
                assert router.hidden_weight is not None
                router.hidden_weight.copy_(_SHARPNESS * torch.stack([direction, -direction]))
                router.weight.fill_(1 / _SHARPNESS)


def top_right_singular_vector(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """[D] float64: the unit v that maximises |B A v|, for A [r, D] and B [O, r], without B A; zero for a zero expert.

    With A^T = Q R, B A = (B R^T) Q^T, so v = Q u for the top eigenvector u of R B^T B R^T [r, r].
    """
    A, B = lora_A.double(), lora_B.double()
    Q, R = torch.linalg.qr(A.t())
    values, vectors = torch.linalg.eigh(R @ (B.t() @ B) @ R.t())
    return Q @ vectors[:, -1] * (values[-1] > 0)


@torch.no_grad()
def score_by_prototype(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, examples: Mapping[str, Sequence[Any]]
) -> None:
    """Score experts by how much a hidden state looks like those of each expert's example texts.

    m_e is the mean of the normalised hidden states that reach a router while expert e, alone, reads its texts. With
    `u_e = m_e / |m_e|`, `score_e = s (u_e - mean u) . h`: the cosine with each mean, less what all have in common
    (which a softmax does not see), stretched by one factor s so that the scoring vectors have length 1 on average.

    Args:
        model: a mixture with linear routers, all of whose active adapters hold one expert.
        examples: texts, or conversations, by adapter.

    Raises:
        ValueError: an adapter has no examples, or they hold no token.
    """
    tuner = cast(MoELoraModel, model.base_model)
    mixture = list(tuner.active_adapters)
    if missing := [name for name in mixture if not examples.get(name)]:
        raise ValueError(f"no example texts for {', '.join(map(repr, missing))}; every active expert needs some")
    means = {name: _mean_inputs(model, name, tokenizer, examples[name]) for name in mixture}
    with tuner.keep_trainability():
        model.set_adapter(mixture)
    for router_name, router in tuner.routing.routers.items():
        here = [name for name in mixture if name in router.lora_router]
        if not here:
            continue
        units_EH = torch.stack([_unit(means[name][router_name]) for name in here])
        apart_EH = units_EH - units_EH.mean(dim=0)
        stretched_EH = apart_EH / apart_EH.norm(dim=-1).mean().clamp(min=1e-12)
        for name, row in zip(here, stretched_EH, strict=True):
            cast(Router, router[name]).weight.copy_(row[None])


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm().clamp(min=1e-12)


def _mean_inputs(
    model: PeftModel, name: str, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Any]
) -> dict[str, Tensor]:
    """[H] float64 for each router: the mean of its normalised inputs, expert `name` alone reading the texts."""
    tuner = cast(MoELoraModel, model.base_model)
    with tuner.keep_trainability():
        model.set_adapter(name)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    room, was_training = EXAMPLE_TOKENS, model.training
    model.eval()
    with _summing(tuner.routing.routers) as sums:
        for document in texts:
            ids = token_ids(document, tokenizer)[: min(room, longest)]
            if ids:
                model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
            room -= len(ids)
            if room <= 0:
                break
    model.train(was_training)
    if room == EXAMPLE_TOKENS:
        raise ValueError(f"the example texts of {name!r} hold no token")
    return {router: total / count for router, (total, count) in sums.items()}


@contextmanager
def _summing(routers: Mapping[str, Any]) -> Iterator[dict[str, tuple[Tensor, int]]]:
    """Within, the sum of each router's normalised inputs and their number."""
    sums: dict[str, tuple[Tensor, int]] = {}

    def add(router: Any, arguments: tuple[Any, ...]) -> None:
        hidden_TH = rms_norm(arguments[0]).flatten(0, -2).double()
        total, count = sums.get(router.name, (torch.zeros_like(hidden_TH[0]), 0))
        sums[router.name] = total + hidden_TH.sum(dim=0), count + len(hidden_TH)

    with before((router, add) for router in routers.values()):
        yield sums
