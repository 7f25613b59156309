"""`moelora distil`: fit a LoRA to a mixture, train it if asked, say how near it comes and how long it took."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, set_seed

from ..console import make_stdout, make_table
from ..data.preparation import DomainBlocks, load_domains, mix
from ..experts.covariance import ModelInputs
from ..experts.distil import closed_form, fresh_lora, lora_of
from ..experts.exporting import check_exportable
from ..files.opening import expand_user
from ..recipe import DomainOptions, Recipe
from ..schema import Problem, UserError, telling_user
from ..storage.base_model import load_tokenizer
from ..storage.finding import tell_loading
from ..storage.mixture_files import scaling_of
from ..storage.run_record import learned_domains
from ..training.arguments import training_arguments
from ..training.evaluate import DomainResult, check_converged, evaluate
from ..training.student import train_student
from .operation import Plan, Source, carry_out, check_only_read, check_output, check_rank, read_source
from .options import DistilOptions
from .references import carry, references_of
from .report import block_size_of, check_data

DEFAULT_RANK = 16  # of --r; options.py says it in words


def distil_command(options: DistilOptions) -> Path | None:
    """Distil an adapter and write the LoRA to a folder of its own."""
    domains, problems = check_data(options.data)
    if options.compare_scratch and not options.steps:
        problems.append(Problem("--compare-scratch", True, "needs --steps: as many train the LoRA to compare with"))
    check_output(options, problems)
    source = read_source(options.adapter, options.base)
    check_only_read(options, [options.adapter], source.base, domains)
    with telling_user(f"{source.folder}: "):
        check_exportable([adapter for adapter in source.stored if adapter.position is not None])
    highest = source.highest_rank(source.experts)
    rank = min(DEFAULT_RANK, highest) if options.r is None else options.r
    check_rank("--r", rank, highest)
    learned = learned_domains(source.folder)
    tokenizer = load_tokenizer(source.base)
    recipe = Recipe(
        model=source.base,
        data=tuple(_as_trained(domain, learned) for domain in domains),
        block_size=block_size_of(source.folder, source.base),
        max_eval_blocks=options.max_eval_blocks,
        training={"output_dir": options.out},
    )
    blocks = load_domains(recipe, tokenizer)

    def work(folder: Path) -> dict[str, Any]:
        try:
            with telling_user():
                outcome = _Job(options, source, rank, blocks, tokenizer).run(folder)
        except torch.linalg.LinAlgError as error:
            raise UserError(
                f"the experts of {source.folder} compute numbers too large to be fitted ({error}); was their training "
                "diverging?"
            ) from error
        return outcome

    return carry_out(options, _plan(options, source, rank), work, inputs=[options.adapter], base=source.base)


def _as_trained(domain: DomainOptions, learned: Sequence[Mapping[str, Any]]) -> DomainOptions:
    """The domain with the settings that training had for this file, so that the same documents are held out."""
    for settings in (DomainOptions(**each) for each in learned):
        if settings.path == domain.path:
            return dataclasses.replace(settings, name=domain.name)
    return domain


def _plan(options: DistilOptions, source: Source, rank: int) -> Plan:
    shapes = {
        name: pool.lora_A.shape[1] + pool.lora_B.shape[0]
        for adapter in source.stored
        if adapter.position is not None
        for name, pool in adapter.pools.items()
    }
    before = sum(adapter.num_parameters for adapter in source.stored if adapter.position is not None)
    training = f"{options.steps} steps of {options.batch_size} blocks" if options.steps else "none"
    names = ", ".join(given.partition("=")[0] for given in options.data)
    rows = [
        ("mixture", f"{len(source.experts)} experts, {before:,} parameters"),
        ("LoRA", f"rank {rank} on {len(shapes)} linears, {rank * sum(shapes.values()):,} parameters"),
        ("fit", f"least squares on up to {options.max_tokens:,} tokens of {names}"),
        ("training towards the mixture", training),
    ]
    return Plan(f"Distil {options.adapter} into one LoRA", ("what", "how much"), rows)


@dataclass(frozen=True)
class _Row:
    """One model's held-out losses [D], and the seconds it took to make."""

    name: str
    losses: list[float]
    seconds: float | None = None

    @property
    def mean(self) -> float:
        return sum(self.losses) / len(self.losses)


