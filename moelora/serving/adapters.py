"""What is to be served, as an engine has to know it before it starts: from the adapters' files, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files.adapter_files import Place, read_config
from ..recipe import ModelOptions
from ..schema import UserError, telling_user
from ..storage.finding import missing_adapter
from ..storage.lora_file import read_tensors
from ..storage.mixture_files import CONFIG_FILE, check_fit, read_mixture
from ..storage.structure import sort_tensors
from .mixture import active_adapters, experts_and_rank
from .vllm.contract import SERVED_RANKS, least_rank


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter under the name that clients ask for.

    Attributes:
        rank: of all experts together, in the linear where it is largest.
        linears: the last parts of their names, such as q_proj.
    """

    name: str
    folder: Path
    rank: int
    linears: frozenset[str]


def read_served_adapter(name: str, folder: Path, base: ModelOptions) -> ServedAdapter:
    """Read a mixture or a plain LoRA.

    Raises:
        UserError: the folder holds neither, is damaged, or (a mixture) does not fit the base model.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(missing_adapter(folder))
    with telling_user():
        config = read_config(Place(str(folder)))
    kind = config.get("peft_type")
    if kind == "MOELORA" and config.get("use_moe_routing") is not False:
        rank, modules = _read_mixture(folder, base)
    elif kind in ("LORA", "MOELORA"):
        rank, modules = _read_lora(folder)
    else:
        raise UserError(f"the adapter {folder}: `peft_type` is {kind!r}; only mixtures and plain LoRAs can be served")
    if not modules:
        raise UserError(f"the adapter {folder} adapts no linear, so that there is nothing to serve")
    return ServedAdapter(name, folder, rank, frozenset(module.rpartition(".")[2] for module in modules))


def _read_mixture(folder: Path, base: ModelOptions) -> tuple[int, set[str]]:
    """The rank of all experts together, and the linears by their whole names."""
    stored = read_mixture(folder)
    check_fit(stored, base, folder)
    active = active_adapters(stored)
    num_experts, expert_rank = experts_and_rank(active)
    return num_experts * expert_rank, {module for adapter in active for module in adapter.pools}


def _read_lora(folder: Path) -> tuple[int, set[str]]:
    factors = sort_tensors(read_tensors(str(folder)))[0]
    ranks = {module: pair["A"].shape[0] for module, pair in factors.items() if "A" in pair}
    return max(ranks.values(), default=0), set(ranks)


def max_lora_rank(adapters: Sequence[ServedAdapter]) -> int:
    """The least `--max-lora-rank` of vLLM's that serves all of them.

    Raises:
        UserError: vLLM serves none as large as one of them.
    """
    largest = max(adapters, key=lambda one: one.rank)
    if (enough := least_rank(largest.rank)) is None:
        raise UserError(
            f"the adapter {largest.folder} has ranks of {largest.rank} in all (experts times rank), and vLLM takes at "
            f"most {SERVED_RANKS[-1]}: prune or merge experts (`moelora prune`, `moelora merge`), or leave it to "
            "transformers"
        )
    return enough
