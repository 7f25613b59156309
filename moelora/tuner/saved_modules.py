"""Modules that an adapter trains and saves whole (`modules_to_save`), beside what adapters adapt.

PEFT leaves out the targets of the same adapter that lie in such a module, where it sees them: not parameters, not names
of which `modules_to_save` has the end alone, and not what other adapters adapt. It copies the module with these layers
then, and fails at the layer's type when all is changed, or at loading what it saved, in which tensors are missing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..config import MoELoraConfig
from ._peft import LoraLayer
from .native import bare, matched_parameters


def saved_whole(model: nn.Module, config: MoELoraConfig) -> dict[str, str]:
    """Names of the modules that PEFT would wrap for an adapter, by the end of a name as it does, with the field's."""
    ends = config.modules_to_save or ()
    return {
        name: next(end for end in ends if name.endswith(end))
        for name, _ in model.named_modules(remove_duplicate=False)
        if any(name.endswith(end) for end in ends)
    }


def wrapped_already(model: nn.Module) -> dict[str, Collection[str]]:
    """Names of the modules that adapters of a model train and save whole, with the names of these adapters."""
    return {
        name: list(module.modules_to_save)
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def around(name: str, modules: Iterable[str]) -> str | None:
    """The first of these modules that a module lies in, or is."""
    return next((module for module in modules if f"{bare(name)}.".startswith(f"{bare(module)}.")), None)


def check_saved_modules(
    model: nn.Module, adapter_name: str, config: MoELoraConfig, module_names: Collection[str]
) -> None:
    """Refuse to adapt, in whichever adapters, what lies in a module that one of them trains and saves whole.

    Args:
        module_names: the modules that `target_modules` is for.

    Raises:
        ValueError: naming both fields, the modules and the fix.
    """
    owners = [name.rpartition(".")[0] for name in matched_parameters(model, config.target_parameters or ())]
    targets = dict.fromkeys(module_names, "`target_modules`") | dict.fromkeys(owners, "`target_parameters`")
    adapted = {name: "another adapter" for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    whole, wrapped = saved_whole(model, config), wrapped_already(model)
    for name, by in (adapted | targets).items():
        if (module := around(name, whole)) is not None:
            raise ValueError(
                f"`modules_to_save` ({whole[module]!r}) of adapter {adapter_name!r} trains and saves `{module}` whole, "
                f"and {by} adapts `{bare(name)}` in it, which could not be saved: leave one of them out"
            )
    for name, field in targets.items():
        if (module := around(name, wrapped)) is not None:
            raise ValueError(
                f"{field} of adapter {adapter_name!r} is for `{bare(name)}`, but `{module}` is trained and saved whole "
                f"by `modules_to_save` of adapter {next(iter(wrapped[module]))!r}, and what is adapted in it could not "
                "be saved: leave it out" + (" with `exclude_modules`" if field == "`target_modules`" else "")
            )
