"""How tokens are routed, as maths on tensors: router types, the decision, balancing losses, statistics.

Every router type and every balancing loss registers itself when its file is imported: here.
"""

# isort: off
from . import learned, fixed, sigmoid, loss_free  # in the order in which errors and docs list them

# isort: on
from .balancing import BALANCING_LOSSES, BalancingLoss, register_balancing_loss
from .decision import Routing, route
from .fixed import FixedRouter
from .kinds import ROUTER_KINDS, RouterKind, register_router_kind
from .scorers import ExpertRouter, Router, rms_norm

__all__ = [
    "BALANCING_LOSSES",
    "ROUTER_KINDS",
    "BalancingLoss",
    "ExpertRouter",
    "FixedRouter",
    "Router",
    "RouterKind",
    "Routing",
    "fixed",
    "learned",
    "loss_free",
    "register_balancing_loss",
    "register_router_kind",
    "rms_norm",
    "route",
    "sigmoid",
]
