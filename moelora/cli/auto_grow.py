"""`moelora train --grow auto`: add experts for texts that are new to the mixture, else let fitting ones learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import count_experts
from ..console import console
from ..data.preparation import DomainBlocks, split_documents
from ..data.sources import check_domain
from ..experts.domains import alone
from ..experts.novelty_score import FEWEST, Novelty, measure, novelty
from ..recipe import DomainOptions, Recipe
from ..schema import UserError, telling_user
from ..storage.run_record import learned_domains
from .grow import Growth
from .grow_from import OldMixture
from .novelty import sample
from .operation import Plan

TEXTS = 32
"""So many of every domain, known or in the recipe, are looked at."""
FIRES_AT = 0.5
"""Share of a recipe's texts that have to be new for it to be a new domain; of known texts one in twenty is."""
_IN_ANY_CASE = "give its folder to --grow to add experts in any case"


@dataclass
class AutoGrowth(Growth):
    """A [`Growth`] that adds experts only if the recipe's texts are new to the mixture."""

    learns: str = field(default="", init=False)  # the adapter that learns
    verdict: dict[str, Any] = field(default_factory=dict, init=False)

    def check(self) -> None:
        """See [`Growth`]; the documents that were held out of what the mixture knows have to be there, and enough.

        Raises:
            UserError: they cannot be read, or are too few to tell what is new.
        """
        if not isinstance(self.old, OldMixture):
            raise UserError(f"--grow auto: {self.old.source} is a plain LoRA, whose texts nobody knows; {_IN_ANY_CASE}")
        domains = known_domains(self.old.folder)
        if problems := [problem for domain in domains for problem in check_domain(domain, domain.name)]:
            cannot = f"--grow auto: the texts that {self.old.folder} was trained on cannot be read; {_IN_ANY_CASE}"
            raise UserError("\n  ".join([cannot, *map(str, problems)]))
        count = sum(min(len(documents), TEXTS) for documents in held_out(self.old.folder))
        if count < FEWEST:
            raise UserError(
                f"--grow auto: of the texts that {self.old.folder} was trained on {count} were held out, and fewer "
                f"than {FEWEST} do not tell what is new; {_IN_ANY_CASE}"
            )

    def build(
        self, base: PreTrainedModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, domains: Sequence[DomainBlocks]
    ) -> PeftModel:
        """The mixture with the adapter that learns alone active: a new one, or the one that knows these texts best."""
        assert self.old.folder is not None  # a mixture lies in one
        model = self.load(base, recipe, tokenizer)
        new = [text for d in recipe.data for text in _texts(split_documents(d)[0], recipe, tokenizer)]
        known = [text for documents in held_out(self.old.folder) for text in _texts(documents, recipe, tokenizer)]
        pad = int(tokenizer.pad_token_id or 0)
        with telling_user("--grow auto: "):
            found = novelty(model, known, new, pad=pad)
        self.verdict = _verdict(found)
        if found.share_new >= FIRES_AT:
            self.learns = self.name
            self.add(model, recipe, tokenizer, domains)
            experts = count_experts(self.name, model.peft_config[self.name])
            outcome = f"{self.name} is added for them, with {experts} experts"
        else:
            self.learns = min(self.old_names, key=lambda name: _loss_under(model, name, new, pad))
            model.set_adapter([self.learns])
            outcome = f"nothing is added; the experts of {self.learns}, which knows them best, learn on"
        new_texts = f"{int(found.is_new.sum())} of {len(new)} texts are new to the mixture"
        console.print(f"Novelty: {new_texts} (score above {found.threshold:.2f}): {outcome}", soft_wrap=True)
        return model

    def finish(self, model: PeftModel) -> None:
        """As when growing; an adapter that learned on keeps its domain statistics."""
        if self.learns == self.name:
            super().finish(model)
        else:
            model.set_adapter(self.old_names)
            self.measure_kept(model)

    def describe(self) -> dict[str, Any]:
        """For run.json."""
        grown = self.name if self.learns == self.name else None
        return super().describe() | {"grown_adapter": grown, "learned": self.learns, "novelty": self.verdict}

    def plan(self, recipe: Recipe) -> Plan:
        """What may be trained; the texts decide, once the model is loaded."""
        plan = super().plan(recipe)
        note = (
            f"{self.name} is added only if half of the texts or more are new to the mixture; else the adapter that "
            "knows them best learns on, and nothing is added."
        )
        return Plan(plan.title + ", if its texts are new", plan.columns, plan.rows, [note, *plan.notes])


def known_domains(folder: Path) -> list[DomainOptions]:
    """The domains that a mixture was trained on."""
    learned = learned_domains(folder)
    if not learned:
        raise UserError(
            f"--grow auto: no run.json or operation.json in {folder} tells which texts the mixture knows; "
            f"{_IN_ANY_CASE}"
        )
    return [DomainOptions(**domain) for domain in learned]


def held_out(folder: Path) -> list[datasets.Dataset]:
    """The documents that were held out of each of the domains that a mixture was trained on."""
    return [split_documents(domain)[1] for domain in known_domains(folder)]


def _texts(documents: Any, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return sample(documents["document"][:], tokenizer, TEXTS, recipe.block_size)


def _verdict(found: Novelty) -> dict[str, Any]:
    mean = {found.number: float(found.scores.mean())}
    return {"share_new": found.share_new, "threshold": found.threshold, "mean_z_scores": mean}


def _loss_under(model: PeftModel, name: str, texts: list[list[int]], pad: int) -> float:
    with alone(model, name):
        return float(measure(model, texts, pad=pad, number="loss")[1].mean())
