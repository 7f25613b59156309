"""What is compared. A method makes a model to train of the frozen base; everything else is alike for all.

The measure is a mixture of E experts of rank r, k of them per token: "equal active rank" is a LoRA of rank k*r, "equal
total parameters" one with as many trainable parameters as the whole mixture, routers included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from peft import LoraConfig, get_peft_model
from torch import nn

from moelora import MoELoraConfig
from moelora.tuner.router import MoELoraRouter

from ..arms import ATTENTION, FEED_FORWARD, shared_copy
from ..peers import SCALING
from . import rivals
from .trainer import Group
from .variants import VARIANTS, Variant, variant_of

LINEARS = ATTENTION + FEED_FORWARD
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
REIMPLEMENTED = "our re-implementation from the formula"


@dataclass(frozen=True)
class Size:
    """E experts of rank r, k of them per token."""

    experts: int = 8
    rank: int = 8
    top_k: int = 2


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        about: for tables.
        build: base model and size to the model to train; the base is left as it is.
        rates: the learning rates that the sweep starts from; it goes on beyond the ends while they are the best.
        groups: parameters by learning rate; None: one for all.
        kind: "joint" (trained on everything), "frozen" (not trained), "oracle" (a model per domain, the right one
            chosen), "xlora" or "arrow" (over the oracle's).
    """

    about: str
    build: Callable[[nn.Module, Size], nn.Module]
    rates: Sequence[float] = RATES
    groups: Callable[[nn.Module], list[Group]] | None = None
    kind: str = "joint"


