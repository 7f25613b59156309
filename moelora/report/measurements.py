"""What was measured of a mixture on texts, as arrays.

Shapes: D domains, R routers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..schema import did_you_mean
from .advice import Suggestion
from .geometry import Geometry
from .history import History
from .measure import Array, TokenView
from .specialisation import Specialisation


@dataclass(frozen=True)
class Measurements:
    """What was measured of a mixture on texts. Padding is in none of it.

    Attributes:
        domains, routers: names, in the order of D and R.
        experts: name of the adapter that holds each expert, in the order of E.
        num_tokens, num_documents: [D]; left_out: [D] documents beyond the limit on tokens.
        is_held_out: [D] whether the texts are known not to have been trained on.
        weight: [D, R, E] each expert's share of the routing weight.
        load: [D, R, E] its share of the top-k assignments.
        entropy, top1_probability: [D, R] means over tokens, NaN for an attached or fixed router.
        specialisation: None with fewer than two domains; unit_is_document: what its permutations move.
        loss: [D] nats per token.
        worth, worth_error: [D, E] loss without the expert minus loss with it, and its standard error; None where not
            measured. worth_tokens: [D] tokens it was measured on.
        maturity: [R, E]; sharpness: [R], NaN where routing is not learned.
        whole, by_router: the experts' geometry, over all linears and over each router's.
        history: None without a training log.
        suggestions: empty where every expert earns its place.
        tokens: [D] every token.
    """

    domains: list[str]
    routers: list[str]
    experts: list[str]
    top_k: int
    num_tokens: list[int]
    num_documents: list[int]
    left_out: list[int]
    is_held_out: list[bool]
    weight: Array
    load: Array
    entropy: Array
    top1_probability: Array
    specialisation: Specialisation | None
    unit_is_document: bool
    loss: Array
    worth: Array | None
    worth_error: Array | None
    worth_tokens: list[int]
    maturity: Array
    sharpness: list[float]
    whole: Geometry
    by_router: dict[str, Geometry]
    history: History | None
    suggestions: list[Suggestion]
    tokens: list[TokenView] = field(repr=False)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.experts)

    def geometry_of(self, router: str | None) -> Geometry:
        """Of the linears of a router, or of all.

        Raises:
            ValueError: there is no router of that name.
        """
        return self.whole if router is None else self.by_router[self.known_router(router)]

    def known_router(self, router: str) -> str:
        """The router's name, checked.

        Raises:
            ValueError: there is no router of that name.
        """
        if router not in self.routers:
            hint = did_you_mean(router, self.routers) or f"; there are {', '.join(self.routers)}"
            raise ValueError(f"`router` ({router!r}) does not exist{hint}")
        return router


def short_names(routers: list[str]) -> list[str]:
    """Router names without what all of them begin with.

    Example:
        >>> short_names(["model.layers.0", "model.layers.10"]), short_names(["model"])
        (['0', '10'], ['model'])
    """
    split = [name.split(".") for name in routers]
    shared = 0
    while len(routers) > 1 and all(len(parts) > shared + 1 for parts in split):
        if len({parts[shared] for parts in split}) > 1:
            break
        shared += 1
    return [".".join(parts[shared:]) for parts in split]
