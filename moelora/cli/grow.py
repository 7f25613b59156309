"""Learn one domain after another: `moelora train --grow ADAPTER recipe.yaml`.

Each domain gets experts of its own. They learn alone, as if the others were not there, so the others cannot suffer;
then the new adapter keeps statistics of what its routers read, and the classifier between adapters is solved anew
(`moelora/routing/domain_classifier.py`).
"""

from __future__ import annotations

import json
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
from ..experts.domains import learn_domain
from ..experts.growth import free_name, grow
from ..files.opening import expand_user, real_path
from ..recipe import DomainOptions, ModelOptions, Recipe
from ..schema import UserError
from ..storage.mixture_files import StoredAdapter, check_fit, read_mixture
from ..storage.run_record import LEARNED_BEFORE, learned_domains, read_record
from ..training.load import NOT_IN_MIXTURE, load_recipe
from ..training.run import Start
from .operation import Plan, shown

BATCH = 8
_LEARN_DOMAIN = "call `moelora.experts.learn_domain` with texts of it, and save the mixture"


def read_growing(folder: str | Path) -> tuple[Path, list[StoredAdapter]]:
    """The mixture that is to grow, as it lies on disk: its folder and its active adapters."""
    path = real_path(expand_user(folder))
    adapters = [adapter for adapter in read_mixture(path) if adapter.position is not None]
    if adapters[0].config.router_kind.is_constant:
        raise UserError(
            f"{path}: router_type='fixed' weighs experts alike for every text; a mixture that grows has to route"
        )
    without = [adapter.name for adapter in adapters if not adapter.config.router_memory]
    if without and (len(adapters) > 1 or read_record(path) is None):
        several = "run.json does not tell its texts from those of the others"
        why = several if len(adapters) > 1 else "without run.json its texts are not known"
        raise UserError(f"{path}: adapter {without[0]!r} has no domain statistics, and {why}; {_LEARN_DOMAIN}")
    return path, adapters


def inherited(config: MoELoraConfig) -> dict[str, Any]:
    """The settings of a mixture that new experts share or start from, as a recipe would say them."""
    plain = json.loads(json.dumps(config.to_dict(), default=sorted))
    default = MoELoraConfig()
    own = {"single_expert", *NOT_IN_MIXTURE}  # new experts are trained, not imported
    return {
        name: value
        for name, value in plain.items()
        if name not in own and (name in SHARED_FIELDS or value != getattr(default, name, None))
    }


def load_growing(
    recipe_path: str,
    adapter: str,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    kind: type[Growth] | None = None,
) -> tuple[Growth, Recipe]:
    """Read and check a recipe for experts that join the mixture in a folder.

    Args:
        kind: the class of job; [`Growth`] by default.
    """
    folder, stored = read_growing(adapter)
    recipe = load_recipe(
        recipe_path, overrides, resume=resume, overwrite=overwrite, inherited=inherited(stored[0].config)
    )
    out = real_path(recipe.output_dir)
    if out == folder or (overwrite and out in folder.parents):
        what = "is the adapter that grows" if out == folder else f"holds {folder}, which is only read"
        raise UserError(f"training.output_dir = {str(out)!r}\n    {what}; give another folder")
    check_fit(stored, recipe.model, folder)
    names = [adapter.name for adapter in read_mixture(folder)]
    growth = (kind or Growth)(folder, free_name(names), stored)
    growth.check()
    return growth, recipe


@dataclass
class Growth(Start):
    """A job that starts from a mixture and adds an adapter for the recipe's data.

    Args:
        folder: of the mixture; it is only read.
        name: of the new adapter.
        stored: the mixture's active adapters as they lie on disk.
    """

    folder: Path
    name: str
    stored: list[StoredAdapter]
    tokens: dict[str, int] = field(default_factory=dict)  # that domain statistics were just computed from, by adapter
    _texts: DataLoader | None = None

    def check(self) -> None:
        """Refuse what cannot work, as far as files tell; nothing more than [`load_growing`] does by itself."""

    @property
    def old(self) -> list[str]:
        """Names of the adapters that are there."""
        return [adapter.name for adapter in self.stored]

    def build(
        self, base: PreTrainedModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, domains: Sequence[DomainBlocks]
    ) -> PeftModel:
        """The mixture with a new adapter, which alone is active while it learns."""
        model = self.load(base, recipe, tokenizer)
        self.add(model, recipe, tokenizer, domains)
        return model

    def load(self, base: PreTrainedModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
        """The mixture on its device, its adapters with statistics of their domains."""
        model = PeftModel.from_pretrained(base, str(self.folder))
        model.to(TrainingArguments(**recipe.training).device)
        for name in self.old:
            if not model.peft_config[name].router_memory:
                self._learn_domain_of(model, name, tokenizer)
        return model

    def add(
        self, model: PeftModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, domains: Sequence[DomainBlocks]
    ) -> None:
        """Add the new adapter and let it learn alone."""
        shared = {"task_type", *SHARED_FIELDS}
        changes = {name: value for name, value in recipe.mixture.items() if name not in shared}
        grow(model, name=self.name, **changes)
        model.set_adapter([self.name])
        self._texts = texts(domains, recipe.seed, tokenizer)

    def _learn_domain_of(self, model: PeftModel, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give an adapter the statistics of its domain, from the texts that its own run names."""
        recipe = recorded_recipe(self.folder)
        console.print(
            f"Reading what {printable(self.folder.name)} was trained on, for its domain statistics", soft_wrap=True
        )
        try:
            domains = load_domains(recipe, tokenizer)
        except (UserError, OSError, ValueError) as error:
            raise UserError(
                f"{self.folder}: adapter {name!r} has no domain statistics, and the texts that run.json names "
                f"cannot be read ({error}); {_LEARN_DOMAIN}"
            ) from error
        self.tokens[name] = learn_domain(model, name, texts(domains, recipe.seed, tokenizer))

    def finish(self, model: PeftModel) -> None:
        """Give the new adapter the statistics of its domain; all adapters together form the mixture."""
        assert self._texts is not None
        self.tokens[self.name] = learn_domain(model, self.name, self._texts)
        model.set_adapter([*self.old, self.name])

    def describe(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "grown_from": str(self.folder),
            "grown_adapter": self.name,
            LEARNED_BEFORE: learned_domains(self.folder),
        }

    def plan(self, recipe: Recipe) -> Plan:
        """What will be trained and what stays."""
        rows = [
            (
                adapter.name,
                str(adapter.num_experts),
                "unchanged",
                "yes" if adapter.config.router_memory else "will be computed",
            )
            for adapter in self.stored
        ]
        new = MoELoraConfig(**recipe.mixture)
        domains = ", ".join(domain.name for domain in recipe.data)
        return Plan(
            f"Grow {shown(self.folder)} by an adapter for {domains}",
            ("adapter", "experts", "training", "domain statistics"),
            [*rows, (self.name, str(count_experts(self.name, new)), f"learns alone, r={new.r}", "after training")],
            [f"The result goes to {shown(recipe.output_dir)}; {shown(self.folder)} is only read."],
        )


def recorded_recipe(folder: Path) -> Recipe:
    """The recipe of the run that made an adapter, from its run.json."""
    record = read_record(folder)
    assert record is not None
    raw = dict(record["recipe"])
    raw["model"] = ModelOptions(**raw["model"])
    raw["data"] = tuple(DomainOptions(**domain) for domain in raw["data"])
    return Recipe(**raw)


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
