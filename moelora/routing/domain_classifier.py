"""Which adapter a text is for: statistics of each adapter's domain, and the classifier that follows from them.

An adapter that was grown for a domain keeps the mean and covariance of that domain's router inputs, and no texts. From
several such adapters follows a linear discriminant with one covariance for all (Fisher 1936; Rao 1948): the log density
of a token under each adapter's domain, up to a term that all share. A token alone says little, so the densities of the
tokens up to it are added up: of a window of so many, or of the whole text so far. Imports torch only; docs/maths.md has
the formulas.

Shapes: B batch, S sequence, T tokens, H router input width, A adapters, E experts, K directions, L sketch width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

RIDGE = 1e-3
"""Share of the mean variance that is added to every direction: few tokens leave some without any."""
FIRST_TOKENS = 1 / 16
"""Share of a domain that first tokens of texts stand for, however long its texts are. To a model the first token is
like no other and much alike in all texts: by its own share it would tell long texts from short ones, not domains."""
_ATTRIBUTE = "_moelora_densities"  # on a KV cache: the densities of the tokens in it


@dataclass(frozen=True)
class DomainStatistics:
    """Of an adapter's domain at one router; the covariance is directions^T directions + variance."""

    mean: Tensor  # [H]
    directions: Tensor  # [K, H]
    variance: Tensor  # [H], what the directions leave out

    @classmethod
    def of(cls, mean: Tensor, rows_NH: Tensor, diagonal_H: Tensor, rank: int) -> DomainStatistics:
        """With the `rank` largest directions of rows^T rows, and the covariance's diagonal [H] as given; float64."""
        _, singular, right = torch.linalg.svd(rows_NH, full_matrices=False)
        directions = rows_NH.new_zeros(rank, len(diagonal_H))
        found = (singular[:, None] * right)[:rank]
        directions[: len(found)] = found
        variance = (diagonal_H - directions.square().sum(0)).clamp(min=0)
        return cls(mean.float(), directions.float(), variance.float())

    def covariance(self) -> Tensor:
        """[H, H]."""
        return self.directions.t() @ self.directions + self.variance.diag()

    def equals(self, other: DomainStatistics) -> bool:
        """Whether both are of one domain, to the last bit."""
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in vars(self))


def distinct(domains: Sequence[DomainStatistics]) -> list[DomainStatistics]:
    """Without those that equal an earlier one."""
    found: list[DomainStatistics] = []
    for domain in domains:
        if not any(domain.equals(other) for other in found):
            found.append(domain)
    return found


class InputSketch:
    """Streams a router's normalised inputs into a [`DomainStatistics`], keeping [H, L] numbers and no input.

    The covariance is that of sums over pieces of text, per token: ``E (sum_t (n_t - mu)) (sum_t (n_t - mu))^T / E
    tokens``. Of single tokens it is the ordinary one. Nystrom approximation from one pass, with a random orthonormal
    test matrix (Tropp et al., arXiv:1706.05736); exact where K >= H.

    Args:
        hidden_size: H.
        rank: K.
    """

    def __init__(self, hidden_size: int, rank: int, device: torch.device | str = "cpu") -> None:
        self.rank = min(rank, hidden_size)
        generator = torch.Generator().manual_seed(0)
        width = min(2 * self.rank, hidden_size)
        random = torch.randn(hidden_size, width, generator=generator, dtype=torch.float64)
        self.test_HL = torch.linalg.qr(random).Q.to(device, torch.float32)
        self.sketch_HL = torch.zeros_like(self.test_HL)
        # Of a piece: n tokens, whose inputs' sum is s.
        self.sum_H, self.tokens_sums_H, self.squares_H = torch.zeros(3, hidden_size, device=device)  # s, n s, s^2
        self.tokens, self.squared_tokens, self.pieces = 0, 0, 0
        self.origin_H: Tensor | None = None  # the first inputs' mean: a few numbers of hidden states are huge

    def add(self, normed_TH: Tensor, piece_T: Tensor | None = None) -> None:
        """Add the inputs of some tokens, float32.

        Args:
            piece_T: a number for the piece that each belongs to, all of whose tokens are here; by default each token is
                one.
        """
        if normed_TH.shape[0] == 0:
            return
        if self.origin_H is None:
            self.origin_H = normed_TH.mean(0)
        sums_PH = normed_TH - self.origin_H
        tokens_P = torch.ones_like(sums_PH[:, 0])
        if piece_T is not None:
            _, place_T, counts = piece_T.unique(return_inverse=True, return_counts=True)
            tokens_P = counts.to(sums_PH.dtype)
            sums_PH = sums_PH.new_zeros(len(counts), sums_PH.shape[1]).index_add_(0, place_T, sums_PH)
        self.tokens += len(normed_TH)
        self.squared_tokens += int(tokens_P.double().square().sum())
        self.pieces += len(tokens_P)
        self.sum_H += sums_PH.sum(0)
        self.tokens_sums_H += tokens_P @ sums_PH
        self.squares_H += sums_PH.square().sum(0)
        self.sketch_HL += sums_PH.t() @ (sums_PH @ self.test_HL)

    def finish(self) -> DomainStatistics:
        """What was seen, float32 on the CPU.

        Raises:
            ValueError: no token was added.
        """
        if self.origin_H is None:
            raise ValueError("statistics of a domain need tokens, got none; give more texts")
        sums = (self.test_HL, self.sketch_HL, self.sum_H, self.tokens_sums_H, self.squares_H)
        test, sketch, total, weighed, squares = (tensor.double().cpu() for tensor in sums)
        moved = total / self.tokens
        # The sum over pieces of (s - n m)(s - n m)^T, for their mean m: its diagonal, its product with the test matrix.
        diagonal = squares - 2 * weighed * moved + self.squared_tokens * moved.square()
        across = self.squared_tokens * moved - weighed
        product = sketch - moved[:, None] * (weighed @ test) + across[:, None] * (moved @ test)
        diagonal, product = diagonal.clamp(min=0) / self.tokens, product / self.tokens
        core = test.t() @ product
        values, vectors = torch.linalg.eigh((core + core.t()) / 2)
        kept = values > 1e-6 * values[-1]  # below lies rounding
        basis = product @ (vectors[:, kept] * values[kept].rsqrt())
        return DomainStatistics.of(self.origin_H.cpu() + moved, basis.t(), diagonal, self.rank)


