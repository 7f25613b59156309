"""A plain PEFT LoRA as it lies on disk or on the hub, and whether all of it can become an expert.

Shapes: D in, O out, r rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils import CONFIG_NAME
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..config_rules import LORA_RULES, REFUSED_OPTIONS, check_fields
from ..files import adapter_files
from ..files.adapter_files import Place, wrong_kind
from ..files.opening import expand_user
from ..schema import UserError, settable_fields
from .patterns import check_patterns_end
from .structure import FACTOR

Factor = tuple[Tensor, Tensor]  # A [r, D], B [O, r]
Factors = dict[str, Factor]  # by linear

# Ways to start that leave the base weights alone. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change them, and the
# factors mean nothing on the base model as it was.
_NEUTRAL_STARTS = (True, False, "gaussian", "eva", "orthogonal")

_NOT_LORA = {
    "MOELORA": "it is a mixture already; load it with PeftModel.from_pretrained",
    "XLORA": "it is an X-LoRA mixture; `moelora build --migrate` takes its experts",
    "MIXLORA": "it is a MixLoRA mixture; `moelora build --migrate` takes its experts",
}


class LoraError(UserError, ValueError):
    """A checkpoint that cannot become an expert; the message says what of it does not carry over."""


@dataclass(frozen=True)
class LoraFile:
    """One plain LoRA.

    Attributes:
        source: where it came from, for messages.
        factors: A [r, D] and B [O, r] by linear, without PEFT's prefix.
    """

    source: str
    config: LoraConfig
    factors: Factors

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) by linear."""
        return {name: (B.shape[0], A.shape[1]) for name, (A, B) in self.factors.items()}

    @property
    def ranks(self) -> list[int]:
        """The ranks that occur, in order."""
        return sorted({A.shape[0] for A, _ in self.factors.values()})


def read_lora(path_or_id: str | Path) -> LoraFile:
    """Read a plain LoRA from a folder or the hub.

    Raises:
        LoraError: there is none, it is damaged, or a part of it does not carry over into a mixture.
    """
    folder = expand_user(path_or_id)
    source = str(folder if folder.is_dir() else path_or_id)
    settings = read_config(source)
    kind = settings.get("peft_type")
    if kind == "MOELORA" and not is_mixture(settings):
        own = {*settable_fields(LoraConfig), "peft_type"}
        kind, settings = "LORA", {key: value for key, value in settings.items() if key in own} | {"peft_type": "LORA"}
    if kind != "LORA":
        hint = _NOT_LORA.get(str(kind), "only LoRA has factors that can be weighted as an expert")
        raise LoraError(f"{source}: `peft_type` is {kind!r}, not 'LORA': {hint}")
    try:
        config = LoraConfig.from_peft_type(**settings)
        check_fields(config, LORA_RULES)
    except (ValueError, TypeError) as error:
        raise LoraError(f"{source}: {CONFIG_NAME}: {error}") from error
    check_carries_over(source, config)
    factors = factors_of(source, read_tensors(source))
    try:
        check_patterns_end(config, factors)
    except ValueError as error:
        raise LoraError(f"{source}: {CONFIG_NAME}: {error}") from error
    _check_ranks(source, config, factors)
    return LoraFile(source, config, factors)


