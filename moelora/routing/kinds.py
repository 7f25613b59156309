"""The router types there are. A new one is a file beside this that registers it, and a line in `__init__.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .scorers import ExpertRouter


@dataclass(frozen=True)
class RouterKind:
    """One value of `router_type`.

    Attributes:
        help: what it does, as the configuration's help has it.
        weights: how weights come from logits, as docs/maths.md has it.
        make: makes an adapter's router; called with hidden_size and num_experts, and by name with
            router_hidden_size, domain_rank and has_bias.
        is_constant: weights are the same for every token: nothing is learned, and the mixture can be merged.
        matures: a new expert acts on every token until it is mature.
        scores_each_alone: an expert's score does not depend on the others', as a softmax's does.
        has_kernel: the Triton router computes it.
    """

    name: str
    help: str
    weights: str
    make: Callable[..., ExpertRouter]
    is_constant: bool = False
    matures: bool = False
    scores_each_alone: bool = False
    has_kernel: bool = False

    @property
    def is_sparse(self) -> bool:
        """Whether an expert outside a token's top-k weighs exactly nothing, so that it need not be computed."""
        return not (self.is_constant or self.matures)


ROUTER_KINDS: dict[str, RouterKind] = {}


def register_router_kind(kind: RouterKind) -> None:
    """Let `router_type` have this value."""
    ROUTER_KINDS[kind.name] = kind