def combined(domains: Sequence[DomainStatistics], rank: int, shares: Sequence[float] | None = None) -> DomainStatistics:
    """One domain of several: mean and covariance are those of the mixture of Gaussians.

    ``mu = sum_a p_a mu_a`` and ``S = sum_a p_a (S_a + (mu_a - mu)(mu_a - mu)^T)``, of which `rank` directions are kept,
    and of the others the diagonal.

    Args:
        shares: the p_a, which sum to 1; all count alike by default.

    Example:
        >>> near, far = (DomainStatistics(torch.tensor([m]), torch.zeros(1, 1), torch.ones(1)) for m in (0.0, 2.0))
        >>> both = combined([near, far], 1)
        >>> both.mean.item(), round(both.covariance().item(), 4)
        (1.0, 2.0)
    """
    means = torch.stack([domain.mean for domain in domains]).double()
    shares_A1 = torch.tensor(shares or [1 / len(domains)] * len(domains), dtype=torch.float64)[:, None]
    middle = (shares_A1 * means).sum(0)
    roots = shares_A1.sqrt()
    apart = [root * domain.directions.double() for root, domain in zip(roots, domains, strict=True)]
    rows = torch.cat([*apart, roots * (means - middle)])
    left_out = (shares_A1 * torch.stack([domain.variance for domain in domains]).double()).sum(0)
    return DomainStatistics.of(middle, rows, left_out + rows.square().sum(0), rank)


def discriminants(domains: Sequence[DomainStatistics]) -> tuple[Tensor, Tensor]:
    """Weights [A, H] and biases [A] of every domain's log density: ``weight @ n + bias`` for a normalised input n.

    With the domains' mean covariance S (plus a ridge) and their mean m: ``(mu_a - m)^T S^-1 (n - (mu_a + m) / 2)``,
    which is ``log N(n; mu_a, S) - log N(n; m, S)``.

    Example:
        >>> near, far = (DomainStatistics(torch.tensor([m]), torch.zeros(1, 1), torch.ones(1)) for m in (0.0, 2.0))
        >>> weights, biases = discriminants([near, far])
        >>> [round(float(d), 2) for d in weights @ torch.tensor([2.0]) + biases]  # two apart: half a square of two
        [-1.5, 0.5]
    """
    means = torch.stack([domain.mean for domain in domains]).double()
    rows = torch.cat([domain.directions for domain in domains]).double() * len(domains) ** -0.5
    diagonal = torch.stack([domain.variance for domain in domains]).double().mean(0)
    diagonal += RIDGE * (diagonal + rows.square().sum(0)).mean()
    middle = means.mean(0)
    weights = _times_inverse(means - middle, rows, diagonal)
    biases = -(weights * (means + middle) / 2).sum(-1)
    return weights.float(), biases.float()


