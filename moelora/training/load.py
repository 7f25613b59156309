"""Read a recipe file and check all of it before anything heavy loads; every mistake is reported at once."""

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainingArguments

from ..config import SHARED_FIELDS, MoELoraConfig
from ..data.sources import LIES_IN_TEXTS, check_domain, folder_read_around, paths_read, resolve_path
from ..files.opening import NotReadableError, expand_user, real_path
from ..presets import PRESETS
from ..recipe import MIXTURE_DEFAULTS, TRAINING_DEFAULTS, DomainOptions, ModelOptions, Recipe
from ..schema import (
    Check,
    Problem,
    RecipeError,
    at_least,
    check_values,
    culprit,
    not_negative,
    one_of,
    positive,
    settable_fields,
)
from ..storage.base_model import check_model
from ..storage.run_record import check_output_dir
from .arguments import check_parts
from .liger import settle_liger
from .recipe_file import parse_yaml, read_yaml

T = TypeVar("T")
MISSING = dataclasses.MISSING


def _below_1(value: float) -> str | None:
    return None if 0 <= value < 1 else "must be 0 or greater and less than 1"


def _settings(value: str) -> str | None:
    good = all(part.count("=") == 1 for part in value.split(","))
    return None if good or not value else "must be KEY=VALUE, or several with commas between them"


TRAINING_RULES: dict[str, Check] = {
    "learning_rate": positive,
    "weight_decay": not_negative,
    "max_grad_norm": not_negative,
    "warmup_steps": not_negative,
    "num_train_epochs": positive,
    "max_steps": lambda value: None if value == -1 or value >= 1 else "must be 1 or greater, or -1 to count epochs",
    "per_device_train_batch_size": at_least(1),
    "per_device_eval_batch_size": at_least(1),
    "gradient_accumulation_steps": at_least(1),
    "logging_steps": positive,
    "save_steps": positive,
    "eval_steps": positive,
    "label_smoothing_factor": _below_1,
    "adam_beta1": _below_1,
    "adam_beta2": _below_1,
    "adam_epsilon": not_negative,
    "optim_args": _settings,
    "neftune_noise_alpha": not_negative,
    "dataloader_num_workers": at_least(0),
}
"""Rules that `TrainingArguments` leaves to fail, or to train on, later."""

NOT_IN_TRAINING = {
    "seed": "set `seed` at the top of the recipe",
    "data_seed": "set `seed` at the top of the recipe",
    "resume_from_checkpoint": "use `moelora train --resume`",
    "do_train": "drop it: the job always trains",
    "do_eval": "drop it: the job always measures the loss before and after",
    "do_predict": "drop it: the job does not predict",
    "local_rank": "drop it: the launcher sets it",
}
NOT_IN_MIXTURE = {
    "peft_type": "drop it: it is always MOELORA",
    "inference_mode": "drop it: the job trains",
    "base_model_name_or_path": "set `model.name`",
    "auto_mapping": "drop it: PEFT fills it in",
    "peft_version": "drop it: PEFT fills it in",
    "router_memory": "drop it: `moelora train --grow` fills it in",
    "own_routers": "drop it: get_peft_model fills it in",
    "requires_import": "drop it: save_pretrained fills it in",
    "adapters": "drop it: save_pretrained fills it in",
    "checkpoint": "drop it: save_pretrained fills it in",
}


