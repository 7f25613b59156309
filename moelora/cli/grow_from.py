"""What a run that grows starts from, as it lies on disk: a mixture, or a plain LoRA, which becomes one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from peft import PeftModel
from transformers import PreTrainedModel

from ..config import SHARED_FIELDS, MoELoraConfig
from ..experts.growth import template
from ..experts.importing import check_fits, check_names, expert_config, mixture_from_lora
from ..files.opening import expand_user, real_path
from ..recipe import DomainOptions, ModelOptions, Recipe
from ..schema import Problem, UserError
from ..storage.base_model import empty_model, load_config
from ..storage.lora_file import LoraFile, is_mixture, read_config, read_lora
from ..storage.mixture_files import CONFIG_FILE, StoredAdapter, check_fit, read_mixture
from ..storage.run_record import learned_domains, read_record
from ..training.load import NOT_IN_MIXTURE
from .operation import shown

LORA_NAME = "default"
"""What a plain LoRA is called in the mixture that it becomes, as in PEFT."""
_LEARN_DOMAIN = "call `moelora.experts.learn_domain` with texts of it, and save the mixture"


@dataclass(frozen=True)
class Row:
    """An old adapter: its name, its number of experts, whether it has statistics of its domain."""

    name: str
    num_experts: int
    knows_domain: bool


class Old(Protocol):
    """What was learned before.

    Attributes:
        folder: where it lies; None for what came from the hub.
    """

    @property
    def source(self) -> str:
        """What it is called in messages and run.json."""

    @property
    def folder(self) -> Path | None: ...

    @property
    def rows(self) -> list[Row]:
        """The adapters that go on, in expert order."""

    @property
    def taken(self) -> list[str]:
        """Names that a new adapter cannot have."""

    def inherited(self) -> dict[str, Any]:
        """The settings that new experts share or start from, as a recipe would say them."""

    def check(self, recipe: Recipe) -> None:
        """Refuse what a checked recipe does not fit, or does not say enough for; nothing is loaded.

        Raises:
            UserError: telling what.
        """

    def open(self, base: PreTrainedModel, recipe: Recipe) -> PeftModel:
        """It, on its base model."""

    def notes(self, recipe: Recipe) -> list[str]:
        """What a plan is to say of it."""

    def learned(self) -> list[dict[str, Any]]:
        """Domains as recipes say them, which it is known to have learned."""


def read_old(source: str) -> Old:
    """What `--grow` names.

    Raises:
        UserError: there is nothing of the kind, it is damaged, or it cannot grow.
    """
    if not expand_user(source).is_dir():
        return OldLora(read_lora(source), None)
    folder = real_path(expand_user(source))
    if not (folder / CONFIG_FILE).is_file() or is_mixture(read_config(str(folder))):
        return _read_mixture(folder)
    return OldLora(read_lora(folder), folder)


def _read_mixture(path: Path) -> OldMixture:
    adapters = read_mixture(path)
    active = [adapter for adapter in adapters if adapter.position is not None]
    if active[0].config.router_kind.is_constant:
        raise UserError(
            f"{path}: router_type='fixed' weighs experts alike for every text; a mixture that grows has to route"
        )
    return OldMixture(path, active, [adapter.name for adapter in adapters])


@dataclass(frozen=True)
class OldMixture:
    """A mixture in a folder: its active adapters, and the names of all; see [`Old`]."""

    folder: Path
    stored: list[StoredAdapter]
    taken: list[str]

    @property
    def source(self) -> str:
        """See [`Old`]."""
        return str(self.folder)

    @property
    def rows(self) -> list[Row]:
        """See [`Old`]."""
        return [Row(each.name, each.num_experts, each.config.router_memory > 0) for each in self.stored]

    def inherited(self) -> dict[str, Any]:
        """See [`Old`]."""
        return inherited(template({adapter.name: adapter.config for adapter in self.stored}))

    def check(self, recipe: Recipe) -> None:
        """See [`Old`]: its base model, and whether texts of an adapter without domain statistics are known."""
        check_fit(self.stored, recipe.model, self.folder)
        without = [row.name for row in self.rows if not row.knows_domain]
        if not without or (len(self.rows) == 1 and old_recipe(self, recipe) is not None):
            return
        several = "nothing tells its texts from those of the others"
        name_them = "its texts are not known: name some in the recipe as `old_data`, a list like `data`"
        why = f"{several}; {_LEARN_DOMAIN}" if len(self.rows) > 1 else name_them
        raise UserError(f"{self.folder}: adapter {without[0]!r} has no domain statistics, and {why}")

    def open(self, base: PreTrainedModel, recipe: Recipe) -> PeftModel:
        """See [`Old`]."""
        return PeftModel.from_pretrained(base, str(self.folder))

    def notes(self, recipe: Recipe) -> list[str]:
        """See [`Old`]."""
        return []

    def learned(self) -> list[dict[str, Any]]:
        """See [`Old`]."""
        return learned_domains(self.folder)


@dataclass(frozen=True)
class OldLora:
    """A plain LoRA, which becomes the first adapter of a mixture, one expert; see [`Old`]."""

    lora: LoraFile
    folder: Path | None

    @property
    def source(self) -> str:
        """See [`Old`]."""
        return self.lora.source

    @property
    def rows(self) -> list[Row]:
        """See [`Old`]."""
        return [Row(LORA_NAME, 1, knows_domain=False)]

    @property
    def taken(self) -> list[str]:
        """See [`Old`]."""
        return [LORA_NAME]

    def inherited(self) -> dict[str, Any]:
        """See [`Old`]: a LoRA knows nothing of what a mixture shares, so the recipe decides that."""
        settings = inherited(expert_config(self.lora, {}))
        return {name: value for name, value in settings.items() if name not in SHARED_FIELDS}

    def check(self, recipe: Recipe) -> None:
        """See [`Old`]: its base model, whether the mixture can route, and whether its texts are known."""
        config = MoELoraConfig(**recipe.mixture)
        if config.router_kind.is_constant:
            fix = "weighs experts alike for every text; a mixture that grows has to route"
            raise UserError(str(Problem("mixture.router_type", config.router_type, fix)))
        empty = empty_model(load_config(recipe.model))
        check_names([LORA_NAME], empty)
        check_fits(self.lora, empty)
        if old_recipe(self, recipe) is None:
            raise UserError(
                f"{self.source}: a plain LoRA does not say which texts it learned, and some of them are needed, to "
                "tell such texts from the new ones: name them in the recipe as `old_data`, a list like `data`, "
                "for instance\n  old_data:\n    - {name: first, path: first.jsonl}"
            )

    def open(self, base: PreTrainedModel, recipe: Recipe) -> PeftModel:
        """See [`Old`]."""
        shared = {name: value for name, value in recipe.mixture.items() if name in SHARED_FIELDS}
        return mixture_from_lora(base, self.lora, LORA_NAME, **shared)

    def notes(self, recipe: Recipe) -> list[str]:
        """See [`Old`]."""
        noted = self.lora.config.base_model_name_or_path
        about = f"{shown(Path(self.source))} is a plain LoRA; it becomes {LORA_NAME}, one expert, as it is."
        if noted and Path(noted).name != Path(recipe.model.name).name:
            return [about, f"It notes another base model, {noted}; its linears fit this one."]
        return [about]

    def learned(self) -> list[dict[str, Any]]:
        """See [`Old`]; a run of ours with `use_moe_routing: false` tells."""
        return [] if self.folder is None or read_record(self.folder) is None else learned_domains(self.folder)


def inherited(config: MoELoraConfig) -> dict[str, Any]:
    """The settings of an adapter that new experts share or start from, as a recipe would say them."""
    plain = json.loads(json.dumps(config.to_dict(), default=sorted))
    default = MoELoraConfig()
    own = {"single_expert", *NOT_IN_MIXTURE}  # new experts are trained, not imported
    return {
        name: value
        for name, value in plain.items()
        if name not in own and (name in SHARED_FIELDS or value != getattr(default, name, None))
    }


def old_recipe(old: Old, recipe: Recipe) -> Recipe | None:
    """A recipe whose `data` are texts that the old adapter learned: those that this one names, else those of its own
    run; None where nobody says."""
    if recipe.old_data:
        return replace(recipe, data=recipe.old_data)
    record = None if old.folder is None else read_record(old.folder)
    return None if record is None else _recorded(record["recipe"])


def _recorded(recipe: Mapping[str, Any]) -> Recipe:
    """A recipe as run.json has it."""

    def domains(given: Sequence[Mapping[str, Any]]) -> tuple[DomainOptions, ...]:
        return tuple(DomainOptions(**domain) for domain in given)

    lists = {name: domains(recipe.get(name, ())) for name in ("data", "old_data")}
    return Recipe(**{**recipe, "model": ModelOptions(**recipe["model"]), **lists})
