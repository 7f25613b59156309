"""Which linears read the same tensor (q, k and v; gate and up), so that one product serves them all."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from torch import Tensor

from .ops.project import Projection, project

if TYPE_CHECKING:
    from .layer import MoELoraLayer
    from .ops import ExpertPool


@cache
def readers_of(forward: Callable) -> tuple[tuple[str, ...], ...]:
    """Names of the submodules that a module's forward calls with the same variable, in the order of the calls.

    Read from the source, not learned from a first run: then the first run computes exactly as every later one. It is a
    guess that decides speed only; who reads what is checked at every call. Empty where there is no source.

    Example:
        >>> class Attention:
        ...     def forward(self, x):
        ...         return self.q(x) @ self.k(x).T @ self.v(x)
        >>> readers_of(Attention.forward)
        (('q', 'k', 'v'),)
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError):
        return ()
    finder = _Readers()
    finder.visit(tree)
    return tuple(group for group in map(tuple, map(dict.fromkeys, finder.groups)) if len(group) > 1)


class _Readers(ast.NodeVisitor):
    """Groups calls `self.name(variable, ...)` by variable, until the variable is assigned to again."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self._open: dict[str, list[str]] = {}

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        match node:
            case ast.Call(ast.Attribute(ast.Name("self"), name), [ast.Name(variable), *_]):
                if variable not in self._open:
                    self._open[variable] = []
                    self.groups.append(self._open[variable])
                self._open[variable].append(name)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)  # runs before its targets change
        for target in node.targets:
            self.visit(target)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self._open.pop(node.id, None)


class SharedInputs:
    """The inputs of one block's linears, during one run of the block."""

    def __init__(self) -> None:
        self._x: Tensor | None = None
        self._ready: dict[MoELoraLayer, Projection] = {}

    def projection(self, layer: MoELoraLayer, x: Tensor) -> Projection:
        """The layer's projection of x [..., D], made together with those of the linears that read x after it."""
        if x is not self._x:
            self._x, self._ready = x, {}
        if layer not in self._ready:
            readers = _readers_with_pools(layer, x)
            self._ready.update(zip(readers, project(x, list(readers.values())), strict=True))
        return self._ready.pop(layer)

    def close(self) -> None:
        """Let go of the tensors."""
        self._x, self._ready = None, {}


def _readers_with_pools(layer: MoELoraLayer, x: Tensor) -> dict[MoELoraLayer, list[ExpertPool]]:
    readers = {layer: layer.expert_pools()}
    (first,) = readers.values()
    for other in layer.link.followers:
        pools = other.expert_pools()
        is_near = bool(pools) and pools[0].lora_A.device == x.device and pools[0].lora_A.shape[-1] == x.shape[-1]
        if is_near and other.is_fusible(pools) and pools[0].drop_rate == first[0].drop_rate:
            readers[other] = pools
    return readers
