"""Which linears read the same tensor (q, k and v; gate and up), so that one product serves them all."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops import (
    ExpertPairs,
    FusedGroup,
    Operands,
    Reader,
    can_fuse,
    compute_dtype,
    drop_rate,
    is_plain,
    is_transformed,
    mixture_sparse,
    operands_of,
)
from .interfaces import SharingLinear


class RunningBlock(Protocol):
    """What is asked of a block's routing, [`moelora.forward.block_routing.BlockRouting`]."""

    context: Any

    @property
    def is_constant(self) -> bool:
        """Whether all tokens of all forwards have the same weights."""

    def scaled_weights_for(self, x: Tensor, layer: SharingLinear, bound: BoundGroup) -> Tensor:
        """Routing weights [T, E], times the scalings, for x [..., D] that the layer reads."""

    def expert_pairs(self, x: Tensor, layer: SharingLinear, bound: BoundGroup) -> ExpertPairs | None:
        """What to compute of x in the sparse form; None where all experts are computed."""


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
        self._leaders: list[SharingLinear] = []  # that have run, each for those that read its input after it
        self._operands: dict[FusedGroup, Operands] = {}  # of those expected to run

    def take(self, layer: SharingLinear, x: Tensor) -> Tensor | None:
        """The layer's output [..., O] for x [..., D], if it was computed with an earlier reader of the same x."""
        if not self._outputs or x is not self._x or self._key != _key(x):
            return None
        return self._outputs.pop(layer, None)

    def run(self, layer: SharingLinear, x: Tensor, routing: RunningBlock) -> Tensor | None:
        """The layer's output [..., O] for x [..., D]; those of the linears that read x after it are kept.

        None where the hand-written form does not serve.
        """
        self.close()
        call = routing.context.call
        ready = call.once(layer, lambda: _ready(layer, x, routing)) if call.repeats else None
        bound, operands = ready or (bound_group(layer, x), None)
        if bound is None:
            return None
        pairs = routing.expert_pairs(x, layer, bound)
        if pairs is not None:  # which casts what it multiplies as it goes
            first, *others = mixture_sparse(x, bound.group, pairs)
        else:
            operands = operands or self._operands_of(layer, bound)
            first, *others = bound.group(x, routing.scaled_weights_for(x, layer, bound), operands)
        if others:
            self._key, self._x, self._outputs = _key(x), x, dict(zip(bound.others, others, strict=True))
        return first

    def _operands_of(self, layer: SharingLinear, bound: BoundGroup) -> Operands:
        """What the group multiplies: cast together with what the block's other groups are about to multiply.

        Those are the ones that the block ran the last time.
        """
        if not self._leaders:
            hook = layer.link.hook
            others = [other.link.bound for other in hook.leaders if other is not layer]
            groups = [other.group for other in (bound, *others) if other is not None and other.is_made_with(bound)]
            made = operands_of([group.stack for group in groups])
            self._operands = dict(zip(groups, made, strict=True))
            hook.leaders = self._leaders
        self._leaders.append(layer)
        return self._operands.pop(bound.group, None) or operands_of([bound.group.stack])[0]

    def close(self) -> None:
        """Let go of the tensors."""
        if self._x is not None:
            self._key, self._x, self._outputs = None, None, {}


def _key(x: Tensor) -> tuple[Any, ...]:
    """What has to be the same, besides x itself, for an output to be that of a later call."""
    return (None if x.is_inference() else x._version), torch.is_grad_enabled(), compute_dtype(x)


