"""`moelora export`: experts for those who know only plain LoRA, or no LoRA at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ..experts.exporting import is_quantised, merge, save_lora, to_lora, to_lora_mixture
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
    if (options.expert is None) != options.mixture:
        fix = "give --expert with a number or a name, or --mixture, and not both"
        problems.append(Problem("--expert", options.expert, fix))
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


def _plan(options: ExportOptions, lora: LoraFile, base: ModelOptions | None, what: str) -> Plan:
    numbers = sum(A.numel() + B.numel() for A, B in lora.factors.values())
    ranks = " ".join(map(str, lora.ranks))
    notes = [f"Base model: {shown(Path(base.name)) if base else 'not noted'}"]
    if options.merge:
        notes.append("Merged in float32 and rounded once, to the precision of the base model's files.")
    form = "merged into the base model" if options.merge else "as a plain PEFT LoRA"
    row = (ranks, str(lora.config.lora_alpha), str(len(lora.factors)), f"{numbers:,}")
    return Plan(f"{what} of {options.adapter} {form}: {shown(options.out_folder)}", _HEAD, [row], notes)


_HEAD = ("r", "alpha", "linears", "parameters")


def _merge(base: ModelOptions, lora: LoraFile, folder: Path) -> None:
    exact = dataclasses.replace(base, dtype="float32")
    model = load_model(exact, torch.device("cpu"))
    dtype = getattr(load_config(base), "dtype", None) or torch.float32
    with telling_user("--merge: "):
        merge(model, lora)
    model.to(dtype).save_pretrained(str(folder))
    load_tokenizer(base).save_pretrained(str(folder))