def num_trainable(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _lora(base: nn.Module, rank: int, **options: bool) -> nn.Module:
    config = LoraConfig(
        r=rank, lora_alpha=SCALING * rank, target_modules=list(LINEARS), task_type="CAUSAL_LM", **options
    )
    return get_peft_model(shared_copy(base), config)


def _active(base: nn.Module, size: Size) -> nn.Module:
    return _lora(base, size.top_k * size.rank)


_RANKS: dict[tuple[str, Size], int] = {}  # found once: making models takes longer than a step


def _equal(base: nn.Module, size: Size, name: str, build: Callable[[nn.Module, int], nn.Module]) -> nn.Module:
    """A rival of the rank with which it has nearest to as many trainable parameters as the mixture: they grow linearly.

    Args:
        name: of the rival.
        build: base model and rank to the rival.
    """
    if (name, size) not in _RANKS:
        one, two = num_trainable(build(base, 1)), num_trainable(build(base, 2))
        target = num_trainable(_mixture(base, size, VARIANTS["ours"]))
        _RANKS[name, size] = max(1, 1 + round((target - one) / (two - one)))
    return build(base, _RANKS[name, size])


def _lora_equal(base: nn.Module, size: Size, **options: bool) -> nn.Module:
    return _equal(base, size, "dora" if options.get("use_dora") else "lora", partial(_lora, **options))


def _soft_mixture(base: nn.Module, size: Size, names: tuple[str, ...], shared_A: bool) -> nn.Module:
    def build(base: nn.Module, rank: int) -> nn.Module:
        attention = tuple(name for name in ATTENTION if name not in names)
        model = shared_copy(base)
        if attention:
            total = size.experts * rank
            model = get_peft_model(model, LoraConfig(r=total, lora_alpha=SCALING * total, target_modules=attention))
        rivals.replace_linears(model, names, size.experts, rank, shared_A)
        return model

    return _equal(base, size, "hydralora" if shared_A else "loramoe", build)


def _mixlora(base: nn.Module, size: Size) -> nn.Module:
    def build(base: nn.Module, rank: int) -> nn.Module:
        total = size.experts * rank
        plain = LoraConfig(r=total, lora_alpha=SCALING * total, target_modules=list(ATTENTION))
        model = get_peft_model(shared_copy(base), plain)
        rivals.replace_feed_forwards(model, size.experts, rank, size.top_k)
        return rivals.Balanced(model, coef=0.01)

    return _equal(base, size, "mixlora", build)


def _mixture(base: nn.Module, size: Size, variant: Variant) -> nn.Module:
    """Ours. Other numbers of experts keep the total rank."""
    options = {"num_experts": size.experts, "top_k_experts": size.top_k, **variant.options}
    options["top_k_experts"] = min(options["top_k_experts"], options["num_experts"])
    rank = max(1, size.experts * size.rank // options["num_experts"])
    config = MoELoraConfig(
        r=rank, lora_alpha=SCALING * rank, target_modules=list(LINEARS), task_type="CAUSAL_LM", **options
    )
    model = get_peft_model(shared_copy(base), config)
    if variant.initialise is not None:
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                variant.initialise(parameter.data.view(options["num_experts"], rank, -1))
    for router in model.modules():
        if isinstance(router, MoELoraRouter):
            router.__class__ = variant.router
    return model


def groups_by_name(model: nn.Module, rates: dict[str, float]) -> list[Group]:
    """Trainable parameters in one group for each factor on the learning rate.

    Args:
        rates: factors by a part of the parameters' names; the others have 1.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = next((value for part, value in rates.items() if part in name), 1.0)
            groups.setdefault(factor, []).append(parameter)
    return [(members, factor) for factor, members in groups.items()]


def _ours(variant: Variant) -> Method:
    groups = partial(groups_by_name, rates=variant.rates) if variant.rates else None
    return Method(f"ours: {variant.about}", partial(_mixture, variant=variant), RATES, groups)


METHODS: dict[str, Method] = {
    "frozen": Method("the frozen base model", lambda base, size: base, (0.0,), kind="frozen"),
    "lora-active": Method("PEFT LoRA of equal active rank k*r", _active),
    "lora": Method("PEFT LoRA of equal total parameters", _lora_equal),
    "rslora": Method(
        "rsLoRA of equal total parameters", partial(_lora_equal, use_rslora=True), (1e-4, 2e-4, 4e-4, 8e-4)
    ),
    "dora": Method("DoRA of equal total parameters", partial(_lora_equal, use_dora=True)),
    "lora-plus": Method(
        "LoRA+ (B at 4 times the rate) of equal total parameters",
        _lora_equal,
        groups=partial(groups_by_name, rates={"lora_B": 4.0}),
    ),
    "oracle": Method(
        "a LoRA of rank r for each domain, the right one chosen, each trained on its share of the steps",
        lambda base, size: _lora(base, size.rank),
        (2e-3, 4e-3, 8e-3, 1.6e-2),
        kind="oracle",
    ),
    "xlora": Method("PEFT X-LoRA over the oracle's, a quarter more steps for its classifier", _active, kind="xlora"),
    "arrow": Method("PEFT Arrow over the oracle's, untrained", _active, (0.0,), kind="arrow"),
    "mixlora": Method(f"MixLoRA, {REIMPLEMENTED}", _mixlora),
    "loramoe": Method(f"LoRAMoE, {REIMPLEMENTED}", partial(_soft_mixture, names=FEED_FORWARD, shared_A=False)),
    "hydralora": Method(f"HydraLoRA, {REIMPLEMENTED}", partial(_soft_mixture, names=LINEARS, shared_A=True)),
    **{name: _ours(variant) for name, variant in VARIANTS.items()},
}
MAIN = (
    *("frozen", "lora-active", "lora", "rslora", "dora", "lora-plus", "oracle", "xlora", "arrow"),
    *("mixlora", "loramoe", "hydralora", "ours", "dense-16+temperature-1", "uniform-8"),
)
# What docs/quality.md compares under Settings, on validation data.
SETTINGS = (
    *("scale-2", "scale-4", "scale-8", "top-1", "top-4", "maturity-10k", "maturity-1m", "sparse", "dropless"),
    *("dense-8", "dense-sum-1", "dense-sum-4", "dense-16", "dense-32", "dense-64"),
    *("dense-8+temperature-4", "dense-8+temperature-1", "dense-16+temperature-1+scope-model"),
    *("dense-8+scope-model", "dense-8+scope-module", "dense-8+router-64", "dense-8+router-raw"),
    *("dense-8+balance-0", "dense-8+balance-01", "dense-8+balance-switch", "dense-8+balance-z"),
    *("dense-8+orthogonal", "dense-8+identical", "dense-8+plus-4", "dense-16+plus-4"),
    *("dense-8+temperature-1+plus-4", "dense-8+router-fast"),
)
GROUPS = {"main": MAIN, "settings": SETTINGS}


def names_of(asked: Iterable[str]) -> list[str]:
    """The names of methods, those of a group's members in place of the group's, each once.

    Example:
        >>> names_of(["ours", "main"])[:3]
        ['ours', 'frozen', 'lora-active']
    """
    return list(dict.fromkeys(name for group in asked for name in GROUPS.get(group, [group])))


def method_of(name: str) -> Method:
    """A method by its name, or variants of ours joined by "+".

    Raises:
        KeyError: there is none of that name.

    Example:
        >>> method_of("dense-8+plus-4").about
        'ours: dense, weights sum to E; LoRA+: B at 4 times the rate of A'
    """
    return METHODS[name] if name in METHODS else _ours(variant_of(name))
