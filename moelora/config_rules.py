"""What the values of a configuration may be, whoever wrote it: a user, or a file that came from a stranger."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from .routing import BALANCING_LOSSES, ROUTER_KINDS

LIBRARY = __name__.partition(".")[0]  # which registers the method with PEFT when it is imported
ROUTER_SCOPES = ("block", "model", "module")

# One weight per expert scales that expert's B A x. Each of these adds something that is not of that form, is shared
# between experts, or changes the base weights, so a mixture would ignore it or compute something else.
REFUSED_OPTIONS: dict[str, str] = {
    "use_dora": "DoRA normalises base and delta together, so experts cannot be weighted per token",
    "use_qalora": "QALoRA pools the input before A",
    "velora_config": "VeLoRA replaces the LoRA backward pass",
    "alora_invocation_tokens": "aLoRA switches the adapter on by position, which contradicts a router",
    "monteclora_config": "MonteCLoRA samples A inside the layer",
    "arrow_config": "Arrow is a router of its own",
    "kasa_config": "KaSA changes the base weights",
    "use_bdlora": "BD-LoRA's block-diagonal factors conflict with the rank blocks of the experts",
    "lora_bias": "a bias on B is shared by all experts and would escape the router",
    "ensure_weight_tying": "a tied layer's input has no router",
    "layer_replication": "replicated blocks would share one router's state",
    "megatron_config": "Megatron's parallel layers are not supported",
}


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _is_in(value: Any, names: Collection[str]) -> bool:
    return isinstance(value, str) and value in names  # a list has no hash


def is_float32(value: Any) -> bool:
    """Whether it is a number that float32, in which routing is computed, neither overflows nor takes for zero."""
    return _is_number(value) and (value == 0 or _TINIEST <= abs(value) <= _LARGEST)


def _is_one_of(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple, set)) and all(isinstance(name, str) for name in value)


def _is_integers(value: Any) -> bool:
    return isinstance(value, (list, tuple, range)) and all(map(is_int, value))


def _is_tokens(value: Any) -> bool:
    """Whether a value lists tokens, or does so by the names of embeddings; PEFT's forward fails on an empty list."""
    lists = list(value.values()) if isinstance(value, dict) else [value]
    return all(_is_integers(tokens) and min(tokens, default=-1) >= 0 for tokens in lists)


