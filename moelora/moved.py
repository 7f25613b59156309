"""Where modules have moved to. Their old names still import: pickles of whole models hold them, and scripts may.

The new modules are imported when a name of theirs is asked for, so that none of this takes time.
"""

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

MOVED = {
    "experts.reading": "experts.evaluation",
    "experts.moments": "experts.covariance",
    "experts.memory": "experts.domains",
    "_peft": "tuner._peft",
    "balance": "forward.finish",
    "blocks": "tuner.blocks",
    "call": "forward.call",
    "controls": "tuner.controls",
    "experts.auto_growth": "cli.auto_grow",
    "experts.building": "cli.build",
    "experts.continual": "cli.grow",
    "experts.distil_command": "cli.distil",
    "experts.export_command": "cli.export",
    "experts.judged": "cli.evaluation",
    "experts.lora_file": "storage.lora_file",
    "experts.merge_command": "cli.merge",
    "experts.novelty_command": "cli.novelty",
    "experts.operation": "cli.operation",
    "experts.router_training": "training.router_training",
    "experts.student": "training.student",
    "gate": "routing.domain_classifier",
    "layer": "tuner.layer",
    "losses": "routing.losses",
    "masks": "forward.masks",
    "model": "tuner.model",
    "monitor": "routing.training_sums",
    "names": "tuner.names",
    "options": "cli.options",
    "overflow": "forward.overflow",
    "patterns": "storage.patterns",
    "peft_model": "tuner.peft_model",
    "process": "cli.process",
    "ranks": "ops.data_parallel",
    "recomputation": "forward.checkpointing",
    "reference": "cli.docs_tables",
    "registration": "tuner.registration",
    "report.command": "cli.report",
    "report.inspection": "cli.inspect",
    "report.stored": "storage.mixture_files",
    "report.texts": "data.texts",
    "router": "tuner.router",
    "shared_input": "forward.shared_input",
    "staging": "files.staging",
    "state": "forward.state",
    "stats": "routing.sums",
    "storage.adapter_files": "files.adapter_files",
    "storage.generation": "files.atomic_save",
    "training.base": "storage.base_model",
    "training.chat": "data.chat",
    "training.checkpoints": "storage.trainer_checkpoints",
    "training.data": "data.preparation",
    "training.generate": "cli.generate",
    "training.progress": "console",
    "training.recipe": "recipe",
    "training.record": "storage.run_record",
    "training.record_check": "storage.record_check",
    "training.schema": "schema",
    "training.sources": "data.sources",
}


RENAMED = {
    "experts.judged.Opened": "cli.evaluation.EvaluatedJob",
    "experts.memory.forget": "experts.domains.forget_domain",
    "experts.memory.refresh_gate": "experts.domains.refresh_domain_classifier",
    "experts.memory.remember": "experts.domains.learn_domain",
    "experts.memory.remembers": "experts.domains.knows_domain",
    "experts.moments.Moments": "experts.covariance.InputCovariance",
    "experts.reading.Reading": "experts.evaluation.Evaluation",
    "gate.Memory": "routing.domain_classifier.DomainStatistics",
    "gate.Said": "routing.domain_classifier.ContextDensities",
    "monitor.pop_training_stats": "forward.training_stats.pop_training_stats",
    "options.JudgedOptions": "cli.options.EvaluatedOptions",
    "overflow.Growth": "forward.overflow.StepRollback",
    "report.texts.Block": "data.texts.TextBlock",
    "state.Opened": "forward.state.ForwardEntry",
}
"""Names in them that are now others, or elsewhere."""


class _Moved(ModuleType):
    """Stands under an old name and hands out what the new module holds."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(old, f"Moved to {new}.")
        self._new = new

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what is asked of every module there is
            raise AttributeError(name)
        old = f"{self.__name__}.{name}"
        renamed = RENAMED.get(old.removeprefix("moelora."))
        new = f"{self._new}.{name}" if renamed is None else f"moelora.{renamed}"
        module, _, attribute = new.rpartition(".")
        found = getattr(import_module(module), attribute)
        warnings.warn(f"`{old}` is now `{new}`", DeprecationWarning, stacklevel=2)
        return found


def keep_old_names() -> None:
    """Let the old names import."""
    for old, new in MOVED.items():
        sys.modules.setdefault(f"moelora.{old}", _Moved(f"moelora.{old}", f"moelora.{new}"))
