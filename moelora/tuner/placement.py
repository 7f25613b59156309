"""Which router serves each linear: its block's, the model's, or one of its own.

    router_scope   in a block, and reads       in a block, and reads      outside every
                   the tokens that enter it    others                     block
    "block"        the block's                 its own                    its own
    "model"        the model's                 its own                    its own
    "module"       its own                     its own                    its own

Others are windows of an image, a shortened or transposed sequence, or the tokens that went to one native expert. They
are also earlier tokens, where a cache holds what the linear is to read (latents in multi-head latent attention).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..forward.alignment import Reads
from . import blocks
from .probe import Readings, readings_of


@dataclass(frozen=True)
class Place:
    """Of one linear.

    Attributes:
        owner: the module that holds its router: a block, "" for the model, or the linear itself.
        block: the block whose forward it runs in; None outside of all, and where a block is not called as a whole.
        reads: which tokens it reads, beside those that enter its block.
        width: H of the router; None where it is that of the linear's input.
    """

    owner: str
    block: str | None
    reads: Reads = "same"
    width: int | None = None


def places(model: nn.Module, names: Iterable[str], scope: str, own: Sequence[str] | None) -> dict[str, Place]:
    """The place of each linear, by its name; one that is routed already keeps its owner.

    Args:
        model: the base model, which may be adapted already.
        names: of the linears.
        scope: `router_scope`.
        own: those with routers of their own beside the scope's, where an adapter that was saved says so.

    Raises:
        ValueError: own names others, or disagrees with the mixture that is there, or the width of hidden states cannot
            be told.
    """
    names = list(names)
    _check_known(names, own or ())
    readings = readings_of(model)
    found = {name: _without_owner(model, name, readings) for name in names}
    width = _common_width(model, found.values(), readings) if scope == "model" else None
    for name, place in found.items():
        is_apart = scope == "module" or _is_decided(model.get_submodule(name), name, own)
        if is_apart is None:
            is_apart = (
                place.reads != "same" or place.block is None or not _is_covered(model, place.block, width, readings)
            )
        if is_apart or (scope == "block" and place.block is None):
            found[name] = replace(place, owner=name)
        elif scope == "block":
            assert place.block is not None
            found[name] = replace(place, owner=place.block, width=_width(model, place.block, readings))
        else:
            found[name] = replace(place, width=width)
    return found


def _check_known(names: Sequence[str], own: Sequence[str]) -> None:
    if unknown := sorted(set(own) - set(names)):
        raise ValueError(
            f"`own_routers` ({unknown[0]!r}) names no linear of the base model that the adapter adapts; leave it to "
            "get_peft_model (None), or load the adapter into the base that it was saved with"
        )


def _is_decided(module: nn.Module, name: str, own: Sequence[str] | None) -> bool | None:
    """Whether a linear has a router of its own beside the scope's, if something says so already."""
    is_said = None if own is None else name in own
    if not hasattr(module, "link"):
        return is_said
    is_own = "moe_router" in module._modules
    if is_said is not None and is_said != is_own:
        raise ValueError(
            f"`{name}` has {'a' if is_own else 'no'} router of its own in this mixture, and "
            f"{'none' if is_own else 'one'} in the adapter that was saved; load the adapter into another base model"
        )
    return is_own


def _without_owner(model: nn.Module, name: str, readings: Readings) -> Place:
    block = blocks.find_block(model, name)
    if block is None or (name in readings.alike and block not in readings.leads):  # its parts are called one by one
        return Place("", None)
    if blocks.reads_another_width(model, name):
        return Place("", block, "others")
    is_alike = readings.alike.get(name, _is_likely_alike(model, name, block, readings))
    return Place("", block, "others" if not is_alike else "earlier" if name in readings.cached else "same")


def _is_likely_alike(model: nn.Module, name: str, block: str, readings: Readings) -> bool:
    """Whether a linear that was not seen running reads the tokens that enter its block."""
    if blocks.is_native_expert(name, block):
        return False
    if block in readings.complete:  # cross-attention waits for an encoder; anything else, for certain tokens
        return blocks.has_cross_attention(model, block)
    stacks = {blocks.stack_of(seen) for seen in readings.leads}  # empty where the model cannot be seen at all
    is_block = not stacks or blocks.stack_of(block) in stacks
    return is_block or isinstance(model.get_submodule(block), GradientCheckpointingLayer)


def _is_covered(model: nn.Module, block: str, width: int | None, readings: Readings) -> bool:
    """Whether what enters the model (or, where width is None, the block) are the tokens of a block."""
    if width is None:
        return True
    first = blocks.first_block(model, blocks.stack_of(block))
    return readings.leads.get(block) == readings.leads.get(first) and _width(model, block, readings) == width


def _common_width(model: nn.Module, found: Iterable[Place], readings: Readings) -> int:
    """The width of the hidden states around most linears: a model of several towers has several."""
    inside = [place.block for place in found if place.block is not None and place.reads == "same"]
    counts = Counter(_width(model, block, readings) for block in inside)
    return counts.most_common(1)[0][0] if counts else 0


def _width(model: nn.Module, block: str, readings: Readings) -> int:
    """H of a block."""
    return readings.widths.get(block) or blocks.hidden_size(model, block)
