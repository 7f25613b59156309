"""What can be done with experts once they exist: import, export and the operations that reshape a mixture."""

from .growth import GrowthCallback, grow
from .memory import forget, refresh_gate, remember, remembers

__all__ = ["GrowthCallback", "forget", "grow", "refresh_gate", "remember", "remembers"]