class _Job:
    """Everything that is loaded for one distillation."""

    def __init__(
        self,
        options: DistilOptions,
        source: Source,
        rank: int,
        domains: Sequence[DomainBlocks],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        tell_loading(source.base, source.folder)
        self.options = options
        self.rank = rank
        self.model = source.load()
        self.domains = domains
        self.blocks = mix(self.domains, options.seed).shuffle(seed=options.seed)
        self.collator = DataCollatorForSeq2Seq(tokenizer)
        self.rows: list[_Row] = []

    def run(self, folder: Path) -> dict[str, Any]:
        """Fit, train, measure, print; save the LoRA in folder. Returns what operation.json keeps."""
        options, model = self.options, self.model
        with model.disable_adapter():
            self._measure("base model", model)
        self._measure("mixture", model)
        began = time.perf_counter()
        found = closed_form(model, self._batches, self.rank, options.ridge, options.memory * 2**30)
        student = lora_of(model, found.factors)
        took = time.perf_counter() - began
        unexplained = sum(found.error.values()) / len(found.error)
        self._measure("LoRA, closed form", student, took)
        if options.steps:
            took += self._train(student, options.learning_rate, teacher=model)
            after = self._measure(f"LoRA, then {options.steps} steps of KL", student, took)
            check_converged(after, f"lower --learning-rate ({options.learning_rate:g})")
        student.save_pretrained(str(folder))
        carry(references_of(expand_user(options.adapter)), folder, is_exact=False)
        if options.compare_scratch:
            config = model.peft_config[model.base_model.routing.active_adapters[0]]
            set_seed(options.seed)
            scratch = fresh_lora(model, self.rank, scaling_of(config, "", config.r))
            took = self._train(scratch, options.scratch_learning_rate)
            self._measure(f"LoRA from scratch, {options.steps} steps", scratch, took)
        stdout = make_stdout()
        stdout.print(self._table())
        share = f"the fit leaves out {unexplained:.2%} of the experts' deltas (squared, mean over linears)"
        stdout.print(f"On the data it was made on {share}.", soft_wrap=True)
        return {"unexplained": unexplained, "models": [dataclasses.asdict(row) for row in self.rows]}

    def _batches(self) -> Iterator[ModelInputs]:
        """The blocks that the fit reads, on the model's device."""
        tokens, count = 0, 0
        for block in self.blocks["input_ids"]:
            if count and tokens + len(block) > self.options.max_tokens:
                break
            tokens, count = tokens + len(block), count + 1
        chosen = self.blocks.select(range(count))
        for batch in DataLoader(chosen, batch_size=self.options.batch_size, collate_fn=self.collator):
            yield {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def _measure(self, name: str, model: PeftModel, seconds: float | None = None) -> dict[str, DomainResult]:
        found = evaluate(model, self.domains, self.collator, self.options.batch_size, name)
        self.rows.append(_Row(name, [result.loss for result in found.values()], seconds))
        return found

    def _train(self, student: PeftModel, learning_rate: float, teacher: PeftModel | None = None) -> float:
        """Train a student and return the seconds it took."""
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            arguments = training_arguments(
                output_dir=scratch,
                max_steps=self.options.steps,
                per_device_train_batch_size=self.options.batch_size,
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=self.options.steps // 10,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                dataloader_pin_memory=torch.cuda.is_available(),
                seed=self.options.seed,
            )
            train_student(student, arguments, self.blocks, self.collator, teacher)
        return time.perf_counter() - began

    def _table(self) -> Table:
        right = (*(domain.name for domain in self.domains), "mean", "above the mixture", "seconds to make")
        rows = []
        mixture = next(row for row in self.rows if row.name == "mixture")
        for row in self.rows:
            losses = [f"{loss:.4f}" for loss in (*row.losses, row.mean)]
            seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
            rows.append((row.name, *losses, f"{row.mean - mixture.mean:+.4f}", seconds))
        return make_table("Held-out loss per token (nats)", ("model",), right, rows, title_justify="left")
