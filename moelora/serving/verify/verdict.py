"""Whether what a runtime computes with an adapter is what the adapter did in training.

Everything is measured against the effect: the mean over tokens of |log-probability with the adapter - without it|. A
difference of 0.01 nats is nothing for an adapter that changes 1 nat, and everything for one that changes 0.01.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from statistics import fmean

from ...storage.references import References

Prompts = Sequence[Sequence[int]]
"""Token ids [S] of each."""
Rows = Sequence[Sequence[float]]
"""Log-probabilities [S - 1] of each prompt's tokens, in nats."""

ROUNDING_SHARE = {True: 0.01, False: 0.10}
"""Of the effect that rounding may change, where all computes in float32, and otherwise."""
BASE_FACTOR = 2.0
"""What the base model alone differs by is rounding too; with the adapter it may be so many times as much."""
MOST_SHARE = 0.5
"""Of the effect: what differs by more is another adapter, whatever the base model differs by."""
NOTHING_SHARE = 0.01
"""Of the effect in training: what changes less changes nothing."""
NOTHING = {True: 1e-5, False: 1e-3}
"""Nats that changes nothing, where it is in float32, and otherwise."""


class Status(Enum):
    """What a verdict says; the value is the exit status of `moelora verify`."""

    SAME = 0
    DIFFERS = 1
    UNKNOWN = 3


@dataclass(frozen=True)
class Verdict:
    """One sentence, and what it means."""

    status: Status
    text: str


@dataclass(frozen=True)
class Computed:
    """What a runtime computes for prompts, with the adapter and without, and the precision that it computes in."""

    adapted: Rows
    base: Rows
    dtype: str


@dataclass(frozen=True)
class Comparison:
    """Means over tokens, in nats.

    Attributes:
        effect: |with the adapter - without it|, as computed.
        trained_effect: the same in the references; None without them, as the next two.
        difference: |computed - references|, with the adapter.
        base_difference: the same without it.
    """

    effect: float
    trained_effect: float | None = None
    difference: float | None = None
    base_difference: float | None = None


def compare(computed: Computed, references: References | None) -> list[Comparison]:
    """One for each prompt, and one over the tokens of all of them."""
    whole = Computed([[*chain(*computed.adapted)]], [[*chain(*computed.base)]], computed.dtype)
    if references is None:
        rows = [*zip(computed.adapted, computed.base, strict=True), (whole.adapted[0], whole.base[0])]
        return [Comparison(_distance(adapted, base)) for adapted, base in rows]
    adapted_R, base_R = ([getattr(prompt, name) for prompt in references.prompts] for name in ("adapted", "base"))
    columns = [[*each, [*chain(*each)]] for each in (computed.adapted, computed.base, adapted_R, base_R)]
    return [
        Comparison(_distance(a, b), _distance(ra, rb), _distance(a, ra), _distance(b, rb))
        for a, b, ra, rb in zip(*columns, strict=True)
    ]


def _distance(left: Sequence[float], right: Sequence[float]) -> float:
    return fmean(abs(a - b) for a, b in zip(left, right, strict=True))


def judge(computed: Computed, references: References | None, keep: float, *, is_exact: bool = True) -> Verdict:
    """The verdict on what a runtime computes.

    Args:
        keep: share of the effect that is enough where the runtime serves what only comes near to the adapter.
        is_exact: whether it is to compute what the references say, and not only something near.
    """
    total = compare(computed, references)[-1]
    numbers = chain(*computed.adapted, *computed.base)
    if not all(map(math.isfinite, numbers)):
        return Verdict(Status.DIFFERS, "computes no numbers: a log-probability is not finite")
    in_float32 = computed.dtype == "float32" and (references is None or references.dtype == "float32")
    if total.effect <= max(NOTHING[in_float32], NOTHING_SHARE * (total.trained_effect or 0)):
        return Verdict(Status.DIFFERS, _nothing(total, NOTHING[in_float32]))
    if references is None:
        changes = f"changes the base model's log-probabilities by {total.effect:.2g} nats (mean)"
        unknown = "what it did in training nothing says: there are no references, which --write makes"
        return Verdict(Status.UNKNOWN, f"{changes}; {unknown}")
    if is_exact:
        return _judge_exact(total, in_float32)
    return _judge_near(total, keep)


def _nothing(total: Comparison, floor: float) -> str:
    text = f"changes nothing: log-probabilities are the base's (mean effect {total.effect:.2g} nats"
    if total.trained_effect is None:
        return f"{text})"
    if total.trained_effect <= floor:
        return f"{text}, and {total.trained_effect:.2g} in training: it learned nothing)"
    return f"{text}, in training it was {total.trained_effect:.2g})"


def _judge_exact(total: Comparison, in_float32: bool) -> Verdict:
    difference, effect, base = total.difference or 0.0, total.trained_effect or 0.0, total.base_difference or 0.0
    measured = f"mean |Δ| {difference:.2g} nats, of an effect of {effect:.2g}"
    if difference <= min(max(ROUNDING_SHARE[in_float32] * effect, BASE_FACTOR * base), MOST_SHARE * effect):
        return Verdict(Status.SAME, f"does what it did in training: {measured}")
    text = f"is loaded, but differs: {measured}"
    if BASE_FACTOR * base > MOST_SHARE * effect:
        text += (
            f"; the base model alone differs by {base:.2g}: it is another one, or too coarse a precision to tell; give "
            "the right one with --base, or --dtype"
        )
    return Verdict(Status.DIFFERS, text)


def _judge_near(total: Comparison, keep: float) -> Verdict:
    difference, effect = total.difference or 0.0, total.trained_effect or 0.0
    kept = max(0.0, 1 - difference / effect) if effect else 0.0
    measured = f"{kept:.0%} of its effect of {effect:.2g} nats in training (mean |Δ| {difference:.2g})"
    if kept >= keep:
        return Verdict(Status.SAME, f"does nearly what it did in training: keeps {measured}; {keep:.0%} is enough")
    return Verdict(Status.DIFFERS, f"is loaded, but differs: keeps {measured}; {keep:.0%} would be enough")
