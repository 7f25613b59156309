"""Notice in time that a mixture degenerates: experts that nothing reaches, routers that choose the same few for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..config import MoELoraConfig
from ..routing.sums import RouterStats

SHOWN = 3  # a sick mixture is sick in many routers at once


class RoutingWarning(UserWarning):
    """A mixture degenerates in training."""


@dataclass
class RoutingGuard:
    """Follows a mixture from log to log and says, once each time, what goes wrong.

    An expert is dead when it was among no token's top k for `dead_after` steps. A router has collapsed when, for
    `collapsed_after` steps, as few experts as one token can use took `collapse_share` of all assignments (in a dense
    mixture: one expert took that share of the probability). Steps are counted from log to log. Forwards that were left
    out, because a router's numbers were not finite, are told at the first log after them.
    """

    dead_after: int
    collapsed_after: int
    collapse_share: float
    idle_steps: dict[tuple[str, int], int] = field(default_factory=dict)
    collapsed_steps: dict[str, int] = field(default_factory=dict)
    is_skipping: bool = False  # forwards were left out before the last log

    def check(self, stats: Mapping[str, RouterStats], steps: int, config: MoELoraConfig) -> list[str]:
        """The warnings that the last `steps` training steps, with these statistics, give rise to."""
        dead, collapsed = [], []
        running = {name: router for name, router in stats.items() if router.num_tokens}
        for name, router in running.items():
            idle = {(name, expert): expert in router.dead_experts for expert in range(len(router.expert_load))}
            dead += [
                key for key, is_idle in idle.items() if _crosses(self.idle_steps, key, is_idle, steps, self.dead_after)
            ]
            is_narrow = narrowness(router, config.top_k_experts) >= self.collapse_share
            if _crosses(self.collapsed_steps, name, is_narrow, steps, self.collapsed_after):
                collapsed.append(name)
        was_skipping, self.is_skipping = self.is_skipping, any(router.non_finite for router in stats.values())
        return (
            ([self._skip_message(stats)] if self.is_skipping and not was_skipping else [])
            + ([self._dead_message(dead, config)] if dead else [])
            + ([self._collapse_message(collapsed, stats, config)] if collapsed else [])
        )

    @staticmethod
    def _skip_message(stats: Mapping[str, RouterStats]) -> str:
        which = _list(name or "the model" for name, router in stats.items() if router.non_finite)
        return (
            f"{max(router.non_finite for router in stats.values())} forwards since the last log had a NaN or an "
            f"infinity in the router of {which}: they are left out of maturity, counters and statistics. Training goes "
            "on, but the loss of such a forward is not finite either: lower the learning rate or `max_grad_norm`, look "
            "for the batch, or train in bfloat16 in place of float16"
        )

    def _dead_message(self, dead: list[tuple[str, int]], config: MoELoraConfig) -> str:
        which = _list(f"expert {expert} of {name or 'the model'}" for name, expert in dead)
        return (
            f"no token has chosen {which} for {self.dead_after} steps: it is dead weight. Training goes on. "
            f"To revive it raise `router_aux_loss_coef` ({config.router_aux_loss_coef}) or `router_temperature` "
            f"({config.router_temperature}), or let it act on every token again with "
            "`model.set_expert_maturity(expert, 0)` under router_type='learned_with_maturity'; if the loss does not "
            "need it, train with fewer `num_experts`"
        )

    def _collapse_message(self, collapsed: list[str], stats: Mapping[str, RouterStats], config: MoELoraConfig) -> str:
        share = min(narrowness(stats[name], config.top_k_experts) for name in collapsed)
        which = _list(name or "the model" for name in collapsed)
        return (
            f"the router of {which} has collapsed: for {self.collapsed_after} steps {share:.0%} of its choices went to "
            "the same few experts, whatever the token. Training goes on. Raise `router_aux_loss_coef` "
            f"({config.router_aux_loss_coef}) or `router_temperature` ({config.router_temperature}), or lower the "
            "learning rate; with `expert_capacity_factor` set, an expert cannot take more than its share"
        )


def narrowness(router: RouterStats, top_k: int) -> float:
    """Share of the choices that goes to as few experts as one token can use; 1 is complete collapse.

    A dense router (top_k of E or more) assigns every token to every expert, so there the probability decides.
    """
    shares = router.expert_load if top_k < len(router.expert_load) else router.mean_probability
    return sum(sorted(shares, reverse=True)[: top_k if top_k < len(shares) else 1])


def _crosses(counts: dict, key: object, is_bad: bool, steps: int, limit: int) -> bool:
    """Count the steps that something has been bad for; True when that reaches the limit, once until it recovers."""
    before = counts.get(key, 0)
    counts[key] = before + steps if is_bad else 0
    return before < limit <= counts[key]


def _list(names: Iterable[str]) -> str:
    items = list(names)
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more
