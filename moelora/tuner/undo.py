"""What is refused half-way leaves no trace: a model becomes again what it was before an adapter was put into it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..forward.removal import STATE_ATTRIBUTE
from .layer import MoELoraLayer

_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def undone_if_refused(model: nn.Module) -> Iterator[None]:
    """Whatever is raised within leaves model as it is now: modules, hooks, trainability and other adapters.

    PEFT replaces modules one by one, and may refuse the last of them.
    """
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = [_Attributes(owner) for owner in _owners(model)]
    try:
        yield
    except BaseException:
        for attributes in before:
            attributes.restore()
        for parameter, is_trainable in trainable:
            parameter.requires_grad = is_trainable
        raise


def _owners(model: nn.Module) -> Iterator[Any]:
    """Whatever an adapter that is added changes: modules, and what of ours hangs on them."""
    for module in model.modules():
        yield module
        if isinstance(module, MoELoraLayer):
            yield module.link
    if (state := vars(model).get(STATE_ATTRIBUTE)) is not None:
        yield state


class _Attributes:
    """An object's attributes, and what is in those that hold others: submodules, hooks, adapters' numbers by name."""

    def __init__(self, owner: Any) -> None:
        self._now = vars(owner)
        self._before = dict(self._now)
        # Most are empty, of a module's hooks, and a model has a hundred thousand of them.
        self._contents: list[tuple[Any, Any]] = [
            (value, value.copy() if value else ()) for value in self._now.values() if type(value) in _CONTAINERS
        ]

    def restore(self) -> None:
        """In place: handles of hooks, and others, refer to the very containers."""
        self._now.clear()
        self._now.update(self._before)
        for container, content in self._contents:
            container.clear()
            container.extend(content) if type(container) is list else container.update(content)
