"""A mixture evaluated on texts: its loss on them, and how much each expert is used.

Shapes: D domains, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..console import progress_bar
from ..data.texts import Domain, TextBlock, cut, read_domain
from ..report.measure import Routed, Worth, measure_worth, watch
from ..report.observe import undisturbed


@dataclass(frozen=True)
class Evaluation:
    """What a mixture does with the texts: loss [D] in nats per token, share [E] of the routing weight."""

    loss: NDArray[np.float64]
    share: NDArray[np.float64]
    routed: Routed


class Texts:
    """Domains of documents, cut into blocks that a model reads.

    Args:
        domains: with a text of two tokens each.
        block_size: most tokens read at once.
        pad: the token that fills rows up; it is in no result.

    Raises:
        ValueError: there is no domain, or no loss on one of them.
    """

    def __init__(self, domains: Sequence[Domain], block_size: int, pad: int) -> None:
        if not domains:
            raise ValueError("there are no texts; give those of one domain or more")
        if silent := [d.name for d in domains if all(len(text.token_ids) < 2 for text in d.documents)]:
            raise ValueError(f"{silent[0]!r} holds no text of two tokens, so there is no loss; give longer texts")
        self.domains, self.pad = domains, pad
        self.blocks: list[TextBlock] = cut(domains, block_size)[0]

    @classmethod
    def of(
        cls, documents: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, block_size: int = 512
    ) -> Texts:
        """Documents, texts or conversations, by domain."""
        domains = [read_domain(name, own, tokenizer) for name, own in documents.items()]
        return cls(domains, block_size, tokenizer.pad_token_id or 0)

    @property
    def names(self) -> list[str]:
        """[D]."""
        return [domain.name for domain in self.domains]

    def read(self, model: PeftModel) -> Evaluation:
        """Run the mixture over every block once; domains and routers count alike, however many tokens they have."""
        with undisturbed(model), progress_bar() as progress:
            routed = watch(model, self.domains, self.blocks, self.pad, progress)
        share = routed.by_domain(routed.weight).mean(axis=(0, 1))
        return Evaluation(routed.loss_by_domain(self.blocks), share / share.sum(), routed)

    def worth(self, model: PeftModel, evaluation: Evaluation) -> Worth:
        """What removing each expert by itself adds to the loss, over every block once per expert."""
        tokens = max(domain.num_tokens for domain in self.domains)
        with undisturbed(model), progress_bar() as progress:
            return measure_worth(model, self.domains, self.blocks, evaluation.routed, tokens, self.pad, progress)
