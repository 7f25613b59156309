"""`--tuner_type moelora` in ms-swift: a file for `--external_plugins` calls [`register`] (docs/tools.md).

Written for the release in `VERSIONS`; tests/tools/test_swift.py compares what is used of it with what is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from peft import PeftModel, get_peft_model
from swift.arguments.tuner_args import TunerArguments
from swift.callbacks import callbacks_map
from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules
from swift.tuner_plugin import Tuner, tuners_map

from ..config import MoELoraConfig
from ..schema import Problem, RecipeError
from ..training.callback import MoELoraCallback
from .options import LoraOption, mixture_config, refused_options

VERSIONS = "4.6"
"""The release of ms-swift whose names these are."""

TUNER = "moelora"

LORA_OPTIONS = {
    "lora_rank": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_bias": "bias",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "init_weights": "init_lora_weights",
    "target_parameters": "target_parameters",
    "target_modules": "target_modules",
    "modules_to_save": "modules_to_save",
}
"""ms-swift's options, and the fields that they mean."""

REFUSED = {
    "lora_dtype": "drop it: experts and routers are float32, and autocast does the rest",
    "lorap_lr_ratio": "drop it: LoRA+ as ms-swift sets it up knows no routers",
    "use_swift_lora": "drop it: a mixture is an adapter of PEFT's",
    "ref_adapters": "drop it: the reference is the model without its mixture",
}
"""What ms-swift would do for a LoRA and not, or wrongly, for a mixture."""

_TASKS = {"EMBEDDING": None, "RERANKER": "SEQ_CLS", "GENERATIVE_RERANKER": "CAUSAL_LM", "DECISION": "CAUSAL_LM"}
"""What PEFT calls tasks for which ms-swift has names of its own."""


class Callback(MoELoraCallback):
    """[`MoELoraCallback`] as ms-swift makes its callbacks."""

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__()


class MoELoraTuner(Tuner):
    """Trains, saves and loads a mixture of LoRA experts where ms-swift would a LoRA."""

    options: Mapping[str, Any] = {}

    @classmethod
    def prepare_model(cls, args: Any, model: Any) -> PeftModel:
        """Put a new mixture on the model.

        Raises:
            RecipeError: listing every problem with its key, value and fix.
        """
        _check(args)
        config = _config(args, model, cls.options)
        _log_routers(args)
        return get_peft_model(model, config)

    @classmethod
    def from_pretrained(cls, model: Any, model_id: str, **kwargs: Any) -> PeftModel:
        """Load a saved mixture, with all its adapters.

        Raises:
            ValueError: model_id holds no mixture, or it does not fit the model.
        """
        wrapped = PeftModel.from_pretrained(model, model_id, **kwargs)
        loaded = wrapped.peft_config[wrapped.active_adapter]
        if not isinstance(loaded, MoELoraConfig):
            raise ValueError(
                f"`adapters` ({model_id!r}) holds a {type(loaded).__name__} and no mixture; use `--tuner_type lora`, "
                "or make it an expert with `moelora build`"
            )
        return wrapped

    @classmethod
    def save_pretrained(
        cls,
        model: Any,
        save_directory: str,
        state_dict: dict[str, Any] | None = None,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """Save all adapters of the mixture: ms-swift's own tuners save "default" alone."""
        model.save_pretrained(save_directory, state_dict=state_dict, safe_serialization=safe_serialization, **kwargs)


def register(**options: Any) -> None:
    """Make `--tuner_type moelora` known.

    Args:
        options: fields of `MoELoraConfig`, or a `preset`; ms-swift's own LoRA options hold for the rest.
    """
    tuners_map[TUNER] = type(MoELoraTuner.__name__, (MoELoraTuner,), {"options": options})
    callbacks_map[TUNER] = Callback


def _check(args: Any) -> None:
    problems = refused_options(vars(args), REFUSED)
    if args.tuner_backend != "peft":
        problems.append(Problem("tuner_backend", args.tuner_backend, "must be peft: Unsloth knows no experts"))
    if problems:
        raise RecipeError("ms-swift", problems)


def _config(args: Any, model: Any, options: Mapping[str, Any]) -> MoELoraConfig:
    """The mixture that ms-swift's options and ours stand for; see [`mixture_config`].

    ms-swift does not say whether an option is the user's or a default. A default gives way to what `register` was told,
    a preset included; any other value that both give is a problem.
    """
    defaults = _defaults()
    is_ours = {key for key, field in LORA_OPTIONS.items() if field in options or "preset" in options}
    lora = {
        LORA_OPTIONS[key]: LoraOption(key, _whole(getattr(args, key)))
        for key in LORA_OPTIONS
        if key not in is_ours or getattr(args, key) != defaults[key]
    }
    task = args.task_type.upper()
    for key, resolve in (("target_modules", get_target_modules), ("modules_to_save", get_modules_to_save)):
        if LORA_OPTIONS[key] not in options:  # "all-linear", vision towers, norms: what they are is ms-swift's to say
            lora[LORA_OPTIONS[key]] = LoraOption(key, resolve(args, model) or None)
    return mixture_config("ms-swift", options, lora, task_type=_TASKS.get(task, task))


def _whole(value: Any) -> Any:
    """A number without a fraction as PEFT has it: `--lora_alpha 32` arrives as 32.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _defaults() -> dict[str, Any]:
    """What ms-swift's options are where the user says nothing; `init_weights` has been read as true or false."""
    fields = {field.name: field for field in dataclasses.fields(TunerArguments)}
    values = {
        key: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for key, field in fields.items()
        if key in LORA_OPTIONS
    }
    return values | {"init_weights": True}


def _log_routers(args: Any) -> None:
    """Have the trainer, which is made next, log what the routers do, and tell them of its steps."""
    callbacks = args.training_args.callbacks
    if TUNER not in callbacks:
        callbacks.append(TUNER)
