"""`adapter: moelora` in axolotl: ``plugins: [moelora.integrations.axolotl.MoELoraPlugin]`` (docs/tools.md).

Written for the release in `VERSIONS`; tests/tools/test_axolotl.py compares what is used of it with what is there.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel
from transformers import TrainerCallback

from ..config import MoELoraConfig
from ..schema import Problem, RecipeError
from ..training.callback import MoELoraCallback
from .options import SECTION, LoraOption, mixture_config, refused_options

VERSIONS = "0.19"
"""The release of axolotl whose names these are."""

ADAPTER = "moelora"

LORA_OPTIONS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_fan_in_fan_out": "fan_in_fan_out",
    "lora_modules_to_save": "modules_to_save",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_layers_pattern": "layers_pattern",
    "peft_use_rslora": "use_rslora",
    "peft_use_dora": "use_dora",
    "peft_init_lora_weights": "init_lora_weights",
    "peft_layer_replication": "layer_replication",
    "peft_trainable_token_indices": "trainable_token_indices",
    "peft_ensure_weight_tying": "ensure_weight_tying",
}
"""axolotl's options, and the fields that they mean."""

_KERNEL = "drop it: axolotl's kernels compute a plain LoRA from the factors, and would pass the routers over"
_QUANTISED = (
    "drop it: axolotl quantises for `adapter: lora` and `qlora` alone, and would load the model whole; name a "
    "`base_model` that was saved quantised"
)
_FSDP = "drop it: axolotl saves such an adapter without what its routers have counted; use DDP or DeepSpeed"
REFUSED = {
    "lora_mlp_kernel": _KERNEL,
    "lora_qkv_kernel": _KERNEL,
    "lora_o_kernel": _KERNEL,
    "lora_embedding_kernel": _KERNEL,
    "load_in_4bit": _QUANTISED,
    "load_in_8bit": _QUANTISED,
    "fsdp": _FSDP,
    "fsdp_config": _FSDP,
    "lora_exclude_modules": "set `moelora.exclude_modules`: axolotl forgets this option when it reads its YAML",
    "peft": "drop it: LoftQ derives the factors from the base weights for one adapter",
}
"""What axolotl would do for a LoRA and not, or wrongly, for a mixture."""


class MoELoraArgs(BaseModel):
    """What the plug-in adds to axolotl's YAML."""

    moelora: dict[str, Any] | None = None


class MoELoraPlugin(BasePlugin):
    """Trains a mixture of LoRA experts where axolotl would train a LoRA."""

    def get_input_args(self) -> str:
        """See BasePlugin."""
        return f"{__name__}.{MoELoraArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """See BasePlugin; neither axolotl's own loading nor ReLoRA knows experts."""
        return [AdapterCapabilities(name=ADAPTER)]

    def register(self, cfg: Any) -> None:
        """Check the options before axolotl looks at its own.

        Raises:
            RecipeError: listing every problem with its key, value and fix.
        """
        if cfg.get("adapter") != ADAPTER:
            if cfg.get(SECTION) is not None:
                fix = f"needs `adapter: {ADAPTER}`, which is {cfg.get('adapter')!r} here"
                raise RecipeError("axolotl", [Problem(SECTION, cfg[SECTION], fix)])
            return
        problems = refused_options(cfg, REFUSED)
        if cfg.get("merge_lora") and cfg.get("merge_method") != "legacy":
            fix = "must be legacy: axolotl's other way adds the factors of all experts to the base weights, unweighted"
            problems.append(Problem("merge_method", cfg.get("merge_method"), fix))
        if cfg.get("lora_target_linear") and cfg.get("lora_target_modules"):
            fix = "drop it: `lora_target_modules` names what is adapted"
            problems.append(Problem("lora_target_linear", True, fix))
        try:
            _config(cfg)
        except RecipeError as error:
            problems += error.problems
        if problems:
            raise RecipeError("axolotl", problems)

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, MoELoraConfig] | None:
        """Put a new mixture on the model, or the one that is saved in `lora_model_dir`.

        Raises:
            ValueError: `lora_model_dir` holds no mixture, or it does not fit the model.
        """
        if cfg.adapter != ADAPTER:
            return None
        config = _config(cfg, _task_type(model))
        if config_only:  # trainers of preferences wrap the model themselves
            return None, config
        cast = cfg.peft_autocast_adapter_dtype
        options = {} if cast is None else {"autocast_adapter_dtype": cast}
        if cfg.lora_model_dir:
            wrapped = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference, **options)
        else:
            wrapped = get_peft_model(model, config, **options)
        loaded = wrapped.peft_config[wrapped.active_adapter]
        if not isinstance(loaded, MoELoraConfig):
            raise ValueError(
                f"`lora_model_dir` ({cfg.lora_model_dir!r}) holds a {type(loaded).__name__} and no mixture; use "
                "`adapter: lora`, or make it an expert with `moelora build`"
            )
        wrapped.print_trainable_parameters()
        return wrapped, loaded

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[TrainerCallback]:
        """Log what the routers do beside the loss."""
        return [MoELoraCallback()] if cfg.adapter == ADAPTER else []


def _config(cfg: Any, task_type: str = "CAUSAL_LM") -> MoELoraConfig:
    """The mixture that axolotl's options and our section stand for; see [`mixture_config`]."""
    given = {key: value for key in LORA_OPTIONS if (value := cfg.get(key)) not in (None, [], {})}
    lora = {LORA_OPTIONS[key]: LoraOption(key, value) for key, value in _plain(given).items()}
    return mixture_config("axolotl", _plain(cfg.get(SECTION)), lora, task_type=task_type)


def _plain(value: Any) -> Any:
    """Without axolotl's mappings, which answer None for whatever they lack."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _task_type(model: Any) -> str:
    """What PEFT calls the model's task, by its class, as axolotl does for a LoRA."""
    kinds = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}
    return next((task for kind, task in kinds.items() if kind in type(model).__name__), "CAUSAL_LM")
