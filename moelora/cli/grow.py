"""Learn one domain after another: `moelora train --grow ADAPTER recipe.yaml`.

Each domain gets experts of its own. They learn alone, as if the others were not there, so the others cannot suffer;
then the new adapter keeps statistics of what its routers read, and the classifier between adapters is solved anew
(`moelora/routing/domain_classifier.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ..config import SHARED_FIELDS, MoELoraConfig, count_experts
from ..console import console, printable
from ..data.preparation import DomainBlocks, load_domains, mix
from ..experts.consolidate import Merge, consolidate
from ..experts.domains import knows_domain, learn_domain
from ..experts.growth import free_name, grow
from ..experts.warm_start import NEAREST, NEW, Nearest, nearest_adapter
from ..files.opening import real_path
from ..recipe import Recipe
from ..schema import Problem, UserError, did_you_mean, telling_user
from ..storage.run_record import LEARNED_BEFORE
from ..training.load import load_recipe
from ..training.run import Start
from ..training.summary import OLD_DOMAINS
from .grow_from import Old, old_recipe, read_old
from .kept_skill import KeptSkill
from .operation import Plan, shown

BATCH = 8


def load_growing(
    recipe_path: str,
    source: str,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    kind: type[Growth] | None = None,
    max_experts: int | None = None,
) -> tuple[Growth, Recipe]:
    """Read and check a recipe for experts that join a mixture in a folder, or a plain LoRA.

    Args:
        kind: the class of job; [`Growth`] by default.
        max_experts: of the grown mixture; old ones are merged where it would have more.
    """
    old = read_old(source)
    recipe = load_recipe(recipe_path, overrides, resume=resume, overwrite=overwrite, inherited=old.inherited())
    out, folder = real_path(recipe.output_dir), old.folder
    if folder is not None and (out == folder or (overwrite and out in folder.parents)):
        what = "is the adapter that grows" if out == folder else f"holds {folder}, which is only read"
        raise UserError(f"training.output_dir = {str(out)!r}\n    {what}; give another folder")
    old.check(recipe)
    _check_start(recipe.start_from, [row.name for row in old.rows])
    budget = None if max_experts is None else _left_for_old(max_experts, recipe)
    growth = (kind or Growth)(old, free_name(old.taken), budget)
    growth.check()
    return growth, recipe


def _left_for_old(max_experts: int, recipe: Recipe) -> int:
    """How many experts the old adapters may have beside the new one."""
    new = count_experts("", MoELoraConfig(**recipe.mixture))
    if max_experts <= new:
        fix = f"the new adapter alone has {new} experts (mixture.num_experts); give {new + 1} or more"
        raise UserError(str(Problem("--max-experts", max_experts, fix)))
    return max_experts - new


def _check_start(start_from: str, names: Sequence[str]) -> None:
    known = (NEW, NEAREST, *names)
    if start_from not in known:
        fix = f"must be one of {', '.join(known)}{did_you_mean(start_from, known)}"
        raise UserError(str(Problem("start_from", start_from, fix)))


@dataclass
class Growth(Start):
    """A job that starts from what was learned before and adds an adapter for the recipe's data.

    Args:
        old: what was learned before; it is only read.
        name: of the new adapter.
        budget: most experts that the old adapters may have; None: as many as there are.
    """

    old: Old
    name: str
    budget: int | None = None
    tokens: dict[str, int] = field(default_factory=dict)  # that domain statistics were just computed from, by adapter
    merges: list[Merge] = field(default_factory=list)  # of old experts, in order
    start: Nearest | None = None  # where the new experts began, once they are there
    _texts: DataLoader | None = None
    _kept: KeptSkill | None = None

    def check(self) -> None:
        """Refuse what cannot work, as far as files tell; nothing more than [`load_growing`] does by itself."""

    def __post_init__(self) -> None:
        self.old_names = [row.name for row in self.old.rows]  # of the adapters that go on

    @property
    def is_over_budget(self) -> bool:
        """Whether old experts are to be merged."""
        return self.budget is not None and sum(row.num_experts for row in self.old.rows) > self.budget

    def build(
        self, base: PreTrainedModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, domains: Sequence[DomainBlocks]
    ) -> PeftModel:
        """The mixture with a new adapter, which alone is active while it learns."""
        model = self.load(base, recipe, tokenizer)
        self.add(model, recipe, tokenizer, domains)
        return model

    def load(self, base: PreTrainedModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
        """The mixture on its device, its adapters with statistics of their domains."""
        model = self.old.open(base, recipe)
        arguments = TrainingArguments(**recipe.training)
        model.to(arguments.device)
        without = [name for name in self.old_names if not knows_domain(model, name)]
        blocks = self._read_old_texts(recipe, tokenizer) if without or recipe.old_data else []
        if recipe.old_data:
            self._kept = KeptSkill(recipe.old_data, blocks, DataCollatorForSeq2Seq(tokenizer), arguments)
            self._kept.measure(model, "before")
        for name in without:
            self.tokens[name] = learn_domain(model, name, texts(blocks, recipe.seed, tokenizer))
        return self._consolidated(model) if self.is_over_budget else model

    def _consolidated(self, model: PeftModel) -> PeftModel:
        """The mixture with as many experts as may be, and what was merged told."""
        assert self.budget is not None
        with telling_user("--max-experts: "):
            found = consolidate(model, self.budget)
        self.merges = found.merges
        self.old_names = list(found.model.active_adapters)
        for merge in found.merges:
            console.print(printable(f"Merged: {merge}"), soft_wrap=True)
        if self._kept is not None:
            self._kept.measure(found.model, "merged")
        return found.model

    def _read_old_texts(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[DomainBlocks]:
        read = old_recipe(self.old, recipe)
        assert read is not None  # the checks have seen to that
        what = printable(Path(self.old.source).name)
        console.print(f"Reading what {what} was trained on", soft_wrap=True)
        try:
            return load_domains(read, tokenizer)
        except (UserError, OSError, ValueError) as error:
            if recipe.old_data:
                raise
            raise UserError(
                f"{self.old.source}: an adapter has no domain statistics, and the texts that run.json names cannot be "
                f"read ({error}); name others in the recipe as `old_data`"
            ) from error

    def add(
        self, model: PeftModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, domains: Sequence[DomainBlocks]
    ) -> None:
        """Add the new adapter and let it learn alone."""
        apart = {"task_type", "num_experts", *SHARED_FIELDS}
        changes = {name: value for name, value in recipe.mixture.items() if name not in apart}
        self.start = self._start(model, recipe, tokenizer, domains)
        number = count_experts(self.name, MoELoraConfig(**recipe.mixture))
        with telling_user():
            grow(model, number, name=self.name, start_from=self.start.start_from, **changes)
        model.set_adapter([self.name])
        self._texts = texts(domains, recipe.seed, tokenizer)

    def _start(
        self, model: PeftModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, domains: Sequence[DomainBlocks]
    ) -> Nearest:
        """Where the new experts begin, with the losses that say so where the recipe leaves it to them."""
        if recipe.start_from != NEAREST:
            return Nearest(recipe.start_from, math.nan, {})
        found = nearest_adapter(model, texts(domains, recipe.seed, tokenizer))
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in found.losses.items())
        begin = "begin as new ones" if found.start_from == NEW else f"begin as copies of those of {found.start_from}"
        told = f"Loss on the first new texts: base model {found.base_loss:.3f}, {losses}; the new experts {begin}"
        console.print(printable(told), soft_wrap=True)
        return found

    def finish(self, model: PeftModel) -> None:
        """Give the new adapter the statistics of its domain; all adapters together form the mixture."""
        assert self._texts is not None
        self.tokens[self.name] = learn_domain(model, self.name, self._texts)
        model.set_adapter([*self.old_names, self.name])
        self.measure_kept(model)

    def measure_kept(self, model: PeftModel) -> None:
        """Measure what the recipe names of the old texts again."""
        if self._kept is not None:
            self._kept.measure(model, "after")

    def describe(self) -> dict[str, Any]:
        """For run.json."""
        named = [] if self._kept is None else [dataclasses.asdict(domain) for domain in self._kept.domains]
        return {
            "grown_from": self.old.source,
            "grown_adapter": self.name,
            "merged": [dataclasses.asdict(merge) for merge in self.merges],
            "start": None if self.start is None else dataclasses.asdict(self.start),
            LEARNED_BEFORE: self.old.learned() or named,
        }

    def outcome(self) -> dict[str, Any]:
        """For run.json, after training."""
        return {} if self._kept is None else {OLD_DOMAINS: self._kept.losses}

    def plan(self, recipe: Recipe) -> Plan:
        """What will be trained and what stays."""
        fate = "may be merged" if self.is_over_budget else "unchanged"
        rows = [
            (row.name, str(row.num_experts), fate, "yes" if row.knows_domain else "will be computed")
            for row in self.old.rows
        ]
        new = MoELoraConfig(**recipe.mixture)
        domains = ", ".join(domain.name for domain in recipe.data)
        source = shown(Path(self.old.source))
        return Plan(
            f"Grow {source} by an adapter for {domains}",
            ("adapter", "experts", "training", "domain statistics"),
            [
                *rows,
                (self.name, str(count_experts(self.name, new)), f"learns alone, r={new.r}", "after training"),
            ],
            [
                *self.old.notes(recipe),
                *_start_notes(recipe.start_from),
                *self._budget_notes(),
                f"The result goes to {shown(recipe.output_dir)}; {source} is only read.",
            ],
        )

    def _budget_notes(self) -> list[str]:
        if not self.is_over_budget:
            return []
        count = sum(row.num_experts for row in self.old.rows)
        return [
            f"The {count} old experts are merged into {self.budget} first, where domain statistics tell least loss."
        ]


def _start_notes(start_from: str) -> list[str]:
    whose = "the adapter with the least loss on the new texts" if start_from == NEAREST else start_from
    return [] if start_from == NEW else [f"The new experts begin as copies of the experts of {whose}."]


def texts(domains: Sequence[DomainBlocks], seed: int, tokenizer: PreTrainedTokenizerBase) -> DataLoader:
    """Batches of training blocks in random order, the domains in the proportions they are trained in."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        mix(domains, seed),
        batch_size=BATCH,
        shuffle=True,
        generator=generator,
        collate_fn=DataCollatorForSeq2Seq(tokenizer),
    )