_PLAIN = ("start_from", "block_size", "max_eval_blocks", "seed", "references")
"""Fields of a recipe that are what the file says."""
_GROWS = "goes with `moelora train --grow`; drop it"


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    inherited: Mapping[str, Any] | None = None,
) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the YAML file.
        overrides: `key=value` settings that replace what the file says, such as `training.max_steps=10`.
        resume: the run is to continue from the last checkpoint in its output folder.
        overwrite: what an earlier run left in the output folder may be replaced.
        inherited: fields of `MoELoraConfig` of a mixture that the run adds to; the recipe may not change shared ones.

    Raises:
        RecipeError: listing every problem with its key, value and fix.
    """
    path = Path(path)
    raw, problems = apply_overrides(_parse(path), overrides)
    problems += check_values(Recipe, raw, "")
    try:
        recipe = _build(raw, real_path(path).parent, problems, inherited)
        if recipe is not None:
            problems += _check_best_model(recipe)
            problems += check_output_dir(recipe, resume=resume, overwrite=overwrite)
            problems += _check_what_is_read(recipe, real_path(path), overwrite)
        if recipe is not None and not problems:
            recipe, problems = settle_liger(recipe)
    except OSError as error:  # a name that is too long, a file that may not be read
        recipe = None
        problems.append(Problem("recipe", error.filename or MISSING, error.strerror or str(error)))
    if problems or recipe is None:
        raise RecipeError(path, problems)
    return recipe


def _check_best_model(recipe: Recipe) -> list[Problem]:
    """The Trainer's own default is the loss of one evaluation set, and each domain is a set of its own."""
    wants_best = recipe.training.get("load_best_model_at_end") or recipe.training.get("save_strategy") == "best"
    metric = recipe.training.get("metric_for_best_model")
    metrics = [f"eval_{domain.name}_loss" for domain in recipe.data]
    if not wants_best or (metric and f"eval_{metric.removeprefix('eval_')}" in metrics):
        return []
    fix = f"must be a domain's loss, by which to tell the best model: {' or '.join(metrics)}"
    return [Problem("training.metric_for_best_model", metric or MISSING, fix)]


def _check_what_is_read(recipe: Recipe, path: Path, overwrite: bool) -> list[Problem]:
    """Whether a run would put aside what it reads with all else in its output folder, or be read as texts itself."""
    out = recipe.output_dir
    domains = (*recipe.data, *recipe.old_data)
    reads = (str(path), recipe.model.name, *paths_read(domains)) if overwrite else ()
    local = (Path(read) for read in reads if Path(read).is_absolute())  # not an id of the hub
    if inside := [str(read) for read in local if real_path(read).is_relative_to(out)]:
        fix = f"holds {inside[0]}, which is only read, and would be put aside with all else in it; give another folder"
    elif around := folder_read_around(domains, out):
        fix = LIES_IN_TEXTS.format(around)
    else:
        return []
    return [Problem("training.output_dir", str(out), fix)]


def _parse(path: Path) -> dict[str, Any]:
    try:
        raw = read_yaml(path)
    except OSError as error:
        fix = "no such file; give the path of a recipe" if isinstance(error, FileNotFoundError) else str(error)
        raise RecipeError(path, [Problem("recipe", str(path), fix)]) from None
    except NotReadableError as error:
        raise RecipeError(path, [Problem("recipe", str(path), str(error))]) from None
    if not isinstance(raw, dict):
        fix = "must be a mapping with the keys model, data and training; see docs/training.md"
        raise RecipeError(path, [Problem("recipe", raw, fix)])
    return raw


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """Replace settings by dotted key; a domain is addressed by its name, as in `data.code.weight=2`."""
    raw, problems = copy.deepcopy(raw), []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            problems.append(Problem("--set", override, "must be KEY=VALUE, such as training.max_steps=10"))
            continue
        *parents, last = key.strip().split(".")
        section: Any = raw
        for name in parents:
            section = _descend(section, name)
        if not isinstance(section, dict):
            there = f"the recipe has no section `{'.'.join(parents)}`"
            fix = f"a domain is changed key by key, as in {key}.weight=2" if isinstance(section, list) else there
            problems.append(Problem("--set", override, fix))
            continue
        try:
            section[last] = parse_yaml(text)
        except NotReadableError as error:
            problems.append(Problem("--set", override, f"the value: {error}"))
    return raw, problems


def _descend(section: Any, name: str) -> Any:
    if isinstance(section, list):
        return next((item for item in section if isinstance(item, dict) and item.get("name") == name), None)
    return section.setdefault(name, {}) if isinstance(section, dict) else None


