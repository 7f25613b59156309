"""GainLoRA on InfLoRA, re-implemented from the papers' formulas.

GainLoRA: Liang, Chen and Li 2025, arXiv:2505.15424. InfLoRA: Liang and Li 2024, arXiv:2404.00228. Task t adds a branch
to each linear, ``W x + scaling sum_i a_i B_i A_i x``, and a gate that reads the prompt. Old branches and gates are
frozen.

- Gate: ``p_0 = mean of the prompt's token embeddings``, ``p_l = silu(G_l p_{l-1})`` for l = 1, 2, ``a = f(G_3 p_2)`` in
  [0, 1] with f(0) = 0. A new gate starts from the last one's G_1 and G_2, and from a G_3 orthogonal to all p_2 of old
  tasks; every change of G_l is orthogonal to all p_{l-1} of old tasks. So its p_l on them stay as they are, and a is 0.
- Branch: A_t spans the largest directions of the linear's new inputs outside of what old tasks' inputs span, and stays;
  B_t alone is learned.

Letters: B rows, S tokens, D model width, H width of a gate, T tasks so far, r rank of a branch, k directions in memory.

As in the authors' code f(b) = |2 sigmoid(4 b) - 1| of the cosine b of G_3 and p_2, so that the size of embeddings does
not matter; rows of A_t have the length of PEFT's initial ones; and the share of energy in memory rises to 1 from task
to task. It differs where it must: rank r is such that the trained numbers (B_t and the gate) are those of the plan's
LoRA, all seven linears are adapted in place of two, memories are not cut into parts of the width, and a change is
projected as a parameter, ``G_l = start + C (I - M M^T)``, which is orthogonal after any optimizer's step, where the
authors project each step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..peers import SCALING
from ..quality.batches import Batches
from ..quality.methods import LINEARS, num_trainable
from ..quality.trainer import now
from .encoding import END
from .learner import Learner, Setting, lora_factors, numbers
from .once import input_covariances, reader, some_rows
from .subspace import Leading, extended, leading, outside

SHARE = 0.995  # of |C|_F^2 of the first task that is kept in memory, see inflora.py
HIDDEN = 100  # H, as in the paper; a quarter of a narrower model's width
SHARPNESS = 2.0  # tanh(2 b) = 2 sigmoid(4 b) - 1
ROW = 3**-0.5  # length of a row of A as PEFT draws it
NEW, OLD = "default", "old"  # adapters: the last task's branch, and all earlier ones side by side


def prompt_tokens(ids: Tensor, mask: Tensor, end: Tensor) -> Tensor:
    """[B, S] bool: tokens up to the last place where the row says `end`, or all of a row that does not."""
    ends = F.pad((ids.unfold(1, len(end), 1) == end).all(dim=-1), (len(end) - 1, 0))
    still_to_come = ends.flip(1).cumsum(1).flip(1) > 0
    return mask.bool() & (still_to_come | ~ends.any(dim=1, keepdim=True))


class Gates(nn.Module):
    """The gates of all tasks. Computed in float32: zero has to be zero."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        shapes = [(hidden, width), (width, hidden), (1, width)]
        self.old = _frozen([torch.empty(0, *shape) for shape in shapes])  # [T-1, ...]
        self.start = _frozen([nn.init.kaiming_uniform_(torch.empty(shape), a=5**0.5) for shape in shapes])
        self.memory = _frozen([torch.empty(shape[1], 0) for shape in shapes])
        self.change = nn.ParameterList([torch.zeros(shape) for shape in shapes])

    def newest(self) -> list[Tensor]:
        """G_1 [H, D], G_2 [D, H] and G_3 [1, D] of the last gate."""
        together = zip(self.start, self.change, self.memory, strict=True)
        return [start + change - (change @ memory) @ memory.t() for start, change, memory in together]

    def inputs(self, pooled: Tensor) -> list[Tensor]:
        """p_0 [B, D], p_1 [B, H] and p_2 [B, D] of the last gate."""
        found = [pooled]
        for weight in self.newest()[:2]:
            found.append(F.silu(found[-1] @ weight.t()))
        return found

    def forward(self, pooled: Tensor) -> Tensor:
        """p_0 [B, D] to the coefficients of all tasks [B, T]."""
        with torch.autocast(pooled.device.type, enabled=False):
            one, two, three = (torch.cat([old, new[None]]) for old, new in zip(self.old, self.newest(), strict=True))
            p = F.silu(torch.einsum("thd,bd->bth", one, pooled))
            p = F.silu(torch.einsum("tdh,bth->btd", two, p))
            return torch.tanh(SHARPNESS * F.cosine_similarity(p, three[:, 0], dim=-1)).abs()

    @torch.no_grad()
    def begin(self) -> None:
        """The last gate is an old one; a new one starts where it is."""
        for number, weight in enumerate(self.start):
            self.old[number] = nn.Parameter(torch.cat([self.old[number], weight[None]]), requires_grad=False)

    @torch.no_grad()
    def settle(self) -> None:
        """What was learned is where the gate is, whatever is remembered from now on."""
        for start, change, weight in zip(self.start, self.change, self.newest(), strict=True):
            start.copy_(weight)
            change.zero_()

    @torch.no_grad()
    def aim(self, moment: Tensor) -> None:
        """G_3 along the largest p_2 outside of the memory.

        Args:
            moment: of the new task's p_2 [D, D].
        """
        memory = self.memory[2].double()
        direction = outside(_leading(moment, memory).directions[:, :1], memory)
        self.start[2].copy_(direction.t() * (len(moment) / 3) ** 0.5)

    def remember(self, moments: list[Tensor], share: float) -> None:
        """Keep what the last task's p_0, p_1 and p_2 span, given their moments."""
        for number, moment in enumerate(moments):
            memory = self.memory[number].double()
            memory = extended(memory, _leading(moment, memory), share).float()
            self.memory[number] = nn.Parameter(memory, requires_grad=False)

    def stored(self) -> int:
        """Numbers of all gates, and of the memory."""
        return numbers([*self.old, *self.start, *self.memory])


