"""The main job: fine-tune a causal language model with a mixture of LoRA experts, and measure what it learned."""

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ..config import MoELoraConfig
from ..console import console, is_main_process, printable
from ..data.preparation import DomainBlocks, load_domains, mix
from ..files.adapter_files import checkpoint_in
from ..files.staging import holds_something, next_kept_place, only_process_in
from ..recipe import Recipe
from ..schema import Problem, UserError, refuse
from ..storage.base_model import load_model, load_tokenizer
from ..storage.run_record import RUN_FILE, check_output_dir, environment, now, read_record, write_json
from ..storage.trainer_checkpoints import has_all_steps, last_checkpoint, last_whole_checkpoint, what_it_lacks
from .arguments import training_arguments
from .callback import MoELoraCallback
from .evaluate import DomainResult, check_converged, evaluate
from .references import keep_references


class Start:
    """What a job starts from: a new mixture. `moelora.cli.grow` starts from one that is there."""

    def build(
        self, base: PreTrainedModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, domains: Sequence[DomainBlocks]
    ) -> PeftModel:
        """The model to train; base lies on the CPU still."""
        return get_peft_model(base, MoELoraConfig(**recipe.mixture))

    def finish(self, model: PeftModel) -> None:
        """What is to be done with the trained model before it is saved."""

    def describe(self) -> dict[str, Any]:
        """What run.json is to say about it."""
        return {}

    def outcome(self) -> dict[str, Any]:
        """What run.json is to say about it once training is over."""
        return {}


def train(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, start: Start | None = None
) -> dict[str, Any]:
    """Run a checked recipe and save the adapter with its run.json in the recipe's output folder.

    Under `accelerate launch` every process calls this; only the first writes.

    1. Read and cut the data, load the frozen model, add the mixture.
    2. Measure every domain's held-out loss without the mixture and keep it in run.json, where a resumed run finds it.
    3. Train with the Hugging Face Trainer and save the adapter.
    4. Measure again, with the mixture and each domain's expert load, and complete run.json. Keep what the mixture makes
       of some held-out texts in references.json, for `moelora verify`.

    Args:
        recipe: from `moelora.training.load_recipe`, called with the same `resume` and `overwrite`.
        resume: continue from the last checkpoint in the output folder.
        overwrite: first put the output folder aside as it is, for `moelora undo` to bring back.
        start: what to start from; a new mixture by default.

    Returns:
        The content of run.json.

    Raises:
        UserError: the data is too small, is not the data that a resumed run began with, another process trains into
            the same folder, or training diverged, which run.json then shows.
    """
    seconds: dict[str, float] = {}
    start = start or Start()
    with _timed(seconds, "load"):
        trainer, domains = _prepare(recipe, start)
    with _alone_in_output_dir(recipe, resume=resume, overwrite=overwrite), _telling_how_to_go_on(recipe.output_dir):
        return _train(recipe, trainer, domains, start, seconds, resume)


def _train(
    recipe: Recipe,
    trainer: Trainer,
    domains: Sequence[DomainBlocks],
    start: Start,
    seconds: dict[str, float],
    resume: bool,
) -> dict[str, Any]:
    """Steps 2 to 4 of [`train`]."""
    run_file = recipe.output_dir / RUN_FILE
    if resume:
        record, checkpoint = _resumed_record(recipe, domains), _checkpoint_to_go_on_from(recipe.output_dir)
    else:
        record, checkpoint = _new_record(recipe, trainer, domains) | start.describe(), None
        trainer.add_callback(_AtStart(lambda: _measure_before(trainer, domains, record, seconds, run_file)))
    _write(run_file, record)
    complete = checkpoint if checkpoint and has_all_steps(recipe, checkpoint) else None
    if complete:
        console.print(f"{complete.name} has all steps: nothing is left to train")
        _make_no_step(trainer.args)
    with _timed(seconds, "train"):
        outcome = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        start.finish(trainer.model)
        trainer.save_model()
    seconds["train"] = round(seconds["train"] - seconds.get("evaluate_before", 0.0), 2)
    with _timed(seconds, "evaluate_after"):
        results = _measure(trainer, domains, "After")
        if recipe.references:
            without = partial(_without_mixture, trainer.model)
            keep_references(trainer, domains, recipe.model.name, recipe.output_dir, without)
    _add_losses(record, results, "after")
    _add_expert_loads(record, results)
    record |= {
        "status": "finished",
        "finished": now(),
        "resumed_from": None if checkpoint is None else checkpoint.name,
        "steps": outcome.global_step,
        "train_loss": None if complete else outcome.training_loss,
        "maturity": _maturity(trainer.model),
        "seconds": record.get("seconds", {}) | seconds,
        "log": trainer.state.log_history,
        **start.outcome(),
    }
    _write_finished(recipe.output_dir, record, trainer)
    rate = recipe.training.get("learning_rate", TrainingArguments.learning_rate)
    useless = f"the adapter in {recipe.output_dir} is of no use"
    check_converged(results, f"lower training.learning_rate ({rate:g}); {useless}")
    return record


