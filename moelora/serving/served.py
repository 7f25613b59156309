"""What is to be served, as a server's command line has to know it: from the adapters' files, without a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..files.adapter_files import Place, read_config
from ..recipe import ModelOptions
from ..schema import UserError
from ..storage.finding import missing_adapter
from ..storage.lora_file import read_tensors
from ..storage.mixture_files import CONFIG_FILE, check_fit, read_mixture
from ..storage.structure import sort_tensors


@dataclass(frozen=True)
class Served:
    """An adapter under the name that clients ask for.

    Attributes:
        rank: of all experts together, in the linear where it is largest.
        modules: the last names of the linears, such as q_proj.
    """

    name: str
    folder: Path
    rank: int
    modules: frozenset[str]


def read_served(name: str, folder: Path, base: ModelOptions) -> Served:
    """Read a mixture or a plain LoRA.

    Raises:
        UserError: the folder holds neither, is damaged, or (a mixture) does not fit the base model.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(missing_adapter(folder))
    try:
        kind = read_config(Place(str(folder))).get("peft_type")
    except ValueError as error:
        raise UserError(str(error)) from error
    if kind == "MOELORA":
        return _mixture(name, folder, base)
    if kind == "LORA":
        factors = sort_tensors(read_tensors(str(folder)))[0]
        return _served(name, folder, {module: pair["A"].shape[0] for module, pair in factors.items() if "A" in pair})
    raise UserError(f"the adapter {folder}: `peft_type` is {kind!r}; only mixtures and plain LoRAs can be served")


def _mixture(name: str, folder: Path, base: ModelOptions) -> Served:
    stored = read_mixture(folder)
    check_fit(stored, base, folder)
    active = [adapter for adapter in stored if adapter.position is not None]
    num_experts = sum(adapter.num_experts for adapter in active)
    ranks: dict[str, int] = {}
    for adapter in active:
        for module, pool in adapter.pools.items():
            rank = pool.lora_A.shape[0] // adapter.num_experts
            ranks[module] = max(ranks.get(module, 0), rank * num_experts)  # all are padded to the largest
    return _served(name, folder, ranks)


def _served(name: str, folder: Path, ranks: dict[str, int]) -> Served:
    if not ranks:
        raise UserError(f"the adapter {folder} adapts no linear, so that there is nothing to serve")
    return Served(name, folder, max(ranks.values()), frozenset(module.rpartition(".")[2] for module in ranks))
