"""`moelora.analyze`: what the experts of a mixture do with texts, as data frames and figures.

Shapes: D domains, R routers, E experts, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from ..console import progress_bar
from ..data.texts import Domain, cut, read_domain
from ..tuner.layer import MoELoraLayer
from ..tuner.router import MoELoraRouter
from . import figures, frames
from .advice import suggest
from .geometry import Geometry, geometry, group_modules, sharpness
from .history import History, history_of
from .measure import measure_worth, watch
from .measurements import Measurements
from .observe import is_learned, maturity_of, routers_of, undisturbed
from .specialisation import specialisation

LONGEST_BLOCK = 512


class Analysis(Measurements):
    """What a mixture does with texts ([`Measurements`]), made by [`analyze`]. Tables need pandas, plots matplotlib."""

    loads = frames.loads
    router_table = frames.router_table
    expert_table = frames.expert_table
    similarity = frames.similarity
    token_table = frames.token_table
    training_table = frames.training_table
    plot_loads = figures.loads
    plot_specialisation = figures.specialisation
    plot_similarity = figures.similarity
    plot_worth = figures.worth
    plot_training = figures.training


def analyze(
    model: PeftModel,
    texts: Sequence[Any] | Mapping[str, Sequence[Any]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    block_size: int | None = None,
    max_tokens: int | None = None,
    worth_tokens: int = 4096,
    permutations: int = 500,
    log_history: Sequence[Mapping[str, Any]] = (),
) -> Analysis:
    """Measure what the experts of a mixture do with texts.

    Args:
        model: a causal language model with a mixture; it is left as it was, mode and statistics included.
        texts: documents, or documents by domain: texts, or conversations (lists of {role, content}).
        tokenizer: the model's; by default the one that lies with its base model.
        block_size: most tokens the model reads at once; by default 512, or fewer where the model has fewer positions.
        max_tokens: most tokens per domain; all by default.
        worth_tokens: tokens per domain on which the loss without each expert is measured, at one forward per expert;
            0 leaves it out.
        permutations: of documents among domains, for the chance level of specialisation.
        log_history: `trainer.state.log_history` of a run with [`moelora.MoELoraCallback`].

    Raises:
        ValueError: the model holds no mixture or is no causal language model, or there is no text.
    """
    _check_model(model)
    kept = _documents(texts)
    tokenizer = tokenizer or _tokenizer_of(model)
    domains = [read_domain(name, documents, tokenizer, max_tokens) for name, documents in kept.items()]
    size = block_size or longest_block(model.config)
    return run(model, domains, tokenizer, size, worth_tokens, permutations, history_of(log_history))


def _check_model(model: Any) -> None:
    if getattr(model, "routing_or_none", None) is None:
        kind = type(model).__name__
        raise ValueError(f"`model` ({kind}) holds no mixture; give a PeftModel made with a MoELoraConfig")
    base = model.get_base_model()
    is_causal = hasattr(base, "can_generate") and base.can_generate() and not base.config.is_encoder_decoder
    if not is_causal:
        raise ValueError(f"`model` ({type(base).__name__}) is no causal language model, so its tokens have no loss")


def _documents(texts: Sequence[Any] | Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    by_domain = dict(texts) if isinstance(texts, Mapping) else {"texts": texts}
    if any(isinstance(documents, str) for documents in by_domain.values()):
        raise ValueError("`texts` must be a list of texts, or such a list for each domain; put the text in a list")
    kept = {
        name: [document for document in documents if not isinstance(document, str) or document.strip()]
        for name, documents in by_domain.items()
    }
    empty = [name for name, documents in kept.items() if not documents]
    if empty or not kept:
        raise ValueError(f"`texts` holds no text{' for ' if empty else ''}{', '.join(empty)}; give a document or more")
    return kept


def _tokenizer_of(model: PeftModel) -> PreTrainedTokenizerBase:
    name = model.get_base_model().config.name_or_path
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"`tokenizer` is missing, and none lies with the base model {name!r}; pass it") from error


def longest_block(config: PretrainedConfig) -> int:
    """The longest block that suits a model of which nothing else is known."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(LONGEST_BLOCK, positions or LONGEST_BLOCK)


def run(
    model: PeftModel,
    domains: Sequence[Domain],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    worth_tokens: int,
    permutations: int,
    history: History | None,
) -> Analysis:
    """[`analyze`] for texts that are tokens already.

    Raises:
        ValueError: a domain has no token.
    """
    if silent := [domain.name for domain in domains if not domain.num_tokens]:
        raise ValueError(f"the texts of {', '.join(silent)} hold no token; give others")
    state = model.base_model.routing
    blocks, by_document = cut(domains, block_size)
    pad = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    with undisturbed(model), progress_bar() as progress:
        routed = watch(model, domains, blocks, pad, progress)
        worth = None
        if worth_tokens > 0 and state.num_experts > 1:
            worth = measure_worth(model, domains, blocks, routed, worth_tokens, pad, progress)
    special = None
    if len(domains) > 1:
        special = specialisation(routed.weight, routed.domain_of_unit, len(domains), permutations)
    names, weight = [domain.name for domain in domains], routed.by_domain(routed.weight)
    routers = {name: routers_of(state)[name] for name in routed.routers}
    values, errors = (worth.worth, worth.error) if worth else (None, None)
    whole, by_router = geometry_of(model)
    return Analysis(
        domains=names,
        routers=list(routers),
        experts=[name for name, count in state.pool for _ in range(count)],
        top_k=min(state.config.top_k_experts, state.num_experts),
        num_tokens=[domain.num_tokens for domain in domains],
        num_documents=[len(domain.documents) for domain in domains],
        left_out=[domain.left_out for domain in domains],
        is_held_out=[domain.is_held_out for domain in domains],
        weight=weight,
        load=routed.by_domain(routed.assigned),
        entropy=routed.entropy,
        top1_probability=routed.top1_probability,
        specialisation=special,
        unit_is_document=by_document,
        loss=routed.loss_by_domain(blocks),
        worth=values,
        worth_error=errors,
        worth_tokens=worth.tokens if worth else [0] * len(domains),
        maturity=np.array([maturity_of(router, state) for router in routers.values()]),
        sharpness=[_sharpness(router, state.config.router_temperature) for router in routers.values()],
        whole=whole,
        by_router={name: by_router[name] for name in routers},
        history=history,
        suggestions=suggest(weight.mean(1), whole.similarity.numpy(), values, errors, names),
        tokens=routed.views,
    )


def _sharpness(router: Any, temperature: float) -> float:
    return sharpness(router.active_routers(), temperature) if is_learned(router) else float("nan")


def geometry_of(model: PeftModel) -> tuple[Geometry, dict[str, Geometry]]:
    """Of all linears, and of each built-in router's; an attached router steers them all."""
    state = model.base_model.routing
    base = model.get_base_model()
    modules = {
        name: {adapter: module.expert_pool(adapter) for adapter in state.active_adapters if adapter in module.lora_A}
        for name, module in base.named_modules()
        if isinstance(module, MoELoraLayer)
    }
    whole = geometry(modules, state.pool)
    routers = routers_of(state)
    if not all(isinstance(router, MoELoraRouter) for router in routers.values()):
        return whole, dict.fromkeys(routers, whole)
    groups = group_modules(modules, [name for name, router in state.routers.items() if router.pool])
    return whole, {name or "model": geometry(group, state.pool) for name, group in groups.items()}
