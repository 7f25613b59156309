"""Do domains use different experts, or is it chance? Mutual information, and what it would be among shuffled documents.

Shapes: U units (documents), D domains, R routers, E experts, P permutations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Specialisation:
    """Mutual information between domain and expert, in bits, for each router; the last entry is the mean of routers.

    Attributes:
        observed: [R + 1].
        chance: [R + 1] mean over permutations.
        low, high: [R + 1] the middle 95% of the permutations.
        p_value: [R + 1] share of the permutations (the observed one included) at least as high as observed.
        maximum: the most there can be: log2 of the number of domains or experts, whichever is smaller.
    """

    observed: Array
    chance: Array
    low: Array
    high: Array
    p_value: Array
    maximum: float


def mutual_information(weight_DRE: Array) -> Array:
    """[R] bits: how much the expert tells about the domain, for a domain drawn evenly, a token of it, and an expert
    drawn by the token's routing weights.

    Drawing the domain evenly makes the value independent of how much text each domain brings. It is the generalised
    Jensen-Shannon divergence of the domains' expert shares: 0 when all use the same mixture of experts.

    Example:
        >>> mutual_information(np.array([[[9.0, 0.0]], [[0.0, 1.0]]])).tolist()
        [1.0]
        >>> mutual_information(np.array([[[3.0, 1.0]], [[6.0, 2.0]]])).tolist()
        [0.0]
    """
    shares = weight_DRE / np.maximum(weight_DRE.sum(-1, keepdims=True), 1e-300)
    mean = shares.mean(axis=0)
    ratio = np.where(shares > 0, shares / np.where(mean > 0, mean, 1.0), 1.0)
    return np.maximum((shares * np.log2(ratio)).sum(-1).mean(0), 0.0)


def specialisation(
    weight_URE: Array, domain_U: NDArray[np.int64], num_domains: int, permutations: int = 500, seed: int = 0
) -> Specialisation:
    """Mutual information and its distribution when whole units change domains, each domain keeping its number of them.

    Tokens of one document resemble each other, so shuffling tokens would make chance look smaller than it is.

    Args:
        weight_URE: routing weight that the unit's tokens gave each expert.
        domain_U: the domain of each unit.
    """
    units, routers, experts = weight_URE.shape
    flat = weight_URE.reshape(units, routers * experts)

    def measure(labels: NDArray[np.int64]) -> Array:
        members = np.zeros((num_domains, units))
        members[labels, np.arange(units)] = 1
        by_router = mutual_information((members @ flat).reshape(num_domains, routers, experts))
        return np.append(by_router, by_router.mean())

    generator = np.random.default_rng(seed)
    observed = measure(domain_U)
    shuffled = np.stack([measure(generator.permutation(domain_U)) for _ in range(permutations)])
    low, high = np.quantile(shuffled, [0.025, 0.975], axis=0)
    # Rounding must not make a permutation that leaves everything in place look smaller than what was observed.
    reached = (shuffled >= observed - 1e-12).sum(0)
    return Specialisation(
        observed=observed,
        chance=shuffled.mean(0),
        low=low,
        high=high,
        p_value=(reached + 1) / (permutations + 1),
        maximum=float(np.log2(max(1, min(num_domains, experts)))),
    )
