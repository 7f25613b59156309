"""Why a case of PEFT's tests does not apply to a mixture, or applies and ends otherwise by design.

The first pattern found in "<test> <message>" counts. What no pattern explains is a bug and fails the command.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Deviation:
    """One class of cases.

    Args:
        pattern: regular expression over the test's name and the error's message.
        reason: a sentence for the record.
        applies: False where the mixture refuses by name what the case needs.
        plain: also expected with `use_moe_routing=False`.
    """

    pattern: str
    reason: str
    applies: bool = False
    plain: bool = False


DEVIATIONS = (
    Deviation(
        r"Configs are incompatible: for (r|lora_alpha|rank_pattern|alpha_pattern),",
        "PEFT lists by type what hot-swapping compares, and a mixture's ranks and alphas have to be equal",
        plain=True,
    ),
    Deviation(
        r"an adapter cannot be named .* by which tensors are told apart",
        "an adapter is not called as a module is: PEFT loses tensors of such an adapter, or of others beside it",
        plain=True,
    ),
    Deviation(
        r"`bias` \('invalid'\) is not valid",
        "`bias` is checked when the configuration is made, a ValueError, and not when a model has been changed",
        applies=True,
        plain=True,
    ),
    Deviation(
        r"`target_parameters` \(.*\) names no parameter|holds `linear\.weight` of `target_parameters`",
        "`target_parameters` that the model does not have, or that `target_modules` reaches too, are refused by name",
        applies=True,
    ),
    Deviation(
        r"test_from_pretrained_config_construction",
        "a configuration that another adapter is made from is copied: own routers noted in it are of that one's model",
        applies=True,
    ),
    Deviation(
        r"test_training_gradient_checkpointing .*moe_router",
        "experts that begin at zero leave a router no gradient but rounding, which the case takes for one",
        applies=True,
    ),
    Deviation(
        r"test_non_existing_model_card",
        "the model card is a mixture's, shorter than the blank form whose length the case compares",
        applies=True,
    ),
    Deviation(
        r"test_target_parameter_result_caching_works",
        "native experts are computed without the sum of weight and delta whose making the case watches",
        applies=True,
    ),
    Deviation(
        r"`(?P<option>\w+)` \(.*\) cannot be honoured by a mixture",
        "the case sets `{option}`, which MoELoraConfig refuses: experts weighted per token cannot honour it",
    ),
    Deviation(
        r"which a mixture cannot route",
        "the case adapts an embedding, a convolution or another layer that is not linear",
    ),
    Deviation(r"cannot merge: router_type=", 'merging needs `router_type="fixed"`'),
    Deviation(
        r"`add_weighted_adapter` cannot", "`add_weighted_adapter` would combine experts as if they were one LoRA"
    ),
    Deviation(r"`safe_serialization=False` cannot", "a mixture of several adapters is saved as safetensors only"),
    Deviation(
        r"PEFT types found: MOELORA|mixed models|`PeftMixedModel`",
        "PeftMixedModel lists the methods it accepts by type",
        plain=True,
    ),
    Deviation(
        r"initial adapter should be set to `True`|<- ValueError: `eigens` attribute not found",
        "PEFT's `path_initial_model_for_weight_conversion` resets `init_lora_weights` for its own type only",
        plain=True,
    ),
    Deviation(
        r"warns_for_unsharded_state_dict",
        "PEFT checks gathered FSDP weights for its own type only",
        applies=True,
        plain=True,
    ),
    Deviation(
        r"'MoELoraModel' == 'LoraModel'|test_peft_types|startswith.*lora\.MoELora|child of <class 'moelora",
        "the case expects the type or class names of PEFT's LoRA",
        applies=True,
        plain=True,
    ),
    Deviation(
        r"Can't find 'adapter_config.json' at|(selected_adapters|test_adapter_dtype_autocast) .*is no folder"
        r"|Could not determine the dtype of this adapter",
        "several adapters are saved as one mixture and loaded under their own names, not one directory each",
        applies=True,
    ),
    Deviation(
        r"test_requires_grad_(lora_\w+_targets|modules_to_save_\w+|follows_inference_mode_\w+) .*to require gradients",
        "the case lists the parameters that are trainable, and routers are among them",
        applies=True,
    ),
    Deviation(
        r"with_(same|overlapping)_(modules_to_save|trainable_token_indices)_raises .*DID NOT RAISE",
        "adapters that save the same module may be active together: the first one's copy is in use",
        applies=True,
    ),
    Deviation(
        r"Rank \d+ is not equal to|TestRankAndAlphaPattern|target rank|compiled_hotswap|test_scaling_with_rslora "
        r"|test_targeting_module_and_targeting_param_equivalent",
        "a layer stores its experts as one LoRA of rank num_experts * r, which the case reads, or rounds with",
        applies=True,
    ),
    Deviation(
        r"test_lora_linear_init_gaussian",
        "the case tests the randomness of one seed's draw, whose shape is num_experts times as large",
        applies=True,
    ),
    Deviation(
        r"TunerLayerStatus|test_quantization_backend|TestTunerStateDictKeyPrefixes|name_is_suffix_of_another_module"
        r"|test_(active_adapters|available_adapters|devices_all_cpu|enabled|layer_names|merge_adapters|module_type"
        r"|nb_params|num_adapter_layers|requires_grad)_small |(same_as_module_name|missing_keys_warning) .*moe_router",
        "the case counts the model's tuner layers or weights, and routers are among them",
        applies=True,
    ),
    Deviation(
        r"test_sequential_merge_matches_batch_merge",
        "fixed weights are shares among the adapters merged together; merged one by one, each has the whole",
        applies=True,
    ),
    Deviation(
        r"test_inject_from_state_dict_(missing_keys_warning|low_cpu_mem_usage)",
        "routers come with the layers, whatever the state dict lists, and their buffers are real, not meta, tensors",
        applies=True,
    ),
    Deviation(
        r"test_add_second_adapter_with_all_linear_works",
        "`add_adapter` copies the configuration, so the caller's own does not get the resolved targets",
        applies=True,
    ),
    Deviation(
        r"test_from_pretrained_missing_keys_warning|does not fit the model"
        r"|tensors of experts and routers, and \d+ were gathered",
        "a checkpoint with missing or extra weights is refused, where PEFT warns or is silent",
        applies=True,
    ),
)


def explain(test: str, message: str, is_plain: bool) -> tuple[str, bool] | None:
    """The reason for a failure and whether the case applies; None for a bug."""
    for deviation in DEVIATIONS:
        found = re.search(deviation.pattern, f"{test} {message}", re.DOTALL)
        if found and (deviation.plain or not is_plain):
            return deviation.reason.format(**found.groupdict()), deviation.applies
    return None
