"""What only the training loop knows of a step."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainingLoop:
    """What only the training loop knows, as MoELoraCallback tells it.

    Attributes:
        micro_batches: that an optimizer step has; the last one of an epoch may have fewer.
        left: those that this step has yet to make, the present one included.
        scaler: weak, of a torch.amp.GradScaler.
    """

    micro_batches: int
    scaler: weakref.ref[Any] | None = None
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.begin_step()

    def begin_step(self) -> None:
        """A new optimizer step."""
        self.left = self.micro_batches

    def end_micro_batch(self) -> None:
        """One that is not the last of its step has ended."""
        self.left -= 1

    def share(self, is_last: bool) -> float:
        """This micro-batch's part of its step; the last one takes all that is left."""
        return (self.left if is_last else 1) / self.micro_batches