def _times_inverse(x_AH: Tensor, rows_UH: Tensor, diagonal_H: Tensor) -> Tensor:
    """x (rows^T rows + diagonal)^-1 [A, H]. Woodbury's identity needs no [H, H] where there are fewer rows than H."""
    if len(rows_UH) >= len(diagonal_H):
        return torch.cholesky_solve(x_AH.t(), torch.linalg.cholesky(rows_UH.t() @ rows_UH + diagonal_H.diag())).t()
    scaled_UH, x_AH = rows_UH / diagonal_H, x_AH / diagonal_H
    core = torch.linalg.cholesky(torch.eye(len(rows_UH), dtype=rows_UH.dtype) + scaled_UH @ rows_UH.t())
    return x_AH - torch.cholesky_solve(rows_UH @ x_AH.t(), core).t() @ scaled_UH


class ContextDensities:
    """What the tokens in a KV cache said, by router, so that text read piece by piece is told as in one forward.

    It follows its sequences where the cache reorders, repeats or selects them, as beam search does. Tokens that are
    taken back (assisted generation crops the cache) are dropped: as many as a window has, or any number without one.

    Args:
        is_static: the cache stays as large as it is, so that forwards can be compiled; no token is taken back then, and
            what is kept stays of one shape and stride, or each token would be compiled anew.
    """

    def __init__(self, is_static: bool = False) -> None:
        self.is_static = is_static
        self.kept: dict[str, tuple[Tensor, Any]] = {}  # by router: [B, P, A], and the position after the last

    @classmethod
    def on(cls, cache: Any) -> ContextDensities:
        """What a KV cache keeps; nothing yet where it keeps none, or there is no cache."""
        return getattr(cache, _ATTRIBUTE, None) or cls(bool(getattr(cache, "is_compileable", False)))

    def keep_on(self, cache: Any) -> None:
        """Keep it on a KV cache, if there is one and there is any."""
        if self.kept and hasattr(cache, "get_seq_length"):
            setattr(cache, _ATTRIBUTE, self)
            if not torch.compiler.is_compiling() and not isinstance(cache, _FollowedCache):
                cache.__class__ = _followed(cache.__class__)

    def select(self, rows: Tensor) -> None:
        """Go on with these of the sequences, in this order."""
        for key, (kept_BPA, end) in self.kept.items():
            self.kept[key] = kept_BPA[rows.to(kept_BPA.device)], end

    def repeat(self, repeats: int) -> None:
        """Go on with each of the sequences so many times, one beside the other."""
        for key, (kept_BPA, end) in self.kept.items():
            self.kept[key] = kept_BPA.repeat_interleave(repeats, dim=0), end

    def over_text(self, key: str, densities_BSA: Tensor, past_length: int | Tensor) -> Tensor:
        """[B, S, A]: densities summed over each token and all before it; past_length tokens are in the cache."""
        before_BPA = self._before(key, densities_BSA, past_length)
        sums_BSA = densities_BSA.cumsum(1) + before_BPA[:, -1:].sum(1, keepdim=True)  # of nothing: zero
        if self.is_static:
            kept_BPA = sums_BSA[:, -1:].clone(memory_format=torch.contiguous_format)
        else:
            kept_BPA = torch.cat([before_BPA, sums_BSA], dim=1)
        self.kept[key] = kept_BPA.detach(), past_length + densities_BSA.shape[1]
        return sums_BSA

    def over_window(self, key: str, densities_BSA: Tensor, past_length: int | Tensor, window: int) -> Tensor:
        """[B, S, A]: densities summed over each token and the window - 1 before it."""
        before_BPA = self._before(key, densities_BSA, past_length)
        together = torch.cat([before_BPA, densities_BSA], dim=1)
        # Only where tokens can be taken back are more of use. Of one kept too many, for a window of 1, nothing is read.
        size = max(window - 1, 1) if self.is_static else 2 * window
        self.kept[key] = together[:, -size:].detach(), past_length + densities_BSA.shape[1]
        total = together.cumsum(1)
        back = min(window, total.shape[1])
        return (total - F.pad(total[:, :-back], (0, 0, back, 0)))[:, -densities_BSA.shape[1] :]

    def _before(self, key: str, densities_BSA: Tensor, past_length: int | Tensor) -> Tensor:
        """What is kept [B, P, A] of the tokens in the cache."""
        before_BPA, end = self.kept.get(key, (None, 0))
        if before_BPA is None or before_BPA.shape[::2] != densities_BSA.shape[::2]:
            return densities_BSA[:, :0].detach()
        if self.is_static:
            return before_BPA * (past_length > 0)  # it may have been emptied, which is known on the device
        return before_BPA[:, : max(0, before_BPA.shape[1] - (end - past_length))]


_CacheBase: Any = object  # of which classes `_followed` makes a mixture with transformers' own