def _checkpoint_to_go_on_from(folder: Path) -> Path:
    """The newest whole checkpoint, of which there is one; what is wrong with it and with newer ones is printed."""
    checkpoint, damaged = last_whole_checkpoint(folder)
    assert checkpoint is not None  # the recipe's check has seen to that
    for problem in [*(f"{each}; it is passed over" for each in damaged), *what_it_lacks(checkpoint)]:
        console.print(printable(problem), soft_wrap=True)
    return checkpoint


def _make_no_step(arguments: TrainingArguments) -> None:
    """Let the Trainer load a checkpoint and leave it at that; by the recipe's own numbers it would make one step."""
    arguments.max_steps, arguments.num_train_epochs = -1, 0
    arguments.warmup_steps = 1  # else the polynomial schedule divides by its length, which is 0


@contextmanager
def _alone_in_output_dir(recipe: Recipe, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Keep other processes out of the output folder, which one may have written to since the recipe was checked."""
    with ExitStack() as stack:
        if is_main_process:
            _hold(recipe.output_dir, stack)
            refuse(check_output_dir(recipe, resume=resume, overwrite=overwrite))
            if overwrite and holds_something(recipe.output_dir):
                _put_aside(recipe.output_dir)
                _hold(recipe.output_dir, stack)
        yield


@contextmanager
def _telling_how_to_go_on(folder: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        if checkpoint := last_checkpoint(folder):
            error.add_note(f"--resume continues from {checkpoint.name}")
        raise


def _hold(folder: Path, stack: ExitStack) -> None:
    try:
        stack.enter_context(only_process_in(folder))
    except BlockingIOError:
        fix = "another process is training into it; wait for it, or give another folder"
        raise UserError(str(Problem("training.output_dir", str(folder), fix))) from None


def _put_aside(folder: Path) -> None:
    backup = next_kept_place(folder, "backup")
    try:
        folder.rename(backup)
    except OSError as error:
        fix = f"cannot be put aside ({error.strerror}); give another folder"
        raise UserError(str(Problem("training.output_dir", str(folder), fix))) from error
    where, undo = printable(backup), printable(shlex.join(["moelora", "undo", str(folder)]))
    console.print(f"Kept what was there in {where}; to bring it back: {undo}", soft_wrap=True)


def _write(path: Path, record: dict[str, Any]) -> None:
    if is_main_process:
        write_json(path, record)


def _write_finished(folder: Path, record: dict[str, Any], trainer: Trainer) -> None:
    """Complete run.json, which names the save that it measured, and the model card, which shows its losses."""
    if is_main_process:
        record["save"] = checkpoint_in(folder).get("id")
        write_json(folder / RUN_FILE, record)
        trainer.accelerator.unwrap_model(trainer.model).create_or_update_model_card(str(folder))


def _prepare(recipe: Recipe, start: Start) -> tuple[Trainer, list[DomainBlocks]]:
    """Everything up to the first measurement: data, model, mixture, Trainer."""
    console.print(f"Loading the tokenizer and {len(recipe.data)} domains")
    tokenizer = load_tokenizer(recipe.model)
    domains = load_domains(recipe, tokenizer)
    arguments = training_arguments(**recipe.training)
    if arguments.use_liger_kernel:
        off = [name for name, is_on in (arguments.liger_kernel_config or {}).items() if not is_on]
        left_out = f" except {', '.join(off)}" if off else ""
        console.print(f"Training with Liger's kernels{left_out}; without: `--set training.use_liger_kernel=false`")
    console.print(f"Loading {printable(recipe.model.name)}", soft_wrap=True)
    set_seed(recipe.seed)
    model = start.build(load_model(recipe.model, arguments.device), recipe, tokenizer, domains)
    return new_trainer(model, arguments, domains, tokenizer, recipe.seed), domains


def new_trainer(
    model: PeftModel,
    arguments: TrainingArguments,
    domains: Sequence[DomainBlocks],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> Trainer:
    """A Trainer that learns the domains, mixed by the seed, and logs what the routers do."""
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=mix(domains, seed),
        eval_dataset={domain.name: domain.held_out for domain in domains},
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[MoELoraCallback()],
    )


class _AtStart(TrainerCallback):
    """Calls a function when training begins: only from then on does a model run whose engine shards it."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        self.function()


def _measure_before(
    trainer: Trainer,
    domains: Sequence[DomainBlocks],
    record: dict[str, Any],
    seconds: dict[str, float],
    run_file: Path,
) -> None:
    with _timed(seconds, "evaluate_before"), _without_mixture(trainer.model):
        _add_losses(record, _measure(trainer, domains, "Before"), "before")
    _write(run_file, record)


@contextmanager
def _without_mixture(model: PeftModel) -> Iterator[None]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with model.disable_adapter():
        for parameter in trainable:  # FSDP2 learns in the first forward what is trained, and in which precision
            parameter.requires_grad_(True)
        yield


def _measure(trainer: Trainer, domains: Sequence[DomainBlocks], title: str) -> dict[str, DomainResult]:
    return evaluate(trainer.model, domains, trainer.data_collator, trainer.args.eval_batch_size, title)


def _new_record(recipe: Recipe, trainer: Trainer, domains: Sequence[DomainBlocks]) -> dict[str, Any]:
    trainable, total = trainer.model.get_nb_trainable_parameters()
    return {
        "status": "training",
        "started": now(),
        "recipe": recipe.as_dict(),
        "environment": environment(),
        "device": str(trainer.args.device),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "domains": {domain.name: domain.sizes() for domain in domains},
        "seconds": {},
    }


def _resumed_record(recipe: Recipe, domains: Sequence[DomainBlocks]) -> dict[str, Any]:
    record = read_record(recipe.output_dir) or {}
    for domain in domains:
        noted = record["domains"].get(domain.name, {})
        stored = {name: noted.get(name) for name in domain.sizes()}
        if stored != domain.sizes():
            raise UserError(
                f"data.{domain.name}: the data changed since the run began (it was {stored}, it is {domain.sizes()}); "
                "restore it, or start over with --overwrite"
            )
        for lost in {"loss_before", "perplexity_before"} - noted.keys():
            noted[lost] = None
    return record | {"status": "training", "recipe": recipe.as_dict(), "environment": environment()}


def _add_losses(record: dict[str, Any], results: dict[str, DomainResult], when: str) -> None:
    for name, result in results.items():
        record["domains"][name] |= {f"loss_{when}": result.loss, f"perplexity_{when}": result.perplexity}


def _add_expert_loads(record: dict[str, Any], results: dict[str, DomainResult]) -> None:
    for name, result in results.items():
        record["domains"][name] |= {
            "expert_load": result.expert_load,
            "expert_load_by_router": result.expert_load_by_router,
        }


def _maturity(model: PeftModel) -> list[float] | None:
    return model.expert_maturity.tolist() if model.routing_or_none is not None else None


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 2)
