"""Mixtures in an unmodified vLLM: `vllm serve BASE --enable-lora --lora-modules name=FOLDER`. docs/serving.md.

vLLM loads this plug-in by its entry point in every process. One name of vLLM's is replaced, the class that manages a
worker's LoRAs; all else is subclasses of its own classes (contract.py lists every name).
"""

from __future__ import annotations

import logging


def register() -> None:
    """Let vLLM's workers take mixtures. Called by vLLM, any number of times."""
    import vllm
    from vllm.v1.worker import lora_model_runner_mixin as runner

    from .contract import is_known

    stock = runner.LRUCacheWorkerLoRAManager
    if hasattr(stock, "takes_mixtures"):
        return
    runner.LRUCacheWorkerLoRAManager = _manager(stock, is_known(vllm.__version__), vllm.__version__)


def _manager(stock: type, is_known: bool, version: str) -> type:
    if is_known:
        from .manager import MixtureWorkerManager

        return MixtureWorkerManager
    from .refusal import refusal, refusing_manager

    logging.getLogger("vllm.moelora").warning(refusal(version))
    return refusing_manager(stock, refusal(version))
