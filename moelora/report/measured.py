"""What was measured of a mixture on texts, as arrays.

Shapes: D domains, R routers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .advice import Suggestion
from .geometry import Geometry
from .history import History
from .measure import Array, TokenView
from .specialisation import Specialisation


@dataclass(frozen=True)
class Measured:
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
