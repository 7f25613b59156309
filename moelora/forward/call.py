"""What the caller of a forward or of generate asked for: routing weights by hand, and which tokens they are for.

Shapes: B batch, S sequence, E experts of all active adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Call:
    """One call of a forward or of generate, which makes many forwards."""

    routing_weights: Tensor | None = None  # the caller's own
    copies: int | None = None  # rows that generate makes of each prompt, for beams and answers; None in a forward
    adapter_names: Sequence[str] | None = None  # of each sample, which it alone routes; None: all active ones do
    prefilled: bool = False  # generate is past the prompt
    _made: dict[Any, Any] = field(default_factory=dict)
    _pool: Any = None  # the adapters and experts that it was made for

    @property
    def is_generate(self) -> bool:
        """Whether it is one of generate, and not of a forward."""
        return self.copies is not None

    @property
    def repeats(self) -> bool:
        """Whether its forwards are many, and all alike: `once` serves."""
        return self.copies is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def begin_forward(self, pool: Any) -> None:
        """Forget what was made for other adapters than these: a generate may be told to go on with others."""
        if self._pool != pool:
            self._pool = pool
            self._made.clear()

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is made once for all forwards of a generate, in which nothing is learned or changed."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def weights_for(
        self, lead: torch.Size, num_experts: int, past_length: int | Tensor, is_encoder_decoder: bool = False
    ) -> Tensor | None:
        """The caller's weights as [*lead, E] for hidden states [*lead, H]; None if there are none.

        In generate they cover prompt and answer, one row for each prompt or, given as [B * copies, ...], one for each
        row that generate makes of the prompts.

        Args:
            past_length: tokens in the KV cache.

        Raises:
            ValueError: the shape does not fit; the message names both.
        """
        weights = self.routing_weights
        if weights is None:
            return None
        batch = lead[0]
        if weights.shape[-1:] != (num_experts,) or weights.dim() not in (2, len(lead) + 1):
            raise self._misfit(weights, lead, num_experts)
        if weights.dim() > 2 and is_encoder_decoder:
            raise ValueError(
                f"`routing_weights` has shape {list(weights.shape)}, expected {[batch, num_experts]}: encoder and "
                "decoder see different tokens, so pass one row per sequence"
            )
        if self.is_generate and batch == weights.shape[0] * (self.copies or 1):
            weights = weights.repeat_interleave(self.copies or 1, dim=0)
        if weights.dim() == 2 and weights.shape[0] == batch:
            return weights.view(batch, *(1 for _ in lead[1:]), num_experts).expand(*lead, num_experts)
        is_sequence = len(lead) == 2 and weights.dim() == 3 and weights.shape[0] == batch
        if self.is_generate and is_sequence and (self.prefilled or weights.shape[1] >= lead[1]):
            rows = past_length + torch.arange(lead[1], device=weights.device)
            return weights.index_select(1, rows.clamp(max=weights.shape[1] - 1))  # the last row holds on
        if weights.shape[:-1] != lead:
            raise self._misfit(weights, lead, num_experts)
        return weights

    def _misfit(self, weights: Tensor, lead: torch.Size, num_experts: int) -> ValueError:
        expected = " or ".join(dict.fromkeys(str([*tokens, num_experts]) for tokens in (lead, lead[:1])))
        given = f"`routing_weights` has shape {list(weights.shape)}, expected {expected}"
        is_expanded = (self.copies or 1) > 1 and weights.dim() > 1 and weights.shape[0] == lead[0] * (self.copies or 1)
        if is_expanded:
            given += f": the encoder reads each prompt once for its {self.copies} rows, so pass one row per prompt"
        return ValueError(given)