def _is_patterns(value: Any) -> bool:
    return _is_names(value) and all(map(_is_regex, value))


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _is_pattern(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value maps regular expressions of module names to valid numbers."""
    return lambda value: (
        isinstance(value, dict)
        and all(isinstance(key, str) and _is_regex(key) and valid(number) for key, number in value.items())
    )


def _is_targets(value: Any) -> bool:
    return value is None or _is_names(value) or (isinstance(value, str) and _is_regex(value))


_TINIEST, _LARGEST = 2.0**-126, 3.4028234663852886e38  # normal float32
_REGEX = "module names, or a regular expression of them"


@dataclass(frozen=True)
class Rule:
    name: str
    valid: Callable[[Any], bool]
    fix: str


# PEFT checks none of these, and a configuration file holds whatever somebody wrote.
LORA_RULES = (
    Rule("r", lambda v: is_int(v) and 1 <= v < 2**31, "pass an integer of 1 or more"),
    Rule("lora_alpha", is_float32, "pass a finite number"),
    Rule("rank_pattern", _is_pattern(lambda v: is_int(v) and 1 <= v < 2**31), "pass a mapping of names to ranks"),
    Rule("alpha_pattern", _is_pattern(is_float32), "pass a mapping of names to finite numbers"),
    Rule("target_modules", _is_targets, f"pass {_REGEX}"),
    Rule("exclude_modules", _is_targets, f"pass {_REGEX}"),
    Rule("modules_to_save", lambda v: v is None or _is_patterns(v), "pass a list of names"),
    Rule("layers_pattern", lambda v: _is_targets(v) and (isinstance(v, str | None) or _is_patterns(v)),
         "pass a name or a list of names"),
    Rule("layers_to_transform", lambda v: v is None or is_int(v) or _is_integers(v),
         "pass an integer or a list of integers"),
    Rule("trainable_token_indices", lambda v: v is None or _is_tokens(v),
         "pass None, a list of tokens, or a mapping of embeddings' names to such lists"),
    Rule("use_rslora", _is_one_of(bool), "pass True or False"),
    Rule("fan_in_fan_out", _is_one_of(bool), "pass True or False"),
    Rule("bias", lambda v: v in ("none", "all", "lora_only"), "choose one of none, all, lora_only"),
    Rule("base_model_name_or_path", _is_one_of(str, type(None)), "pass a name or None"),
    Rule("revision", _is_one_of(str, type(None)), "pass a name or None"),
)  # fmt: skip

MIXTURE_RULES = (
    Rule("use_moe_routing", lambda v: isinstance(v, bool), "pass True or False"),
    # PEFT takes a negative one for none, and leaves others to fail where the layers are built.
    Rule("lora_dropout", lambda v: _is_number(v) and 0 <= v < 1, "pass a number in [0, 1)"),
    Rule(
        "router_hidden_size",
        lambda v: v is None or (is_int(v) and 1 <= v < 2**31),
        "pass None or an integer of 1 or more",
    ),
    Rule("router_aux_loss_coef", lambda v: is_float32(v) and v >= 0, "pass a number of 0 or more"),
    Rule("router_temperature", lambda v: is_float32(v) and v > 0, "pass a number greater than 0"),
    Rule("router_type", lambda v: _is_in(v, ROUTER_KINDS), f"choose one of {', '.join(ROUTER_KINDS)}"),
    Rule(
        "expert_capacity_factor",
        lambda v: v is None or (_is_number(v) and 0 < v < float("inf")),
        "pass a number greater than 0, or None for dropless",
    ),
    Rule("expert_dropout", lambda v: _is_number(v) and 0 <= v < 1, "pass a number in [0, 1)"),
    Rule(
        "load_balance_loss_type",
        lambda v: _is_in(v, BALANCING_LOSSES),
        f"choose one of {', '.join(BALANCING_LOSSES)}",
    ),
    Rule("bias_update_speed", lambda v: is_float32(v) and v > 0, "pass a number greater than 0"),
    Rule("router_scope", lambda v: v in ROUTER_SCOPES, f"choose one of {', '.join(ROUTER_SCOPES)}"),
    Rule("maturity_tokens", lambda v: is_int(v) and 1 <= v <= _LARGEST, "pass an integer of 1 or more"),
    Rule("share_native_outer", lambda v: isinstance(v, bool), "pass True or False"),
    Rule("router_memory", lambda v: is_int(v) and v >= 0, "pass an integer of 0 or more"),
    Rule(
        "domain_window",
        lambda v: v is None or (is_int(v) and 1 <= v < 2**31),
        "pass an integer of 1 or more, or None for the whole text so far",
    ),
    Rule("single_expert", lambda v: isinstance(v, bool), "pass True or False"),
    Rule("routing_scale", lambda v: is_float32(v) and v > 0, "pass a number greater than 0"),
    Rule("own_routers", lambda v: v is None or _is_names(v), "leave it to get_peft_model"),
    Rule("requires_import", lambda v: v == LIBRARY, "leave it to save_pretrained"),
    Rule("checkpoint", lambda v: v is None or isinstance(v, dict), "leave it to save_pretrained"),
)


def check_fields(config: Any, rules: Sequence[Rule]) -> None:
    """Refuse a configuration with a field out of range.

    Raises:
        ValueError: naming the first such field, its value and the fix.
    """
    for rule in rules:
        value = getattr(config, rule.name)
        if not rule.valid(value):
            raise ValueError(f"`{rule.name}` ({shown(value)}) is not valid; {rule.fix}")


def shown(value: Any, limit: int = 200) -> str:
    """A value as an error shows it; a file may hold one without end."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep; an integer of thousands of digits
        return f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}..."
