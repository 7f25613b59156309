"""What a user does with a mixture: route by hand, attach a router, look at maturity and statistics.

Shapes: B batch, S sequence, H hidden, E experts of all active adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..config import MoELoraConfig
from ..forward.call import Call
from ..forward.delivery import warn_once
from ..forward.interfaces import MixtureRouter
from ..forward.removal import STATE_ATTRIBUTE
from ..forward.state import RoutingState, call_attached_router
from ..routing import FixedRouter
from ..routing.sums import RouterStats
from ..storage.attached_router import AwaitedRouter
from .mixed_batch import acting, check_adapter_names

_NO_CAPACITY = "`expert_capacity_factor` ({factor}) is off from here on: {reason}. Set it to None, which is the same"
_ROLLS_OUT = (
    "the mixture generates in training mode, where experts have no capacity, and a policy has to be trained as it "
    "rolled out (call `model.eval()` before a `generate` whose answers are not trained on)"
)


class RoutingControls:
    """The part of [`MoELoraModel`] that manages routing; reachable from the PeftModel too."""

    model: nn.Module
    peft_config: dict[str, MoELoraConfig]

    @property
    def routing_or_none(self) -> RoutingState | None:
        """The state that routers, blocks and layers share; None where nothing is routed."""
        return getattr(self.model, STATE_ATTRIBUTE, None)

    @property
    def routing(self) -> RoutingState:
        """The state that routers, blocks and layers share.

        Raises:
            ValueError: the model holds no mixture.
        """
        state = self.routing_or_none
        if state is None:
            raise ValueError(
                "this model holds no mixture: its adapters were made with `use_moe_routing=False`, or adapt nothing "
                "but the base's native experts, which the base's own router weighs"
            )
        return state

    # ---- forward -----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, routing_weights: Tensor | None = None, **kwargs: Any) -> Any:
        """The base model's forward, optionally under the caller's own routing_weights [B, S, E] or [B, E]."""
        if routing_weights is None:
            return self.model(*args, **kwargs)
        with self.forward_arguments(routing_weights):
            return self.model(*args, **kwargs)

    def forward_arguments(
        self, routing_weights: Tensor | None, adapter_names: list[str] | None = None
    ) -> AbstractContextManager[None]:
        """Put the caller's own routing weights in force for a forward or a generate.

        Raises:
            TypeError: routing_weights are no tensor.
            ValueError: there is no mixture to weigh, or adapter_names are given beside other weights.
        """
        if self.routing_or_none is None:
            if routing_weights is not None:
                raise ValueError(
                    "`routing_weights` needs a mixture, but `use_moe_routing` is False, or nothing is adapted but the "
                    "base's native experts"
                )
            return nullcontext()
        if routing_weights is not None and not isinstance(routing_weights, Tensor):
            raise TypeError(
                f"`routing_weights` ({type(routing_weights).__name__}) must be a tensor [B, S, E] or [B, E]"
            )
        if routing_weights is not None and any(getattr(module, "merged", False) for module in self.model.modules()):
            raise ValueError("`routing_weights` cannot act on merged experts; call `unmerge_adapter()` first")
        if adapter_names is None:
            return _in_force(self.routing, Call(routing_weights))
        check_adapter_names(self, adapter_names, routing_weights)
        return _in_force_with(self, adapter_names)

    # ---- routers -----------------------------------------------------------------------------------------------------

    def attach_router(self, module: nn.Module) -> None:
        """Let module decide instead of the built-in routers.

        Args:
            module: hidden_states [B, S, H] -> routing_weights [B, S, E]. It is called once per forward (once each for
                encoder and decoder) on what enters the first block, and every layer obeys. Its weights are used as
                given; no balancing loss is added. Where the mixture was loaded without the router that it was saved
                with, the saved weights are loaded into module.

        Raises:
            TypeError: module is no nn.Module.
            ValueError: there is no mixture, or the saved weights that wait for module do not fit it.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"`attach_router` takes an nn.Module, got {type(module).__name__}")
        state = self.routing
        if isinstance(state.attached, AwaitedRouter):
            state.attached.fill(module)
        device = next(self.model.parameters()).device
        self.router = module if device.type == "meta" else module.to(device)
        state.attached = self.router

    def detach_router(self) -> nn.Module:
        """Remove and return the attached router; the built-in ones decide again.

        Raises:
            ValueError: none is attached.
        """
        if self.routing.attached is None:
            raise ValueError("no router is attached; call `attach_router(module)` first")
        module, self.routing.attached = self.routing.attached, None
        del self.router
        return module

    def get_routing_weights(self, hidden_states: Tensor, block: int | str | None = None) -> Tensor:
        """Routing weights [B, S, E] (sum 1) for hidden_states [B, S, H], with gradients, as evaluation uses them.

        Args:
            block: which router, by block index or by name; needed where there are several and none is attached.

        Raises:
            ValueError: several routers fit, or none; the message lists them. Or the width H is not the router's, which
                only one with fixed weights, reading nothing, does not mind.
        """
        if block is None and self.routing.attached is not None:
            return call_attached_router(self.routing, hidden_states)
        return self._find_router(block).decide(hidden_states)

    def _find_router(self, block: int | str | None) -> MixtureRouter:
        routers = self.routing.routers
        if block is None:
            found = list(routers)
        elif isinstance(block, int):
            found = [name for name in routers if name.rpartition(".")[2] == str(block)]
        else:
            found = [name for name in routers if name == block] or [n for n in routers if n.endswith(f".{block}")]
        if len(found) != 1:
            fits = "several routers fit" if found else "no router fits"
            names = ", ".join(repr(name) for name in (found or routers))
            raise ValueError(f"{fits} `block` ({block!r}); pass one of {names}")
        return routers[found[0]]

    def set_routing_weights(self, weights: Tensor | Sequence[float]) -> None:
        """Set the constant weights [E] of a mixture with `router_type="fixed"`.

        Raises:
            ValueError: the router type is another, or weights are not E finite numbers.
        """
        state = self.routing
        if not state.config.router_kind.is_constant:
            raise ValueError(f"`set_routing_weights` needs router_type='fixed', not {state.config.router_type!r}")
        vector = torch.as_tensor(weights, dtype=torch.float32)
        if vector.shape != (state.num_experts,) or not bool(vector.isfinite().all()):
            raise ValueError(f"`weights` must be {state.num_experts} finite numbers, got {vector.tolist()}")
        shares = dict(zip((n for n, _ in state.pool), vector.split([c for _, c in state.pool]), strict=True))
        for router in state.routers.values():
            for name, _ in router.pool:
                fixed = router[name]
                assert isinstance(fixed, FixedRouter)
                fixed.set_weights(shares[name])

    @property
    def expert_maturity(self) -> Tensor:
        """Maturity [E] of the active experts, 0 new to 1 mature, averaged over routers.

        Raises:
            ValueError: no adapter is active.
        """
        self.routing.check_active()
        per_adapter = []
        for name, _ in self.routing.pool:
            routers = [router[name] for router in self.routing.routers.values() if name in router.lora_router]
            per_adapter.append(torch.stack([router.maturity.cpu() for router in routers]).mean(dim=0))
        return torch.cat(per_adapter)

    def set_expert_maturity(self, expert: int | str, value: float) -> None:
        """Set an expert's maturity in every router.

        Args:
            expert: its index in the mixture, or the name of an adapter, all of whose experts are set.
            value: in [0, 1]; 0: it acts on every token, 1: only on those that select it.

        Raises:
            ValueError: there is no such expert, or value is out of range.
        """
        if not 0 <= value <= 1:
            raise ValueError(f"`value` ({value!r}) is not a maturity; pass a number in [0, 1]")
        adapter_name, index = self._locate_expert(expert)
        for router in self.routing.routers.values():
            if adapter_name in router.lora_router:
                router[adapter_name].maturity[index] = value

    def _locate_expert(self, expert: int | str) -> tuple[str, int | slice]:
        if isinstance(expert, str) and expert in self.peft_config:
            return expert, slice(None)
        self.routing.check_active()
        if isinstance(expert, str):
            raise ValueError(f"`expert` ({expert!r}) is no adapter; there are {', '.join(self.peft_config)}")
        start = 0
        for name, count in self.routing.pool:
            if start <= expert < start + count:
                return name, expert - start
            start += count
        raise ValueError(f"`expert` ({expert!r}) does not exist; the mixture has experts 0 to {start - 1}")

    def routing_stats(self, reset: bool = False) -> dict[str, RouterStats]:
        """What each router did since the last reset, by router name; padding excluded (synchronises the device).

        The forwards that `generate` makes are not counted: they would pay for sums that nobody reads.

        Args:
            reset: start counting anew afterwards.

        Raises:
            ValueError: no adapter is active.
        """
        loss_type = self.routing.config.load_balance_loss_type
        stats = {}
        for name, router in self.routing.routers.items():
            report = router.totals.report(router.maturity(), loss_type) if router.pool else None
            if report is not None:
                stats[name] = report
            if reset:
                router.totals.reset()
        return stats

    @property
    def balancing_loss(self) -> Tensor | None:
        """The latest training forward's balancing loss, [] with gradient; None if there was none."""
        return self.routing.balancing_loss

    @contextmanager
    def generating(self, copies: int) -> Iterator[None]:
        """Within, the caller's own routing weights cover a growing text and `copies` beams or answers per prompt."""
        if self.routing_or_none is None:
            yield
            return
        self.note_roll_out()
        here = self.routing.in_force
        before, here.copies = here.copies, copies
        try:
            yield
        finally:
            here.copies = before

    def note_roll_out(self) -> None:
        """To be called before the mixture generates: in training mode it has no capacity from then on.

        Generation has none, for which it would have to know all tokens at once. The policy that is trained would be
        another than the one that rolled out.
        """
        if self.model.training:
            self.give_up_capacity(_ROLLS_OUT)

    def give_up_capacity(self, reason: str) -> None:
        """Let experts take every token in training too, and warn once where a capacity is set."""
        state = self.routing_or_none
        if state is None or state.is_dropless or not state.enabled:
            return
        state.is_dropless, config = True, state.config
        chooses = config.top_k_experts < state.num_experts and not config.router_kind.is_constant
        if chooses and config.expert_capacity_factor is not None:
            warn_once(state, _NO_CAPACITY.format(factor=config.expert_capacity_factor, reason=reason))


@contextmanager
def _in_force_with(tuner: RoutingControls, adapter_names: Sequence[str]) -> Iterator[None]:
    with acting(tuner, adapter_names), _in_force(tuner.routing, Call(adapter_names=adapter_names)):
        yield


@contextmanager
def _in_force(state: RoutingState, call: Call) -> Iterator[None]:
    here = state.in_force
    before = here.context, here.call, here.entry  # a forward may run inside generate
    call.copies, here.copies = here.copies, None
    here.call = call
    try:
        yield
    finally:  # the forward too: after an interrupt, which is no Exception, torch calls no closing hook of ours
        here.context, here.call, here.entry = before