def is_mixture(settings: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is that of a mixture; with `use_moe_routing: false` it is plain LoRA under our
    name."""
    return settings.get("peft_type") == "MOELORA" and settings.get("use_moe_routing") is not False


def read_config(source: str) -> dict[str, Any]:
    """adapter_config.json of a folder or a hub id, whatever kind of adapter it describes.

    Raises:
        LoraError: there is none, or it is not readable.
    """
    try:
        return adapter_files.read_config(Place(source))
    except (OSError, ValueError) as error:
        raise LoraError(f"{source}: no readable {CONFIG_NAME}: {error}") from error


def read_tensors(source: str) -> dict[str, Tensor]:
    """The tensors of an adapter in a folder or on the hub, by their names in its file.

    Raises:
        LoraError: there are none, or they are damaged.
    """
    try:
        files = adapter_files.read_adapter(source)
        files.refuse_damage()
    except (OSError, ValueError) as error:
        raise LoraError(f"{source}: {error}") from error
    return files.weights


def check_carries_over(source: str, config: LoraConfig) -> None:
    """Refuse what a token's weight could not scale, or what lies outside the factors.

    Raises:
        LoraError: naming each such option.
    """
    lost = [
        f"`{name}` ({getattr(config, name)!r}): {reason}"
        for name, reason in REFUSED_OPTIONS.items()
        if getattr(config, name, None)
    ]
    if config.target_parameters:
        lost.append(
            f"`target_parameters` ({sorted(config.target_parameters)!r}): pairs of the base's own experts, which its "
            "own router weighs; where a LoRA holds nothing else, `moelora.experts.native_from_lora` loads it"
        )
    if config.modules_to_save:
        lost.append(
            f"`modules_to_save` ({sorted(config.modules_to_save)!r}): whole trained copies of modules, which would "
            "act on every token whatever the router says"
        )
    if config.bias != "none":
        lost.append(f"`bias` ({config.bias!r}): trained biases of the base model act on every token")
    if config.trainable_token_indices:
        lost.append("`trainable_token_indices`: trained embeddings act on every token")
    if config.init_lora_weights not in _NEUTRAL_STARTS:
        lost.append(
            f"`init_lora_weights` ({config.init_lora_weights!r}): it changed the base weights; save the LoRA again "
            "with PEFT's `path_initial_model_for_weight_conversion`"
        )
    if lost:
        raise LoraError(f"{source} cannot become an expert, for this does not carry over: {'; '.join(lost)}")


def factors_of(source: str, tensors: Mapping[str, Tensor]) -> Factors:
    """Pair up the factors of an adapter's tensors.

    Raises:
        LoraError: a tensor is no factor of a linear, a factor lacks its other half, or the halves do not fit.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        if match := FACTOR.fullmatch(key):
            pairs.setdefault(match["module"], {})[match["factor"]] = tensor
        else:
            strange.append(key)
    if strange:
        raise LoraError(
            f"{source} cannot become an expert: {_some(strange)} {'is' if len(strange) == 1 else 'are'} no factor of a "
            "linear layer, so no routing weight could scale it"
        )
    broken = [name for name, pair in pairs.items() if len(pair) != 2 or _is_broken(pair["A"], pair["B"])]
    if broken or not pairs:
        what = f"the factors of {_some(broken)} are incomplete or no matrices" if broken else "it holds no factors"
        raise LoraError(f"{source}: {what}; only linear layers can be experts, and both factors are needed")
    return {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}


def peft_tensors(factors: Factors) -> dict[str, Tensor]:
    """Factors by the names that PEFT gives them, for a file or a model of one adapter."""
    return {
        f"base_model.model.{name}.lora_{side}.weight": factor.contiguous()
        for name, pair in factors.items()
        for side, factor in zip("AB", pair, strict=True)
    }


def _is_broken(lora_A: Tensor, lora_B: Tensor) -> bool:
    if any(factor.dim() != 2 or factor.numel() == 0 or wrong_kind("", factor) for factor in (lora_A, lora_B)):
        return True
    return lora_A.shape[0] != lora_B.shape[1]


def _check_ranks(source: str, config: LoraConfig, factors: Factors) -> None:
    for name, (lora_A, _) in factors.items():
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
        if lora_A.shape[0] != rank:
            raise LoraError(
                f"{source}: `{name}` has rank {lora_A.shape[0]} in the weights and {rank} by the configuration; "
                "restore both from one copy"
            )


def _some(names: Iterable[str], shown: int = 3) -> str:
    listed = [f"`{name}`" for name in names]
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more