class BoundGroup:
    """A linear and those that are about to read the same x, as its module's source says, ready to be called.

    Bound once, and anew where something of it has changed: adapters, factors, scalings, dropout, hooks on base layers.

    Attributes:
        others: the linears that are computed with the first.
        names: the adapters whose experts it computes.
        columns: what of the routing weights it needs, and how scaled.
    """

    def __init__(
        self, layer: SharingLinear, candidates: Sequence[SharingLinear], x: Tensor, dtype: torch.dtype
    ) -> None:
        self.device, self.dtype, self._candidates = x.device, dtype, candidates
        self._watches = [LinearWatch(each, dtype) for each in (layer, *candidates)]
        self.names = layer.routed_adapters()
        reader = Reader(layer.base_layer, layer.expert_pools())
        found = {}
        for other, watch in zip(candidates, self._watches[1:], strict=True):
            # Others may count how often, or when, they are called: then they are not plain.
            if watch.is_plain and other.routed_adapters() == self.names and other.link.hook is layer.link.hook:
                theirs = Reader(other.base_layer, other.expert_pools())
                if theirs.pools and theirs.pools[0].lora_A.device == x.device and reader.goes_with(theirs):
                    found[other] = theirs
        self.others = list(found)
        self.group = FusedGroup([reader, *found.values()], dtype)
        self.columns = (*self.names, self.group.scalings)

    def holds(self, candidates: Sequence[SharingLinear], x: Tensor, dtype: torch.dtype) -> bool:
        """Whether binding again would come to the same."""
        is_asked_alike = self._candidates is candidates and self.dtype is dtype and self.device == x.device
        return is_asked_alike and self._is_current()

    def _is_current(self) -> bool:
        return all(watch.holds() for watch in self._watches)

    def is_made_with(self, other: BoundGroup) -> bool:
        """Whether its factors have to be cast or stacked, as those of the other, and are there: not a shard of them."""
        is_alike = self.group.stack.is_made and self.dtype is other.dtype and self.device == other.device
        return is_alike and (self is other or self._is_current())


def bound_group(layer: SharingLinear, x: Tensor) -> BoundGroup | None:
    """The layer's, as it is now; None where the hand-written form does not serve."""
    link, dtype = layer.link, compute_dtype(x)
    candidates = () if x.is_inference() else link.fused_with  # without a version counter, a change of x goes unseen
    bound = link.bound
    if torch.compiler.is_compiling() or is_transformed():
        return None
    if bound is None or not bound.holds(candidates, x, dtype):
        pools = layer.expert_pools()
        is_served = bool(pools) and not any(pool.lora_A.is_meta for pool in pools) and can_fuse(pools)
        bound = link.bound = BoundGroup(layer, candidates, x, dtype) if is_served else None
    return bound


def _ready(layer: SharingLinear, x: Tensor, routing: RunningBlock) -> tuple[BoundGroup, Operands] | None:
    """The layer's group with what it multiplies; None where that cannot be kept: under ZeRO-3, factors are there only
    while somebody asks for them."""
    bound = bound_group(layer, x)
    if bound is None or any(hasattr(factor, "ds_id") for factor in bound.group.stack.As):
        return None
    constant_E = routing.scaled_weights_for(x, layer, bound)[0] if routing.is_constant else None
    return bound, bound.group.kept_operands(constant_E)


class LinearWatch:
    """Tells whether anything has changed that a linear's product depends on, but for what is in its tensors.

    It is asked at every call, so it asks the dictionaries of modules, which takes a tenth of what attributes take.
    """

    def __init__(self, layer: SharingLinear, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._layer = layer
        self._active = list(layer.active_adapters)
        modules: dict[str, Any] = layer._modules
        self._modules, self._base = modules, modules["base_layer"]
        self._factors = [modules[name]._modules for name in ("lora_A", "lora_B", "lora_dropout")]
        self._pools = [self._pool(name) for name in layer.routed_adapters()]
        self.is_plain = is_plain(self._base, dtype)
        self._frozen = self._base._parameters.copy() if self.is_plain else {}

    def _pool(self, name: str) -> tuple:
        A, B, dropout = (modules[name] for modules in self._factors)
        return name, A, A.weight, B, B.weight, dropout, drop_rate(dropout), self._layer.scaling[name]

    def holds(self) -> bool:
        """Whether all is as it was, and the experts are neither switched off nor merged."""
        layer, base = self._layer, self._modules["base_layer"]
        if layer.is_left_to_peft or layer.active_adapters != self._active:
            return False
        (As, Bs, dropouts), scalings = self._factors, layer.scaling
        for name, A, weight_A, B, weight_B, dropout, rate, scaling in self._pools:
            # By attribute, as ZeRO-3 then gathers them.
            if As.get(name) is not A or A.weight is not weight_A or Bs.get(name) is not B or B.weight is not weight_B:
                return False
            if dropouts.get(name) is not dropout or drop_rate(dropout) != rate or scalings.get(name) != scaling:
                return False
        if base is not self._base or is_plain(base, self._dtype) is not self.is_plain:
            return False
        frozen = base._parameters
        return all(frozen[name] is self._frozen[name] for name in self._frozen)
