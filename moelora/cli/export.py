"""`moelora export`: experts for those who know only plain LoRA, or no LoRA at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..experts.exporting import is_quantised, merge, save_lora, to_lora, to_lora_mixture
from ..experts.per_task import TaskLora, to_loras
from ..files.opening import expand_user
from ..recipe import ModelOptions
from ..schema import Problem, UserError, telling_user
from ..storage.base_model import load_config, load_model, load_tokenizer
from ..storage.lora_file import LoraFile
from ..storage.mixture_files import StoredAdapter, read_mixture
from ..storage.run_record import noted_base
from .operation import Plan, carry_out, check_output, read_source, shown
from .options import ExportOptions
from .references import carry, references_of


def export(options: ExportOptions) -> Path | None:
    """Check everything, print the plan, and write a LoRA or a model."""
    weights = _check(options)
    adapter = expand_user(options.adapter)
    stored, base = _read(options, adapter)
    if options.each:
        return _export_each(options, adapter, stored, base)
    with telling_user(f"{adapter}: "):
        lora = to_lora_mixture(stored, weights) if options.mixture else to_lora(stored, str(options.expert))
    if base is not None:
        lora.config.base_model_name_or_path = base.name
    what = "The mixture" if options.mixture else f"Expert {options.expert}"
    plan = _plan(options, lora, base, what)
    references = None if options.merge or options.dry_run else references_of(adapter)

    def work(folder: Path) -> None:
        if options.merge and base is not None:
            _merge(base, lora, folder)
        else:
            save_lora(lora, folder)
            carry(references, folder, is_exact=options.mixture and weights is None)

    return carry_out(options, plan, work, inputs=[adapter], base=base)


def _check(options: ExportOptions) -> list[float] | None:
    problems = []
    if sum((options.expert is not None, options.mixture, options.each)) != 1:
        fix = "give one of --expert with a number or a name, --mixture, and --each"
        problems.append(Problem("--expert", options.expert, fix))
    if options.each and options.merge:
        problems.append(Problem("--each", True, "makes several LoRAs, and one model can take one; drop --merge"))
    if options.weights is not None and not options.mixture:
        problems.append(Problem("--weights", options.weights, "goes with --mixture"))
    weights = None
    try:
        weights = None if options.weights is None else [float(number) for number in options.weights.split(",")]
    except ValueError:
        problems.append(Problem("--weights", options.weights, "must be numbers with commas between, such as 0.5,0.5"))
    check_output(options, problems)
    return weights


def _read(options: ExportOptions, adapter: Path) -> tuple[list[StoredAdapter], ModelOptions | None]:
    """The adapters, and their base model: looked at only where it was named or has to be written."""
    if not options.merge and options.base is None:
        stored = read_mixture(adapter)
        noted, name = noted_base(adapter), stored[0].config.base_model_name_or_path
        return stored, ModelOptions(**noted) if noted else ModelOptions(name=name) if name else None
    source = read_source(adapter, options.base)
    if options.merge and is_quantised(load_config(source.base)):
        raise UserError(
            f"--merge: the weights of {source.base.name} are quantised, and merging would round base and experts "
            "together onto their grid; give the model in full precision with --base, or leave --merge out"
        )
    return source.stored, source.base


def _export_each(
    options: ExportOptions, adapter: Path, stored: list[StoredAdapter], base: ModelOptions | None
) -> Path | None:
    """A LoRA for every adapter, in a folder of its name."""
    with telling_user(f"{adapter}: "):
        tasks = to_loras(stored)
    for task in tasks.values():
        if base is not None:
            task.lora.config.base_model_name_or_path = base.name

    def work(folder: Path) -> dict[str, Any]:
        for name, task in tasks.items():
            save_lora(task.lora, folder / name)
        return {"left_out": {name: task.error for name, task in tasks.items()}}

    return carry_out(options, _plan_each(options, stored, tasks, base), work, inputs=[adapter], base=base)


def _plan_each(
    options: ExportOptions, stored: list[StoredAdapter], tasks: Mapping[str, TaskLora], base: ModelOptions | None
) -> Plan:
    experts = {each.name: each.num_experts for each in stored}
    rows = [(name, str(experts[name]), *_numbers(task.lora), _left_out(task.error)) for name, task in tasks.items()]
    notes = [f"Base model: {shown(Path(base.name)) if base else 'not noted'}"]
    if any(task.error for task in tasks.values()):
        notes.append(
            "Experts that are weighed token by token are exported at their mean weights. What that leaves out of their "
            "deltas (squared) is estimated from domain statistics; moelora distil comes nearer, with texts."
        )
    if unknown := [name for name, task in tasks.items() if task.error is None]:
        notes.append(
            f"{', '.join(unknown)}: without domain statistics the experts count alike, and nothing tells the error."
        )
    title = f"The adapters of {options.adapter} as plain PEFT LoRAs: {shown(options.out_folder)}"
    return Plan(title, ("adapter", "experts", *_HEAD, "left out"), rows, notes)


def _left_out(error: float | None) -> str:
    return "unknown" if error is None else f"{error:.2%}" if error else "nothing: exact"


def _numbers(lora: LoraFile) -> tuple[str, str, str, str]:
    """Rank, alpha, linears and parameters."""
    size = sum(A.numel() + B.numel() for A, B in lora.factors.values())
    return " ".join(map(str, lora.ranks)), str(lora.config.lora_alpha), str(len(lora.factors)), f"{size:,}"


def _plan(options: ExportOptions, lora: LoraFile, base: ModelOptions | None, what: str) -> Plan:
    notes = [f"Base model: {shown(Path(base.name)) if base else 'not noted'}"]
    if options.merge:
        notes.append("Merged in float32 and rounded once, to the precision of the base model's files.")
    form = "merged into the base model" if options.merge else "as a plain PEFT LoRA"
    return Plan(f"{what} of {options.adapter} {form}: {shown(options.out_folder)}", _HEAD, [_numbers(lora)], notes)


_HEAD = ("r", "alpha", "linears", "parameters")


def _merge(base: ModelOptions, lora: LoraFile, folder: Path) -> None:
    exact = dataclasses.replace(base, dtype="float32")
    model = load_model(exact, torch.device("cpu"))
    dtype = getattr(load_config(base), "dtype", None) or torch.float32
    with telling_user("--merge: "):
        merge(model, lora)
    model.to(dtype).save_pretrained(str(folder))
    load_tokenizer(base).save_pretrained(str(folder))