class _FollowedCache(_CacheBase):
    """Mixed into the class of a KV cache: what is done to its sequences is done to their densities.

    A class, and no function set on the cache, which would refer back to it and keep its memory until the next garbage
    collection.
    """

    plain: type

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """See transformers."""
        super().reorder_cache(beam_idx)
        getattr(self, _ATTRIBUTE).select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """See transformers."""
        super().batch_select_indices(indices)
        getattr(self, _ATTRIBUTE).select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See transformers."""
        super().batch_repeat_interleave(repeats)
        getattr(self, _ATTRIBUTE).repeat(repeats)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles are of the plain class, which can be imported; the next forward sees to them.
        _, _, *state = super().__reduce_ex__(protocol)
        return object.__new__, (self.plain,), *state


@cache
def _followed(cls: type) -> type:
    """A KV cache class with [`_FollowedCache`] mixed in."""
    return type(f"Followed{cls.__name__}", (_FollowedCache, cls), {"plain": cls})


def over_context(
    densities_BSA: Tensor,
    window: int | None,
    mask_BS: Tensor | None = None,
    earlier: ContextDensities | None = None,
    key: str = "",
    past_length: int | Tensor = 0,
) -> Tensor:
    """[B, S, A]: log densities summed over each token and those before it; padding adds nothing.

    Args:
        window: number of tokens to sum over, the token itself being the last; None: the whole text so far.
        mask_BS: bool, False on padding.
        earlier: what the tokens in the KV cache said; what these tokens say, by the router `key`, joins it.
        past_length: number of tokens in the cache.

    Example:
        >>> ones = torch.ones(1, 100, 1)
        >>> over_context(ones, 64)[0, [0, 1, 99], 0].tolist(), over_context(ones, None)[0, [0, 1, 99], 0].tolist()
        ([1.0, 2.0, 64.0], [1.0, 2.0, 100.0])
    """
    if mask_BS is not None:
        densities_BSA = torch.where(mask_BS[..., None], densities_BSA, 0)  # padding may be NaN, which times 0 stays
    earlier = ContextDensities() if earlier is None else earlier
    if window is None:
        return earlier.over_text(key, densities_BSA, past_length)
    return earlier.over_window(key, densities_BSA, past_length, window)


def within_pieces(densities_TA: Tensor, start_T: Tensor) -> Tensor:
    """[T, A]: log densities summed over each token and those before it in its piece of text; pieces of several follow
    one another in a row.

    What is not finite adds nothing, for it would reach the pieces behind it.

    Args:
        start_T: index of the first token of each one's piece.

    Example:
        >>> within_pieces(torch.ones(5, 1), torch.tensor([0, 0, 0, 3, 3])).flatten().tolist()
        [1.0, 2.0, 3.0, 1.0, 2.0]
    """
    # Transposed: a GPU adds up along the last dimension with many threads, along others with one.
    total_AT = densities_TA.nan_to_num(0.0, 0.0, 0.0).t().cumsum(1)
    before_AT = F.pad(total_AT, (1, 0))[:, start_T]
    return (total_AT - before_AT).t()


def logits_by_domain(
    logits: Sequence[Tensor], densities_TA: Tensor, temperature: float, same_AA: Tensor | None = None
) -> Tensor:
    """[T, E] logits under which the experts of a domain together get its share of the probability.

    ``p_e = softmax_d(densities)_d * softmax_{e in d}(logits / temperature)_e`` for expert e of domain d: scores of one
    domain cannot take from another, whatever they have learned.

    Args:
        logits: each adapter's own, [T, E_a]; -inf is an expert that is left out.
        densities_TA: of each adapter's domain.
        same_AA: bool, whether two adapters are of one domain, as the parts of an adapter that was split; each is of a
            domain of its own by default.
    """
    if same_AA is None:
        same_AA = torch.eye(len(logits), dtype=torch.bool, device=densities_TA.device)
    own = [piece / temperature for piece in logits]
    totals_TA = torch.stack([piece.logsumexp(-1) for piece in own], dim=-1)
    of_domain_TA = (totals_TA[:, None] + same_AA.float().log()).logsumexp(-1)
    # Each domain counts once, however many adapters it has.
    shares_TA = densities_TA - (densities_TA - same_AA.sum(-1).log()).logsumexp(-1, keepdim=True)
    offsets_TA = shares_TA - of_domain_TA.where(of_domain_TA.isfinite(), 0.0)
    pieces = zip(own, offsets_TA.split(1, dim=-1), strict=True)
    return torch.cat([(piece + offset_T1) * temperature for piece, offset_T1 in pieces], dim=-1)
