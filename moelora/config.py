"""MoELoraConfig: PEFT's LoraConfig plus the fields of a mixture of experts."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig

from .config_rules import LIBRARY, LORA_RULES, MIXTURE_RULES, REFUSED_OPTIONS, check_fields, is_int, shown
from .files.adapter_files import parse_config
from .files.atomic_save import part, read_at_once
from .peft_type import MOELORA
from .presets import PRESETS
from .routing import BALANCING_LOSSES, ROUTER_KINDS, BalancingLoss, RouterKind

# What the first active adapter decides for the whole mixture; adapters that disagree cannot be active together.
SHARED_FIELDS = (
    "top_k_experts",
    "router_aux_loss_coef",
    "router_temperature",
    "router_type",
    "expert_capacity_factor",
    "expert_dropout",
    "load_balance_loss_type",
    "router_scope",
    "maturity_tokens",
    "routing_scale",
    "bias_update_speed",
    "domain_window",
)

# What a mixture and the one that is swapped in for it must have in common, besides their targets, which PEFT compares.
SWAPPED_ALIKE = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "lora_dropout",
    "use_moe_routing",
    "num_experts",
    "single_expert",
    "router_hidden_size",
    "router_memory",
    "adapters",
    *SHARED_FIELDS,
)


_NOT_PEFTS = "an option of LoraConfig is not what PEFT takes"


def _listed(choices: Iterable[RouterKind | BalancingLoss]) -> str:
    return "; ".join(f"'{choice.name}': {choice.help}" for choice in choices)


class NotedNames(list[str]):
    """Names that were noted when an adapter was made: of its model, so that for another adapter they are found anew."""


@dataclass
class MoELoraConfig(LoraConfig):
    """Configuration of a mixture of LoRA experts.

    Every option of [`~peft.LoraConfig`] that makes sense per expert keeps its meaning: `r`, `lora_alpha` and
    `rank_pattern` describe *one* expert. A layer adds ``sum_e w_e * routing_scale * scaling * B_e A_e x`` to its
    frozen output, where ``w`` are the routing weights of the token (docs/maths.md).

    Raises:
        ValueError: a field is out of range, or a LoraConfig option cannot be honoured by a mixture. The message names
            the field, the value and the fix.
        TypeError: a LoraConfig option is of another type than PEFT takes.

    Example:
        >>> config = MoELoraConfig(r=8, lora_alpha=16, target_modules="all-linear", num_experts=8)
        >>> config.num_experts, config.top_k_experts, config.router_scope
        (8, 2, 'block')
    """

    use_moe_routing: bool = field(
        default=True, metadata={"help": "Route tokens to experts. False: exactly plain LoRA, without a router."}
    )
    num_experts: int = field(default=4, metadata={"help": "Number of experts in the mixture (2 or more)."})
    top_k_experts: int = field(
        default=2, metadata={"help": "Experts per token once sparse (1 to num_experts; num_experts is dense)."}
    )
    router_hidden_size: int | None = field(
        default=None, metadata={"help": "Hidden units of a two-layer router; None: a linear router."}
    )
    router_aux_loss_coef: float = field(
        default=0.01, metadata={"help": "Weight of the balancing loss in the training loss (0 switches it off)."}
    )
    router_temperature: float = field(
        default=2.0, metadata={"help": "Routing probabilities are softmax(logits / temperature)."}
    )
    router_type: str = field(
        default="learned_with_maturity",
        metadata={"help": f"{_listed(ROUTER_KINDS.values())}."},
    )
    expert_capacity_factor: float | None = field(
        default=1.25,
        metadata={
            "help": "In sparse training an expert takes at most ceil(factor * tokens * k / experts) assignments; "
            "None: dropless."
        },
    )
    expert_dropout: float = field(
        default=0.0, metadata={"help": "Chance in [0, 1) that one token-expert contribution is dropped in training."}
    )
    load_balance_loss_type: str = field(
        default="aux_loss",
        metadata={"help": f"{_listed(BALANCING_LOSSES.values())}."},
    )
    bias_update_speed: float = field(
        default=0.001,
        metadata={"help": "How far 'loss_free' moves the biases of experts after each optimizer step."},
    )
    router_scope: str = field(
        default="block",
        metadata={
            "help": "'block': each transformer block's router reads the hidden states entering it and steers every "
            "adapted linear in it. 'model': one router on the input embeddings. 'module': one per adapted linear. "
            "Linears outside every block, or that read other tokens than their block, always have their own."
        },
    )
    maturity_tokens: int = field(
        default=100_000,
        metadata={"help": "Routing mass (tokens times weight) after which a new expert counts as mature."},
    )
    routing_scale: float = field(
        default=1.0,
        metadata={"help": "Factor on the routers' weights, which sum to 1 for each token; num_experts in all presets."},
    )
    share_native_outer: bool = field(
        default=False,
        metadata={
            "help": "Low-rank pairs of a base's native experts (`target_parameters`): all experts of a block share the "
            "factor on the hidden side."
        },
    )
    single_expert: bool = field(
        default=False,
        metadata={
            "help": "This adapter is one expert whatever its name says: a plain LoRA that was imported. `num_experts` "
            "then counts for nothing."
        },
    )
    router_memory: int = field(
        default=0,
        metadata={
            "help": "Written by moelora.experts.learn_domain: directions kept of its domain by each router (0: none)."
        },
    )
    domain_window: int | None = field(
        default=64,
        metadata={
            "help": "Tokens of context, up to and including each one, by which the domain classifier decides; None: "
            "the whole text so far."
        },
    )
    own_routers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Written when the adapter is made: linears with a router of their own beside those of "
            "`router_scope`, as they lie outside every block or read other tokens than their block's."
        },
    )
    requires_import: str = field(
        default=LIBRARY,
        metadata={"help": "Written by save_pretrained: what a process has to import before PEFT can load the adapter."},
    )
    adapters: list[dict[str, Any]] | None = field(
        default=None,
        metadata={"help": "Written by save_pretrained: name, activity and configuration of each adapter in the file."},
    )
    checkpoint: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Written by save_pretrained: id of the save, checksums of its files, its attached router."},
    )

    # Where `from_pretrained` read it, and the id of that save: by the time its weights are read there may be another.
    # A class variable for the dataclass, so that it is no field.
    read_from: ClassVar[tuple[str, str | None] | None] = None

    def __post_init__(self) -> None:
        check_fields(self, LORA_RULES)
        try:
            super().__post_init__()
        except TypeError as error:
            # An argument that an option's own class does not expect: PEFT would look for it among ours for ever.
            kind = ValueError if "unexpected keyword argument" in str(error) else TypeError
            raise kind(f"{_NOT_PEFTS}: {error}") from error
        except (AttributeError, KeyError) as error:  # options of options, which PEFT takes as they are
            raise ValueError(f"{_NOT_PEFTS}: {error}") from error
        self.peft_type = MOELORA
        if self.adapters:
            check_entries(self.adapters)
        check_fields(self, MIXTURE_RULES)
        if self.use_moe_routing:
            self._check_experts()
            self._check_lora_options()
        else:
            self._warn_unused_mixture_fields()

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """See PEFT; files from before linears could have routers of their own do not mention any.

        Raises:
            ValueError: a field is out of range, or of a type that PEFT cannot take.
        """
        try:
            return super().from_peft_type(**({"own_routers": []} | kwargs))
        except TypeError as error:
            raise ValueError(str(error)) from error

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """See PEFT.

        Raises:
            ValueError: a field is out of range, or of a type that PEFT cannot take.
        """
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        except TypeError as error:
            raise ValueError(f"the configuration in {str(pretrained_model_name_or_path)!r}: {error}") from error
        if isinstance(config, MoELoraConfig):
            config.__dict__["read_from"] = str(pretrained_model_name_or_path), (config.checkpoint or {}).get("id")
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """See PEFT; the file is that of the save in force, and refused where it is no configuration."""
        path = Path(path_json_file)
        settings = read_at_once(path.parent, [path.name], lambda: parse_config(part(path.parent, path.name)))
        settings.pop("runtime_config", None)
        return settings

    @property
    def router_kind(self) -> RouterKind:
        """What `router_type` stands for."""
        return ROUTER_KINDS[self.router_type]

    @property
    def balancing(self) -> BalancingLoss:
        """What `load_balance_loss_type` stands for."""
        return BALANCING_LOSSES[self.load_balance_loss_type]

    @property
    def balancing_coef(self) -> float:
        """What the balancing loss is multiplied by in the training loss."""
        return self.router_aux_loss_coef if self.balancing.is_optimised else 0.0

    @classmethod
    def preset(cls, name: str, **options: Any) -> MoELoraConfig:
        """Settings that were measured for a purpose, with others added or put in their place.

        Args:
            name: "multi-domain": several domains or tasks at once. "mergeable": the same without a router, as one LoRA
                (docs/quality.md). "continual": one domain after another, each with experts of its own
                (docs/experts-grow.md).
            options: fields of this class. `lora_alpha` does not follow `r`, nor `top_k_experts` and `routing_scale`
                `num_experts`: set those too.

        Raises:
            ValueError: there is no such preset, or a field is out of range.

        Example:
            >>> config = MoELoraConfig.preset("multi-domain", target_modules="all-linear")
            >>> config.num_experts, config.r, config.routing_scale
            (16, 4, 16.0)
        """
        if name not in tuple(PRESETS):  # a list has no hash
            raise ValueError(f"`preset` ({name!r}) is not known; choose one of {', '.join(PRESETS)}")
        try:
            return cls(**PRESETS[name] | options)
        except ValueError as error:
            kept = ", ".join(f"{field}={value}" for field, value in PRESETS[name].items() if field not in options)
            raise ValueError(f"{error}. The preset {name!r} sets {kept}") from error

    def _check_experts(self) -> None:
        if not is_int(self.num_experts) or not 2 <= self.num_experts < 2**31:
            raise ValueError(
                f"`num_experts` ({shown(self.num_experts)}) is not valid; pass an integer of 2 or more, or "
                "`use_moe_routing=False` for plain LoRA"
            )
        if not is_int(self.top_k_experts) or self.top_k_experts < 1:
            raise ValueError(
                f"`top_k_experts` ({shown(self.top_k_experts)}) is not valid; pass an integer of 1 or more"
            )
        if self.top_k_experts > self.num_experts:
            raise ValueError(
                f"`top_k_experts` ({self.top_k_experts}) exceeds `num_experts` ({self.num_experts}); lower "
                "`top_k_experts` or raise `num_experts`"
            )

    def _check_lora_options(self) -> None:
        for name, reason in REFUSED_OPTIONS.items():
            value = getattr(self, name)
            if value:
                raise ValueError(f"`{name}` ({shown(value)}) cannot be honoured by a mixture: {reason}; leave it unset")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"`init_lora_weights` ({shown(self.init_lora_weights)}) cannot be honoured by a mixture: it derives "
                "the factors from the base weights for one adapter, not for experts that are weighted per token; use "
                "True, False or 'gaussian'"
            )

    def _warn_unused_mixture_fields(self) -> None:
        unused = [
            f.name
            for f in dataclasses.fields(MoELoraConfig)
            if f.name in MIXTURE_FIELDS and f.name != "use_moe_routing" and getattr(self, f.name) not in (f.default, [])
        ]
        if unused:
            names = ", ".join(f"`{name}`" for name in unused)
            warnings.warn(f"`use_moe_routing=False` is plain LoRA and ignores {names}", stacklevel=3)


MIXTURE_FIELDS = frozenset(f.name for f in dataclasses.fields(MoELoraConfig)) - frozenset(
    f.name for f in dataclasses.fields(LoraConfig)
)


def check_entries(adapters: Any) -> None:
    """Refuse a list of `adapters` that does not say what a saved mixture holds.

    Raises:
        ValueError: naming the first entry that is not in order.
    """
    kinds = {"name": str, "active": int | None, "config": dict}
    taken: list[Any] = []
    for number, entry in enumerate(adapters if isinstance(adapters, list) else [adapters]):
        given = entry if isinstance(entry, dict) else {}
        wrong = [key for key, kind in kinds.items() if key not in given or not isinstance(given[key], kind)]
        if not wrong:
            own, place = given["config"], given["active"]
            is_ours = own.get("peft_type", "MOELORA") == "MOELORA" and not own.get("adapters")
            is_taken = given["name"] in taken or (place is not None and place in taken)
            wrong = [] if is_ours else ["config"]
            wrong += ["name"] if is_taken or isinstance(place, bool) else []
            taken += [given["name"], *([] if place is None else [place])]
        if wrong:
            raise ValueError(
                f"entry {number} of `adapters` ({shown(entry)}) has no usable `{wrong[0]}`; restore "
                "adapter_config.json from a copy or save the mixture again"
            )
    if not any(entry["active"] is not None for entry in adapters):
        raise ValueError("`adapters` lists no active adapter; restore adapter_config.json from a copy")


def count_experts(adapter_name: str, config: MoELoraConfig) -> int:
    """Number of experts an adapter holds: one when it is named ``expert_<i>`` or a `single_expert`, else `num_experts`.

    Example:
        >>> config = MoELoraConfig(num_experts=4)
        >>> count_experts("expert_3", config), count_experts("default", config)
        (1, 4)
    """
    return 1 if config.single_expert or re.fullmatch(r"expert_\d+", adapter_name) else config.num_experts


def storage_config(config: MoELoraConfig, num_experts: int) -> MoELoraConfig:
    """The LoRA of rank E*r that stores E experts of rank r side by side, with the scaling of one expert.

    PEFT divides alpha by the rank (by its square root with `use_rslora`), so alpha grows with it.
    """
    alpha_factor = num_experts**0.5 if config.use_rslora else num_experts
    stored = copy.copy(config)
    stored.r = config.r * num_experts
    stored.lora_alpha = config.lora_alpha * alpha_factor
    stored.rank_pattern = {key: rank * num_experts for key, rank in config.rank_pattern.items()}
    stored.alpha_pattern = {key: alpha * alpha_factor for key, alpha in config.alpha_pattern.items()}
    return stored
