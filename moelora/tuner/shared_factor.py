"""The factor that all native experts of a module share in the shared-outer layout: the one on the hidden side.

That is A of the parameter that reads hidden states (`gate_up_proj`), and B of the one that writes them (`down_proj`).
The other factor stays an expert's own. Shapes: N native experts, r rank, D in, O out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SharedFactor(nn.Module):
    """A [r, D] or B [O, r] of all native experts, in the place of the linear in which PEFT keeps those of each.

    `weight`, and what a state dict has under that name, are in PEFT's layout, [N * r, D] or [O, r * N]: so PEFT merges
    it, and loads what is saved.
    """

    def __init__(self, linear: nn.Module, num_experts: int, is_lora_A: bool) -> None:
        super().__init__()
        self.num_experts, self.is_lora_A = num_experts, is_lora_A
        weight = linear.weight
        assert isinstance(weight, nn.Parameter)
        self.shared = nn.Parameter(self._of_one(weight.detach()).clone(), requires_grad=weight.requires_grad)

    @property
    def weight(self) -> Tensor:
        """See the class."""
        return self._of_each(self.shared)

    def _of_each(self, shared: Tensor) -> Tensor:
        """PEFT's layout of one factor for every expert."""
        if self.is_lora_A:
            return shared.repeat(self.num_experts, 1)
        return shared.repeat_interleave(self.num_experts, dim=1)

    def _of_one(self, weight: Tensor) -> Tensor:
        """The first expert's part of a weight in PEFT's layout."""
        if self.is_lora_A:
            return weight[: len(weight) // self.num_experts]
        return weight[:, :: self.num_experts]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{prefix}weight"
        weight = state_dict.get(name)
        if weight is None:
            missing_keys.append(name)
            return
        if weight.shape != self.weight.shape:
            error_msgs.append(f"{name} has shape {tuple(weight.shape)}, and {tuple(self.weight.shape)} is wanted")
            return
        shared = self._of_one(weight)
        copies = self._of_each(shared)
        if not weight.is_meta and not torch.allclose(copies, weight, rtol=0.0, atol=0.0, equal_nan=True):
            error_msgs.append(
                f"{name} differs from one native expert to another, and `share_native_outer` is for one that all share"
            )
        elif local_metadata.get("assign_to_params_buffers"):
            self.shared = nn.Parameter(shared.clone(), requires_grad=self.shared.requires_grad)
        else:
            with torch.no_grad():
                self.shared.copy_(shared)

    def extra_repr(self) -> str:
        return f"{tuple(self.shared.shape)} of {self.num_experts} native experts"