def _build(
    raw: dict[str, Any], folder: Path, problems: list[Problem], inherited: Mapping[str, Any] | None
) -> Recipe | None:
    """Check every section, adding to `problems`; the recipe, or None where a section is not usable at all."""
    bad = {problem.key for problem in problems}
    given = {name: value for name, value in raw.items() if name not in bad}
    model = _build_model(given["model"], folder, problems) if "model" in given else None
    data = _build_domains(given["data"], folder, problems, "data") if "data" in given else None
    old_data = _build_old_data(given.get("old_data", ()), given.get("data", ()), folder, problems, inherited)
    mixture = _build_mixture(given.get("mixture", {}), problems, inherited)
    training = _build_training(given["training"], folder, raw, problems) if "training" in given else None
    others = {name: given[name] for name in _PLAIN if name in given}
    if inherited is None and given.get("start_from", _default("start_from")) != _default("start_from"):
        problems.append(Problem("start_from", given["start_from"], _GROWS))
    if model is not None:
        block_size = given.get("block_size", _default("block_size"))
        problems += check_model(model, None if "block_size" in bad else block_size, mixture)
    if model is None or data is None or mixture is None or training is None:
        return None
    return Recipe(model=model, data=data, old_data=old_data, mixture=mixture, training=training, **others)


def _build_model(raw: Mapping[str, Any], folder: Path, problems: list[Problem]) -> ModelOptions | None:
    found = check_values(ModelOptions, raw, "model")
    problems += found
    usable = _without(raw, "model", found)
    return ModelOptions(**{**usable, "name": resolve_path(usable["name"], folder)}) if "name" in usable else None


def _build_domains(raw: list[Any], folder: Path, problems: list[Problem], section: str) -> tuple[DomainOptions, ...]:
    if not raw:
        problems.append(Problem(section, raw, "give at least one domain: a list of {name, path}"))
    names = Counter(_names(raw))
    problems += [Problem(section, name, "two domains of this name; rename one") for name in names if names[name] > 1]
    built = (_build_domain(item, f"{section}[{index}]", folder, problems) for index, item in enumerate(raw))
    return tuple(domain for domain in built if domain is not None)


def _names(raw: Iterable[Mapping[str, Any]]) -> list[str]:
    return [str(item["name"]) for item in raw if "name" in item]


def _build_old_data(
    raw: Sequence[Any],
    data: Sequence[Any],
    folder: Path,
    problems: list[Problem],
    inherited: Mapping[str, Any] | None,
) -> tuple[DomainOptions, ...]:
    """The domains that were learned before; only a run that grows has any, and tables tell them from its own."""
    if not raw:
        return ()
    if inherited is None:
        problems.append(Problem("old_data", raw, _GROWS))
    for name in set(_names(raw)) & set(_names(data)):
        problems.append(Problem(f"old_data.{name}", name, "`data` has a domain of this name too; rename one"))
    return _build_domains(list(raw), folder, problems, "old_data")


def _build_domain(raw: Mapping[str, Any], place: str, folder: Path, problems: list[Problem]) -> DomainOptions | None:
    key = f"{place.partition('[')[0]}.{raw['name']}" if isinstance(raw.get("name"), str) else place
    found = check_values(DomainOptions, raw, key)
    problems += found
    usable = {"name": key, **_without(raw, key, found)}
    if "path" not in usable:
        return None
    paths = {name: resolve_path(usable[name], folder) for name in ("path", "eval_path") if usable.get(name)}
    domain = DomainOptions(**{**usable, **paths})
    problems += check_domain(domain, key)
    return domain


