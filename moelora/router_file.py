"""router.pt: an attached router, any nn.Module of the user's, saved whole and loaded without running foreign code."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

if TYPE_CHECKING:
    from .model import MoELoraModel

ROUTER_NAME = "router.pt"


def save_router(router: nn.Module, path: Path) -> None:
    """Save a router.

    Raises:
        ValueError: it holds something that cannot be pickled, such as a lambda.
    """
    try:
        torch.save(router, path)
    except (pickle.PicklingError, AttributeError, TypeError, ImportError) as error:  # all of which pickle raises
        raise ValueError(
            f"the attached router {type(router).__name__} cannot be saved ({error}); define its classes and functions "
            "at the top level of a module"
        ) from error


def load_router(tuner: MoELoraModel, path: Path | None) -> None:
    """Attach the router saved at path, unless it is None; into an attached router, only weights are loaded.

    Raises:
        ValueError: the file needs classes that have not been imported, or its weights do not fit.
    """
    if path is None:
        return
    allowed = [_imported_module_class(name, path) for name in get_unsafe_globals_in_checkpoint(path)]
    with safe_globals(allowed):
        router = torch.load(path, map_location="cpu", weights_only=True)
    if tuner.routing.attached is None:
        tuner.attach_router(router)
        return
    try:
        tuner.routing.attached.load_state_dict(router.state_dict())
    except RuntimeError as error:
        raise ValueError(f"the router in {str(path)!r} does not fit the attached one: {error}") from error


def _imported_module_class(qualified_name: str, path: Path) -> Any:
    """An nn.Module class by name, if the user has imported it: a checkpoint may not import, or call, anything else."""
    module_name, _, class_name = qualified_name.rpartition(".")
    found = getattr(sys.modules.get(module_name), class_name, None)
    if isinstance(found, type) and issubclass(found, nn.Module):
        return found
    raise ValueError(
        f"the attached router in {str(path)!r} needs `{qualified_name}`; import it before loading, or delete the file "
        "to load the mixture with its built-in routers"
    )
