"""The router type "sigmoid": experts are scored each for itself (DeepSeek-V3, arXiv:2412.19437, eq. 12 to 15)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .kinds import RouterKind, register_router_kind
from .scorers import Router


class SigmoidRouter(Router):
    """Its logits are ``log sigmoid(z)``, so that their softmax is the scores ``sigmoid(z)`` divided by their sum."""

    def logits(self, first: Tensor) -> Tensor:
        """Logits [..., E] from the product with first_weight, [..., N]."""
        return F.logsigmoid(super().logits(first))

    def log_scores(self, logits: Tensor, temperature: float) -> Tensor:
        """See [`Router`]; the scores are not divided by their sum."""
        return logits / temperature


register_router_kind(
    RouterKind(
        name="sigmoid",
        help="top-k of sigmoid scores, normalised over the chosen",
        weights="as `learned`, with z = log sigmoid(router(rms_norm(h))), so that p is sigmoid over its sum",
        make=SigmoidRouter,
        scores_each_alone=True,
    )
)
