"""Which linears read the same tensor (q, k and v; gate and up), so that one product serves them all."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..ops import (
    ExpertPairs,
    Reader,
    can_fuse,
    compute_dtype,
    is_plain,
    mixture_fused,
    mixture_linear,
    mixture_sparse,
)
from .interfaces import SharingLinear


@cache
def readers_of(forward: Callable) -> tuple[tuple[str, ...], ...]:
    """Names of the submodules that a module's forward calls with the same variable, in the order of the calls.

    Read from the source, not learned from a first run: then the first run computes exactly as every later one, and a
    checkpoint's second run as its first. Names alone do not tell: k_proj reads what q_proj reads in Llama, another
    tensor in BART's cross-attention and in SAM, where it would be computed for nothing. It is a guess that decides
    speed only; who reads what is checked at every call. Empty where there is no source.

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
            case ast.Call(ast.Attribute(ast.Name("self"), name), [ast.Name(variable)], []):
                if variable not in self._open:
                    self._open[variable] = []
                    self.groups.append(self._open[variable])
                self._open[variable].append(name)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)  # runs before its targets change
        for target in node.targets:
            self.visit(target)

    def _visit_branch(self, node: ast.AST) -> None:
        """What may not happen is no part of a group: a branch's calls are grouped among themselves, and after a branch
        that may return nothing joins what came before."""
        outer, self._open = self._open, {}
        self.generic_visit(node)
        self._open = outer
        for inner in ast.walk(node):
            if isinstance(inner, ast.Return | ast.Raise):
                self._open = {}
            elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                self._open.pop(inner.id, None)

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        for part in (node.body, node.orelse):
            self._visit_branch(ast.Module(part, []) if isinstance(part, list) else part)

    visit_IfExp = visit_If
    visit_Try = visit_For = visit_While = _visit_branch

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self._open.pop(node.id, None)


class SharedInput:
    """What was computed of one tensor for linears that have not been called yet, during one run of a block."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._x: Tensor | None = None
        self._outputs: dict[SharingLinear, Tensor] = {}

    def take(self, layer: SharingLinear, x: Tensor) -> Tensor | None:
        """The layer's output [..., O] for x [..., D], if it was computed with an earlier reader of the same x."""
        if not self._outputs or x is not self._x or self._key != _key(x):
            return None
        return self._outputs.pop(layer, None)

    def run(self, x: Tensor, layer: SharingLinear, reader: Reader, weights: Tensor) -> Tensor:
        """The layer's output [..., O] for x [..., D] under weights [..., E]; those of its fused_with are kept."""
        self.close()
        if not can_fuse(reader.pools):
            return mixture_linear(x, reader, weights)
        fused_with = _fused_with(layer, reader, x, weights)
        readers, pairs = [reader, *fused_with.values()], _pairs_of(layer, reader, x, weights)
        first, *others = mixture_fused(x, readers, weights) if pairs is None else mixture_sparse(x, readers, pairs)
        if fused_with:
            self._key, self._x, self._outputs = _key(x), x, dict(zip(fused_with, others, strict=True))
        return first

    def close(self) -> None:
        """Let go of the tensors."""
        self._key, self._x, self._outputs = None, None, {}


def _pairs_of(layer: SharingLinear, reader: Reader, x: Tensor, weights: Tensor) -> ExpertPairs | None:
    return layer.link.routing.expert_pairs(x, weights, reader.pools[0].rank)


def _key(x: Tensor) -> tuple[Any, ...]:
    """What has to be the same, besides x itself, for an output to be that of a later call."""
    return (None if x.is_inference() else x._version), torch.is_grad_enabled(), compute_dtype(x)


def _fused_with(layer: SharingLinear, reader: Reader, x: Tensor, weights: Tensor) -> dict[SharingLinear, Reader]:
    """The linears that are about to read x, as their module's source says, and that one product serves as well."""
    if not layer.link.fused_with or x.is_inference():  # without a version counter, a change of x goes unseen
        return {}
    found, dtype = {}, compute_dtype(x)
    for other in layer.link.fused_with:
        theirs = Reader(other.base_layer, other.expert_pools())
        is_near = bool(theirs.pools) and theirs.pools[0].lora_A.device == x.device
        is_bare = is_plain(theirs.base_layer, dtype)  # others may count how often, or when, they are called
        if is_near and is_bare and reader.goes_with(theirs) and other.weights_for(x) is weights:
            found[other] = theirs
    return found
