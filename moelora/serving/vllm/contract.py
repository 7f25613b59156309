"""What the plug-in relies on in vLLM: the version, and every name. tests/serving/test_contract.py compares them."""

from __future__ import annotations

VERSIONS = "0.32"
"""The release whose names these are; others have other constructors and signatures."""

NAMES = {
    "vllm": ("__version__",),
    "vllm.config.CUDAGraphMode": ("NONE",),
    "vllm.config.CompilationMode": ("NONE",),
    "vllm.envs": ("VLLM_LORA_ENABLE_DUAL_STREAM",),
    "vllm.forward_context": ("get_forward_context", "is_forward_context_available"),
    "vllm.forward_context.ForwardContext": ("attn_metadata",),
    "vllm.logger": ("init_logger",),
    "vllm.lora.lora_model": ("LoRAModel",),
    "vllm.lora.lora_weights": ("LoRALayerWeights",),
    "vllm.lora.model_manager.LRUCacheLoRAModelManager": (
        "_deactivate_adapter",
        "_init_punica_wrapper",
        "activate_adapter",
        "lora_slots",
    ),
    "vllm.lora.punica_wrapper.punica_base.PunicaWrapperBase": (
        "add_expand",
        "add_lora_embedding",
        "add_lora_linear",
        "add_lora_logits",
        "add_shrink",
        "sampler_indices",
        "token_lora_indices",
        "update_metadata",
    ),
    "vllm.lora.punica_wrapper.punica_cpu": ("PunicaWrapperCPU",),
    "vllm.lora.request.LoRARequest": ("lora_int_id", "lora_name", "lora_path"),
    "vllm.lora.utils": ("get_adapter_absolute_path",),
    "vllm.lora.worker_manager.LRUCacheWorkerLoRAManager": ("_load_adapter", "_manager_cls"),
    "vllm.model_executor.models.utils.WeightsMapper": ("get_rename_mapper", "map_name"),
    "vllm.v1.worker.lora_model_runner_mixin": ("LRUCacheWorkerLoRAManager",),
}
"""By module or class."""

ATTRIBUTES = {
    "vllm.config.compilation.CompilationConfig": ("cudagraph_mode", "mode", "static_forward_context"),
    "vllm.config.vllm.VllmConfig": (
        *("additional_config", "cache_config", "compilation_config", "kv_transfer_config", "lora_config"),
        *("model_config", "parallel_config"),
    ),
    "vllm.lora.model_manager.LoRAModelManager": (
        *("_registered_adapters", "lora_index_to_id", "model", "modules", "packed_modules", "punica_wrapper_mapping"),
    ),
    "vllm.lora.ops.triton_ops.lora_kernel_metadata.LoRAKernelMeta": ("no_lora_flag_cpu", "token_lora_mapping"),
    "vllm.v1.attention.backends.cpu_attn.CPUAttentionMetadata": (
        *("block_table", "query_start_loc", "seq_lens", "slot_mapping"),
    ),
    "vllm.v1.attention.backends.flash_attn.FlashAttentionMetadata": (
        *("block_table", "query_start_loc", "seq_lens", "slot_mapping"),
    ),
}
"""Of objects, by class."""

PARAMETERS = {
    "vllm.lora.lora_model.LoRAModel": ("lora_model_id", "rank", "loras"),
    "vllm.lora.lora_weights.LoRALayerWeights": ("module_name", "rank", "lora_alpha", "lora_a", "lora_b", "scaling"),
    "vllm.lora.model_manager.LRUCacheLoRAModelManager": ("model", "lora_config", "device", "vllm_config"),
    "vllm.lora.punica_wrapper.punica_base.PunicaWrapperBase.add_expand": (
        *("y", "x", "lora_b_stacked", "output_slices", "offset_start", "add_inputs"),
    ),
    "vllm.lora.punica_wrapper.punica_base.PunicaWrapperBase.add_lora_linear": (
        *("y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices"),
    ),
    "vllm.lora.punica_wrapper.punica_base.PunicaWrapperBase.add_shrink": ("y", "x", "lora_a_stacked", "scale"),
    "vllm.lora.punica_wrapper.punica_base.PunicaWrapperBase.update_metadata": (
        *("mapping", "lora_index_to_id", "max_loras", "vocab_size"),
    ),
    "vllm.lora.worker_manager.LRUCacheWorkerLoRAManager._load_adapter": ("lora_request",),
}
"""Of functions and constructors, by name."""

HEAD = "lm_head"
"""The linear whose output are the logits; vLLM computes a LoRA's part of them apart from that of all other linears."""

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be."""


def is_known(version: str) -> bool:
    """Whether this is a release whose names are known.

    Example:
        >>> is_known("0.32.1+cpu"), is_known("0.33.0")
        (True, False)
    """
    return version == VERSIONS or version.startswith((f"{VERSIONS}.", f"{VERSIONS}+"))


def least_rank(rank: int) -> int | None:
    """The least `--max-lora-rank` that serves a LoRA of this rank; None where none does.

    Example:
        >>> least_rank(20), least_rank(513)
        (32, None)
    """
    return next((served for served in SERVED_RANKS if served >= rank), None)
