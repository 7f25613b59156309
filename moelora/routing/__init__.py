"""How tokens are routed, as maths on tensors: scorers, the decision, losses, statistics, the domain classifier."""

from .decision import FixedRouter, Router, Routing, route

__all__ = ["FixedRouter", "Router", "Routing", "route"]
