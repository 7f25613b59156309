"""The routing in force inside one block: which weights a linear of it gets for what it reads.

Shapes: B batch, S sequence, E experts of all active adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops import ExpertPairs, chooses_sparse, scaled_weights, serves_sparse
from ..routing.decision import used_experts
from .alignment import fit
from .interfaces import MixtureRouter, Pool
from .joint_blocks import reads_text
from .shared_input import BoundGroup, SharedInput
from .state import ForwardContext, call_attached_router


@dataclass
class BlockRouting:
    """The routing in force inside one block, while it runs."""

    context: ForwardContext
    pool: Pool  # those that the columns of weights belong to
    lead: torch.Size  # [B, S], or whatever precedes H in the block's hidden states
    mask: Tensor | None  # lead, False on padding
    weights: Tensor | None  # [*lead, E]; None where each module routes for itself
    shared_by_user: bool  # weights are the user's own or the attached router's
    router: MixtureRouter | None  # the block's or model's
    encoder_hidden: Tensor | None  # [B, S_enc, H], what cross-attention reads in a decoder block
    shared_input: SharedInput | None  # None under torch.compile, which fuses by itself
    may_be_padded: bool = False  # some tokens are, or may be, padding
    encoder_weights: Tensor | None = None
    text_first: bool | None = None  # where a row joins encoder_hidden and the block's own tokens; None: none does
    top_k: int | None = None  # experts of a token that weights give anything to, at most; None: maybe all
    _pairs: ExpertPairs | None = field(default=None, init=False)
    _scaled: dict[tuple, Tensor] = field(default_factory=dict, init=False)
    _used: dict[bool, tuple[int, ...] | None] = field(
        default_factory=dict, init=False
    )  # by the encoder's tokens or not

    def weights_for(self, x: Tensor, module: str) -> Tensor:
        """[..., E] for a linear's input x [..., D].

        Raises:
            ValueError: x holds other tokens than the block's.
        """
        if self._is_encoder(x, module):
            if self.encoder_weights is None:
                self.encoder_weights = self._route_encoder(x)
            return self.encoder_weights
        assert self.weights is not None
        fitted = self._joined_weights() if self._is_joined(x) else fit(self.weights, self.lead, x)
        if fitted is None:
            raise ValueError(
                f"`{module}` reads an input of shape {list(x.shape)}, which does not line up with the tokens "
                f'{list(self.lead)} entering its block; use router_scope="module" or exclude it from `target_modules`'
            )
        return fitted

    @property
    def is_constant(self) -> bool:
        """Whether all tokens of all forwards have the same weights."""
        is_given = self.shared_by_user or self.context.call.adapter_names is not None
        return not is_given and self.context.config.router_kind.is_constant

    def scaled_weights_for(self, x: Tensor, layer: Any, bound: BoundGroup) -> Tensor:
        """[T, E] for a linear's input x [..., D]: of its adapters, as [`scaled_weights`] makes them.

        Raises:
            ValueError: x holds other tokens than the block's.
        """
        if self.shared_by_user or self.context.config.router_scope != "block":
            return scaled_weights(self._weights_of(x, layer, bound), bound.group.scalings)
        key = (x.shape[:-1], self._is_encoder(x, layer.link.name), torch.is_grad_enabled(), bound.columns)
        scaled = self._scaled.get(key)
        if scaled is None:  # one step of autograd for all linears of the block
            scaled = self._scaled[key] = scaled_weights(self._weights_of(x, layer, bound), bound.group.scalings)
        return scaled

    def expert_pairs(self, x: Tensor, layer: Any, bound: BoundGroup) -> ExpertPairs | None:
        """The pairs that linears of x [..., D] compute; None where all experts are faster.

        They are sorted once for all linears, whose scalings may differ. A checkpoint's run has weights, and so pairs,
        of its own.

        Raises:
            ValueError: x holds other tokens than the block's.
        """
        if self.top_k is None or self.weights is None:
            return None
        num_experts = self.weights.shape[-1]
        top_k = min(self.top_k, num_experts)
        size = (self.lead.numel(), num_experts, top_k, bound.group.rank)
        if not chooses_sparse(*size, on_gpu=x.is_cuda) or not serves_sparse(x):
            return None
        weights = self._weights_of(x, layer, bound)
        if weights is not self.weights:
            return None
        has_gradient = weights.requires_grad and torch.is_grad_enabled()
        if self._pairs is None or self._pairs.weights.requires_grad != has_gradient:
            self._pairs = ExpertPairs.of(weights, top_k)
        return self._pairs

    def _weights_of(self, x: Tensor, layer: Any, bound: BoundGroup) -> Tensor:
        """[..., E] of the adapters of a group that reads x."""
        return columns(self.weights_for(x, layer.link.name), self.pool, bound.names).to(x.device)

    def used_experts(self, x: Tensor) -> tuple[int, ...] | None:
        """The experts that have any weight in what `weights_for` gives for x; None where that is not known."""
        is_encoder = self._is_encoder(x)
        if self._is_joined(x):
            return None
        if is_encoder not in self._used:
            weights = self.encoder_weights if is_encoder else self.weights
            self._used[is_encoder] = None if weights is None else used_experts(weights)
        return self._used[is_encoder]

    def mask_for(self, x: Tensor) -> Tensor | None:
        """The padding mask of a linear's input x [..., D] in "module" scope; None where none fits."""
        if self._is_encoder(x):
            return self.context.mask(x, is_decoder=False)
        return None if self.mask is None else fit(self.mask, self.lead, x)

    def _is_encoder(self, x: Tensor, module: str = "") -> bool:
        encoder = self.encoder_hidden
        if encoder is None:
            return False
        if encoder.shape[:-1] == self.lead == x.shape[:-1] and reads_text(module):
            return True
        # Identity first: encoder and decoder may be equally long. Device maps copy the tensor, so shape is next.
        return x is encoder or (x.shape[:-1] == encoder.shape[:-1] and x.shape[:-1] != self.lead)

    def _is_joined(self, x: Tensor) -> bool:
        """Whether x holds the tokens of text and picture in one row."""
        encoder = self.encoder_hidden
        if self.text_first is None or encoder is None or x.dim() != 3 or len(self.lead) != 2:
            return False
        return x.shape[1] == encoder.shape[1] + self.lead[1]

    def _joined_weights(self) -> Tensor:
        assert self.weights is not None and self.encoder_hidden is not None
        if self.encoder_weights is None:
            self.encoder_weights = self._route_encoder(self.encoder_hidden)
        rows = (self.encoder_weights, self.weights)
        return torch.cat(rows if self.text_first else rows[::-1], dim=1)

    def _route_encoder(self, x: Tensor) -> Tensor:
        """The encoder's tokens were counted in the encoder; here the same router only weighs them."""
        if self.shared_by_user and self.context.call.routing_weights is None:
            return call_attached_router(self.context.state, x)
        if self.shared_by_user:
            assert self.weights is not None
            return self.weights[:, :1].expand(*x.shape[:-1], -1)
        assert self.router is not None
        if self.context.call.adapter_names is not None:
            return self.router(x, self.context)
        weights = self.router.decide(x, self.context)
        return weights * self.context.config.routing_scale


def columns(weights: Tensor, pool: Pool, names: Sequence[str]) -> Tensor:
    """The columns of weights [..., E], whose experts are those of pool, of the adapters of these names."""
    pooled = [name for name, _ in pool]
    if pooled == names:
        return weights
    pieces = dict(zip(pooled, weights.split([count for _, count in pool], dim=-1), strict=True))
    return torch.cat([pieces[name] for name in names], dim=-1)
