"""Progressive Prompts, re-implemented from the paper's formulas.

Razdaibiedina et al. 2023, arXiv:2301.12314. Task t learns virtual tokens P_t, put before those of earlier tasks, which
are frozen like the model: it reads [P_t, ..., P_1, x]. A question of task j is answered with [P_j, ..., P_1, x], so it
has to be told, and nothing is forgotten. While it is learned, P is made as ``P + W_2 relu(W_1 P)`` (the paper's
residual reparameterisation), which is dropped afterwards.

Letters: B rows, S tokens, D model width, K tokens whose logits are asked for, n virtual tokens of a task.

As many trained numbers as a LoRA's would take thousands of virtual tokens. Here it is n = 20 (the paper: 10), and W_1
and W_2 are as wide as the plan's numbers allow; n D numbers are kept. The paper's layer norm after W_2 is left out, and
W_2 starts at zero: it makes tokens far longer than the embeddings of these bases.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import PromptEmbedding, PromptTuningConfig
from torch import Tensor, nn

from ..arms import shared_copy
from ..quality.methods import num_trainable
from .learner import Learner, Setting, numbers

TOKENS = 20


class Reparameterised(nn.Module):
    """A task's virtual tokens while they are learned; they start as words drawn from the vocabulary."""

    def __init__(self, words: nn.Module, hidden: int) -> None:
        super().__init__()
        width = words.embedding_dim
        config = PromptTuningConfig(
            num_virtual_tokens=TOKENS, token_dim=width, num_transformer_submodules=1, prompt_tuning_init="SAMPLE_VOCAB"
        )
        self.tokens = PromptEmbedding(config, words)
        self.down = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self) -> Tensor:
        """[n, D] float32."""
        P = self.tokens.embedding.weight
        return P + self.up(F.relu(self.down(P)))


class Prompted(nn.Module):
    """A causal language model that reads virtual tokens before each row, whose padding is on the left.

    They stand between the padding and the row: else a sliding window would see padding in their place.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.kept = nn.ParameterList()  # P_1, P_2, ...
        self.new: Reparameterised | None = None
        self.used = 0  # of those kept

    def _inputs(self, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Embeddings [B, n + S, D] and their mask."""
        words = self.base.get_input_embeddings()(ids)
        prompts = ([] if self.new is None else [self.new()]) + [*self.kept[: self.used]][::-1]
        virtual = [each.to(words.dtype).expand(len(ids), *each.shape) for each in prompts]
        both = torch.cat([*virtual, words], dim=1)
        count = both.shape[1] - ids.shape[1]
        place = torch.arange(both.shape[1], device=ids.device)
        padding = 0 if mask is None else (mask == 0).sum(dim=1, keepdim=True)
        text = torch.where(place < padding + count, place - padding, place)
        source = torch.where(place < padding, place + count, text).expand(both.shape[:2])
        return {
            "inputs_embeds": both.gather(1, source.unsqueeze(-1).expand_as(both)),
            "attention_mask": (place >= padding).expand(both.shape[:2]).to(ids.dtype),
        }

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, logits_to_keep: int = 0, **options: Any
    ) -> Any:
        """Logits of the last K of the rows' own tokens, of all by default."""
        kept = logits_to_keep or input_ids.shape[1]
        return self.base(**self._inputs(input_ids, attention_mask), logits_to_keep=kept, **options)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """As transformers' models do: rows with what is written after them."""
        written = self.base.generate(**self._inputs(input_ids, attention_mask), **options)
        return torch.cat([input_ids, written], dim=1)


class ProgressivePrompts(Learner):
    """Told the task; forgets nothing."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.model = Prompted(shared_copy(setting.base))
        width = setting.base.get_input_embeddings().embedding_dim
        self.hidden = max(1, round((num_trainable(setting.lora()) - TOKENS * width) / (2 * width)))
        self._trainable = 0

    def learn(self, stage: int) -> float:
        """See Learner."""
        model = self.model
        with torch.device(self.setting.plan.device):
            model.new = Reparameterised(self.setting.base.get_input_embeddings(), self.hidden)
        self._trainable = super().trainable
        seconds = self.setting.train(model, self.setting.batches([stage]))
        model.kept.append(nn.Parameter(model.new().detach(), requires_grad=False))
        model.new, model.used = None, len(model.kept)
        return seconds

    @contextmanager
    def for_task(self, stage: int) -> Iterator[None]:
        """With the virtual tokens up to the task's; with all there are for one that is not learned yet."""
        before = self.model.used
        self.model.used = min(stage + 1, before)
        yield
        self.model.used = before

    @property
    def trainable(self) -> int:
        """See Learner; what makes the virtual tokens is trained with them."""
        return self._trainable

    def stored(self) -> int:
        """See Learner."""
        return numbers([*self.model.kept])
