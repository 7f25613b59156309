"""What a forward needs of the parts above it: the mixture's routers, and the linears that share an input.

Shapes: E experts of all active adapters, H router input width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from ..ops import ExpertPool
from ..routing.sums import RoutingTotals

Pool = tuple[tuple[str, int], ...]
"""(adapter name, number of experts), in expert order."""


class MixtureRouter(Protocol):
    """The router of one scope, as [`moelora.tuner.router.MoELoraRouter`] is."""

    name: str
    lora_router: nn.ModuleDict
    totals: RoutingTotals
    pending: Tensor | None
    disable_adapters: Any
    active_adapters: Any

    @property
    def pool(self) -> Pool:
        """The active adapters that it scores."""

    @property
    def routes_by_domain(self) -> bool:
        """Whether domains decide between its adapters."""

    def __getitem__(self, adapter_name: str) -> Any:
        """One adapter's [`ExpertRouter`]."""

    def set_adapter(self, adapter_names: str | list[str]) -> None:
        """Score with these adapters alone."""

    def active_routers(self) -> list[Any]:
        """The active adapters' [`ExpertRouter`], in expert order."""

    def maturity(self, copy: bool = True) -> Tensor:
        """[E]."""

    def check_made_for(self, config: Any) -> None:
        """Raise ValueError where the configuration has become another than the routers were made for."""

    def selection_bias(self, copy: bool = True) -> Tensor | None:
        """[E]; None where no bias balances the load."""

    def decide(self, hidden: Tensor, context: Any = None, without: int | None = None) -> Tensor:
        """[..., E] for hidden [..., H], as evaluation uses them."""

    def __call__(self, hidden: Tensor, context: Any, mask: Tensor | None = None, counts: bool = True) -> Tensor:
        """[..., E] for hidden [..., H]; what it did is reported to the context."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """See nn.Module."""


class SharingLinear(Protocol):
    """A routed linear that may read the same tensor as others, as [`moelora.tuner.layer.MoELoraLayer`] is."""

    base_layer: nn.Module
    link: Any
    active_adapters: list[str]
    is_left_to_peft: bool
    scaling: dict[str, float]
    _modules: dict[str, Any]

    def expert_pools(self) -> list[ExpertPool]:
        """The factors of every routed adapter; none where PEFT computes."""

    def routed_adapters(self) -> list[str]:
        """Names of the adapters that its weights are for, in expert order."""