def _build_mixture(
    raw: Mapping[str, Any], problems: list[Problem], inherited: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    # A mixture made in Python may have no task type, which changes nothing about the experts that join it.
    start = MIXTURE_DEFAULTS if inherited is None else {"task_type": MIXTURE_DEFAULTS["task_type"], **inherited}
    values, found = check_mixture(raw, start, "mixture", inherited or {})
    for name, shared in inherited.items() if inherited else ():
        if name in SHARED_FIELDS and values.get(name, shared) != shared:
            fix = f"is {shared!r} in the mixture that grows, and holds for all its experts; leave it out"
            found.append(Problem(f"mixture.{name}", values[name], fix))
    if values["task_type"] != "CAUSAL_LM":
        found.append(Problem("mixture.task_type", values["task_type"], "must be CAUSAL_LM: the job trains on texts"))
    problems += found
    return None if found else values


def check_mixture(
    raw: Mapping[str, Any], start: Mapping[str, Any], key: str, inherited: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], list[Problem]]:
    """Fields of `MoELoraConfig`, or a `preset`, as a user gives them.

    Args:
        raw: what stands in the user's section.
        start: what holds where the section says nothing else.
        key: the section's name, for the messages.
        inherited: fields of a mixture that is added to; a preset leaves the shared ones alone.

    Returns:
        All fields, and what is wrong with them: everything, not the first alone.
    """
    raw, found = _with_preset(raw, inherited or {}, key)
    found += _refused(raw, NOT_IN_MIXTURE, key) + check_values(MoELoraConfig, raw, key, others=["preset"])
    values = {**start, **raw}
    return values, found + construct(MoELoraConfig, _without(values, key, found), key)


def _with_preset(
    raw: Mapping[str, Any], inherited: Mapping[str, Any], key: str
) -> tuple[dict[str, Any], list[Problem]]:
    """The fields that `preset` stands for, under those given; what experts of a growing mixture share stays its own."""
    given = {name: value for name, value in raw.items() if name != "preset"}
    if "preset" not in raw:
        return given, []
    name = raw["preset"]
    if fix := one_of(*PRESETS)(name):
        return given, [Problem(f"{key}.preset", name, fix)]
    bound = inherited.keys() & set(SHARED_FIELDS)
    free = {field: value for field, value in PRESETS[name].items() if field not in bound}
    return free | given, []


def _build_training(
    raw: Mapping[str, Any], folder: Path, recipe: Mapping[str, Any], problems: list[Problem]
) -> dict[str, Any] | None:
    found = _refused(raw, NOT_IN_TRAINING, "training")
    found += check_values(TrainingArguments, _without(raw, "training", found), "training", rules=TRAINING_RULES)
    values = {**TRAINING_DEFAULTS, **raw, "seed": recipe.get("seed", _default("seed"))}
    if not raw.get("output_dir"):
        found.append(
            Problem("training.output_dir", MISSING, "missing; the folder for the adapter, run.json and checkpoints")
        )
    elif isinstance(raw["output_dir"], str):
        values["output_dir"] = str(real_path(folder / expand_user(raw["output_dir"])))
    found += construct(TrainingArguments, _without(values, "training", found), "training")
    found = found or check_parts(values)
    problems += found
    return None if found else values


def _default(name: str) -> Any:
    return settable_fields(Recipe)[name].default


def _refused(raw: Mapping[str, Any], refused: Mapping[str, str], key: str) -> list[Problem]:
    return [Problem(f"{key}.{name}", raw[name], fix) for name, fix in refused.items() if name in raw]


def _without(values: Mapping[str, Any], key: str, problems: Sequence[Problem]) -> dict[str, Any]:
    """The values that have no problem, so that the rest of a section can still be checked."""
    bad = {problem.key for problem in problems}
    return {name: value for name, value in values.items() if f"{key}.{name}" not in bad}


def construct(cls: type[T], values: Mapping[str, Any], key: str) -> list[Problem]:
    """What a class that stops at its first error has against `values`: try, drop the value it names, try again."""
    remaining = dict(values)
    problems: list[Problem] = []
    while True:
        try:
            cls(**remaining)
            return problems
        except Exception as error:  # a class of others', which may take a value for what it should be
            reason = str(error) or repr(error)
            name = culprit(reason, remaining)
            if name is None:
                return [*problems, Problem(key, MISSING, reason)]
            problems.append(Problem(f"{key}.{name}", remaining.pop(name), reason))
