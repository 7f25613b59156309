"""The router types "learned" and "learned_with_maturity": top-k of a softmax."""

from .kinds import RouterKind, register_router_kind
from .scorers import Router

register_router_kind(
    RouterKind(
        name="learned",
        help="top-k",
        weights="w_e = p_e / Σ_S p for e in S, else 0",
        make=Router,
        has_kernel=True,
    )
)
register_router_kind(
    RouterKind(
        name="learned_with_maturity",
        help="an expert is dense while new and sparse once mature",
        weights="w_e ∝ p_e · (1 if e ∈ S else 1 - m_e), normalised to 1",
        make=Router,
        matures=True,
        has_kernel=True,
    )
)
