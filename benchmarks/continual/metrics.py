"""What a run is worth: a[i][j] is the score, in percent, on task j after learning task i, of T tasks.

Definitions as the field's: Chaudhry et al. 2018 (arXiv:1801.10112), Lopez-Paz and Ranzato 2017 (arXiv:1706.08840).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Matrix = Sequence[Sequence[float]]  # row i holds at least the scores on tasks 0 ... i


def average_performance(matrix: Matrix) -> float:
    """AP: the mean score on all tasks after the last one.

    Example:
        >>> average_performance([[80.0], [60.0, 90.0]])
        75.0
    """
    return statistics.fmean(matrix[-1])


def forgetting(matrix: Matrix) -> float:
    """FT: how far below its best earlier score a task ends, mean over all but the last; 0 for one task.

    Example:
        >>> forgetting([[80.0], [60.0, 90.0]])
        20.0
    """
    last = len(matrix) - 1
    lost = [max(matrix[i][j] for i in range(j, last)) - matrix[last][j] for j in range(last)]
    return statistics.fmean(lost) if lost else 0.0


def backward_transfer(matrix: Matrix) -> float:
    """BWT: a task's last score minus that right after learning it, mean over all but the last; 0 for one task.

    Example:
        >>> backward_transfer([[80.0], [60.0, 90.0]])
        -20.0
    """
    last = len(matrix) - 1
    changes = [matrix[last][j] - matrix[j][j] for j in range(last)]
    return statistics.fmean(changes) if changes else 0.0


def forward_transfer(matrix: Matrix, alone: Sequence[float]) -> float:
    """FWT: a task's score right after learning it minus that of learning it alone, mean over all but the first.

    Example:
        >>> forward_transfer([[80.0], [60.0, 90.0]], alone=[80.0, 85.0])
        5.0
    """
    gains = [matrix[j][j] - alone[j] for j in range(1, len(matrix))]
    return statistics.fmean(gains) if gains else 0.0


@dataclass(frozen=True)
class Summary:
    """The four of one run; forward_transfer is None where nothing is known of learning alone."""

    average_performance: float
    forgetting: float
    backward_transfer: float
    forward_transfer: float | None

    @classmethod
    def of(cls, matrix: Matrix, alone: Sequence[float] | None = None) -> Summary:
        """Of a whole run's matrix; for one that learned all tasks together only AP says something."""
        transfer = None if alone is None else forward_transfer(matrix, alone)
        return cls(average_performance(matrix), forgetting(matrix), backward_transfer(matrix), transfer)
