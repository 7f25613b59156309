"""Train the routers of a mixture and nothing else: its experts stay, to the last bit, what they were."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer, set_seed

from ..data.preparation import DomainBlocks, count_tokens, load_domains
from ..recipe import DomainOptions, ModelOptions, Recipe
from ..tuner.router import MoELoraRouter
from .arguments import training_arguments
from .evaluate import DomainResult, check_converged, evaluate
from .run import new_trainer


@dataclass(frozen=True, kw_only=True)
class RouterTraining:
    """How long and how fast routers learn."""

    steps: int = 100
    batch_size: int = 8
    block_size: int = 128
    learning_rate: float = 1e-3
    max_eval_blocks: int = 16
    seed: int = 42


def train_router(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: Sequence[DomainOptions],
    training: RouterTraining | None = None,
) -> dict[str, dict[str, float]]:
    """Train the active adapters' routers with the Trainer; all else is frozen, then and afterwards.

    With `router_type="learned_with_maturity"` every expert acts on every token at first and becomes
    sparse half way, by the tokens it has had; at the end all are mature.

    Returns:
        Held-out loss before and after, by domain.

    Raises:
        ValueError: the mixture has no router parameters.
        UserError: a domain has too little text, or training diverged.
    """
    training = training or RouterTraining()
    routers = [module for module in model.modules() if isinstance(module, MoELoraRouter)]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    learned = [
        parameter for router in routers for scorer in router.active_routers() for parameter in scorer.parameters()
    ]
    if not learned:
        raise ValueError('nothing to train: the routers are fixed; make the mixture with router="train"')
    with tempfile.TemporaryDirectory() as folder:
        trainer, blocks = _prepare(model, tokenizer, domains, training, folder)
        before = evaluate(model, blocks, trainer.data_collator, training.batch_size, "Before")
        for parameter in learned:
            parameter.requires_grad_(True)
        tokens_per_block = count_tokens(trainer.train_dataset) / len(trainer.train_dataset)
        with _maturing_half_way(model, training, tokens_per_block):
            trainer.train()
    for parameter in learned:
        parameter.requires_grad_(False)
    for name in model.active_adapters:
        model.set_expert_maturity(name, 1.0)
    after = evaluate(model.eval(), blocks, trainer.data_collator, training.batch_size, "After")
    check_converged(after, f"lower the learning rate ({training.learning_rate:g})")
    return {name: _losses(before[name], after[name]) for name in before}


def _losses(before: DomainResult, after: DomainResult) -> dict[str, float]:
    return {"loss_before": before.loss, "loss_after": after.loss}


def _prepare(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: Sequence[DomainOptions],
    training: RouterTraining,
    folder: str,
) -> tuple[Trainer, list[DomainBlocks]]:
    recipe = Recipe(
        model=ModelOptions(name=""),
        data=tuple(domains),
        block_size=training.block_size,
        max_eval_blocks=training.max_eval_blocks,
        training={"output_dir": folder},
        seed=training.seed,
    )
    blocks = load_domains(recipe, tokenizer)
    arguments = training_arguments(
        output_dir=folder,
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        warmup_steps=training.steps // 10,
        save_strategy="no",
        logging_steps=max(1, training.steps // 10),
        report_to="none",
        seed=training.seed,
    )
    set_seed(training.seed)
    return new_trainer(model, arguments, blocks, tokenizer, training.seed), blocks


@contextmanager
def _maturing_half_way(model: PeftModel, training: RouterTraining, tokens_per_block: float) -> Iterator[None]:
    """Within, `maturity_tokens` fits this training; the mixture's own is for experts that join it later."""
    tokens = training.steps * training.batch_size * tokens_per_block
    per_expert = max(1, int(tokens / (2 * len(model.active_adapters))))
    configs = [model.peft_config[name] for name in model.active_adapters]
    own = [config.maturity_tokens for config in configs]
    for config in configs:
        config.maturity_tokens = per_expert
    try:
        yield
    finally:
        for config, maturity_tokens in zip(configs, own, strict=True):
            config.maturity_tokens = maturity_tokens