class GainLora(Learner):
    """A branch and a gate for each task; never told the task, keeps no text.

    All branches but the last lie side by side in one adapter, so that a step's kernels are as many for any number of
    tasks. Coefficients are computed where a prompt is read, and hold for what is decoded after it.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        base, device = setting.base, setting.plan.device
        width = base.get_input_embeddings().embedding_dim
        hidden = min(HIDDEN, width // 4)
        outputs = sum(each.out_features for name, each in base.named_modules() if name.rpartition(".")[2] in LINEARS)
        gate = 2 * width * hidden + width
        self.rank = max(1, round((num_trainable(setting.lora()) - gate) / outputs))
        self.model = setting.lora(self.rank)
        with torch.device(device):
            self.gates = self.model.gates = Gates(width, hidden)
        self.end = torch.tensor(setting.tokenizer(END, add_special_tokens=False)["input_ids"], device=device)
        self.memory: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        self.model.get_base_model().register_forward_pre_hook(self._read_prompt, with_kwargs=True)
        self._watch(NEW)

    def learn(self, stage: int) -> float:
        """See Learner. The time of reading the inputs, before and after, is counted."""
        batches = self.setting.batches([stage])
        if stage:
            self._add_branch()
        self._train_only_the_new()
        device = self.setting.plan.device
        rows = some_rows(self.setting, stage)
        started = now(device)
        self._design(rows)
        before = now(device) - started
        learning = self.setting.train(self.model, batches)
        started = now(device)
        self._remember(rows, SHARE + (1 - SHARE) * stage / len(self.setting.tasks))
        return before + learning + now(device) - started

    def coefficients(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, T] of rows [B, S], whose answers are not looked at."""
        return self.gates(self._pooled(ids, mask))

    def stored(self) -> int:
        """See Learner. Of each memory of a linear's inputs the smaller of it and its complement is counted, which is
        what InfLoRA keeps."""
        factors = [each for name in self._adapters for pair in lora_factors(self.model, name).values() for each in pair]
        memories = sum(len(each) * min(each.shape[1], len(each) - each.shape[1]) for each in self.memory.values())
        return numbers(factors) + memories + self.gates.stored()

    @property
    def _adapters(self) -> list[str]:
        return [name for name in (OLD, NEW) if name in self.model.peft_config]

    # ---- forward -----------------------------------------------------------------------------------------------------

    def _read_prompt(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            return
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        coefficients = self.coefficients(ids, torch.ones_like(ids) if mask is None else mask)[:, None]
        old, new = coefficients.split([coefficients.shape[-1] - 1, 1], dim=-1)
        self.scales = {OLD: old.repeat_interleave(self.rank, dim=-1), NEW: new}  # [B, 1, (T - 1) r], [B, 1, 1]

    def _pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        """p_0 [B, D] in float32."""
        chosen = prompt_tokens(ids, mask, self.end)
        embeddings = self.model.get_input_embeddings()(ids).float() * chosen.unsqueeze(-1)
        return embeddings.sum(dim=1) / chosen.sum(dim=1, keepdim=True)

    def _watch(self, adapter: str) -> None:
        """Scale what each branch of an adapter makes of its input, by its coefficient."""

        def scale(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output * self.scales[adapter].to(output.dtype)

        for module in self.model.modules():
            if hasattr(module, "lora_A") and adapter in module.lora_A:
                module.lora_A[adapter].register_forward_hook(scale)

    # ---- between tasks -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _add_branch(self) -> None:
        """What the new branch learned lies beside the old ones; the new one starts afresh."""
        model = self.model
        pairs = [lora_factors(model, name) for name in self._adapters]
        kept = {
            name: (torch.cat([each[name][0] for each in pairs]), torch.cat([each[name][1] for each in pairs], dim=1))
            for name in pairs[-1]
        }
        rank = len(next(iter(kept.values()))[0])
        model.set_adapter(NEW)
        if OLD in model.peft_config:
            model.delete_adapter(OLD)
        with torch.device(self.setting.plan.device):
            model.add_adapter(OLD, replace(model.peft_config[NEW], r=rank, lora_alpha=SCALING * rank))
        self._watch(OLD)
        for name, factors in lora_factors(model, OLD).items():
            for mine, value in zip(factors, kept[name], strict=True):
                mine.copy_(value)
        for _, B in lora_factors(model, NEW).values():
            B.zero_()
        self.gates.begin()
        model.base_model.set_adapter([OLD, NEW])

    def _train_only_the_new(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(f"lora_B.{NEW}." in name or name.startswith("gates.change."))

    @torch.no_grad()
    def _design(self, rows: Batches) -> None:
        """A of the new branch, and G_3 of the new gate."""
        found = leading(self._covariances(rows), self.memory)
        for name, (A, _) in lora_factors(self.model, NEW).items():
            directions = found[reader(name)].directions[:, : self.rank]
            A.copy_(ROW * outside(directions, self.memory.get(reader(name))).t())
        self.gates.aim(self._gate_moments(rows)[2])

    @torch.no_grad()
    def _remember(self, rows: Batches, share: float) -> None:
        self.gates.settle()
        for name, found in leading(self._covariances(rows), self.memory).items():
            self.memory[name] = extended(self.memory.get(name), found, share)
        self.gates.remember(self._gate_moments(rows), share)

    def _covariances(self, rows: Batches) -> dict[str, Tensor]:
        return input_covariances(self.model, rows, self.setting.plan.device)

    def _gate_moments(self, batches: Batches) -> list[Tensor]:
        """Of p_0, p_1 and p_2 of all prompts."""
        rows = [self.gates.inputs(self._pooled(ids, mask)) for ids, mask in zip(batches.ids, batches.mask, strict=True)]
        return [(layer := torch.cat(parts)).t() @ layer for parts in zip(*rows, strict=True)]


def _leading(moment: Tensor, memory: Tensor) -> Leading:
    """Of one input alone."""
    return leading({"": moment.double()}, {"": memory})[""]


def _frozen(tensors: list[Tensor]) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(each, requires_grad=False) for each in tensors])
