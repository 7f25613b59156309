"""An analysis as data frames: long tables, one row per thing measured; methods of [`moelora.Analysis`]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .measurements import Measurements

if TYPE_CHECKING:
    from pandas import DataFrame


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError('data frames need pandas: pip install "moelora[report]"') from error
    return pandas


def _grid(**axes: list[Any]) -> dict[str, Any]:
    """Columns that name every cell of an array with these axes, in its order."""
    grids = np.meshgrid(*(np.arange(len(values)) for values in axes.values()), indexing="ij")
    return {name: [values[i] for i in grid.ravel()] for (name, values), grid in zip(axes.items(), grids, strict=True)}


def loads(found: Measurements) -> DataFrame:
    """One row per domain, router and expert: weight, load."""
    columns = _grid(domain=found.domains, router=found.routers, expert=list(range(found.num_experts)))
    return _pandas().DataFrame(columns | {"weight": found.weight.ravel(), "load": found.load.ravel()})


def router_table(found: Measurements) -> DataFrame:
    """One row per domain and router: entropy, top1_probability; mutual information with its chance level."""
    columns = _grid(domain=found.domains, router=found.routers)
    columns |= {"entropy": found.entropy.ravel(), "top1_probability": found.top1_probability.ravel()}
    columns["sharpness"] = found.sharpness * len(found.domains)
    if (special := found.specialisation) is not None:
        for name in ("observed", "chance", "low", "high", "p_value"):
            column = "mutual_information" if name == "observed" else name
            columns[column] = np.tile(getattr(special, name)[:-1], len(found.domains))
    return _pandas().DataFrame(columns)


def expert_table(found: Measurements) -> DataFrame:
    """One row per expert: norm, effective_rank, maturity, and its share, worth and error in each domain."""
    columns: dict[str, Any] = {
        "expert": list(range(found.num_experts)),
        "adapter": found.experts,
        "norm": found.whole.norm.numpy(),
        "effective_rank": found.whole.effective_rank.numpy(),
        "maturity": np.nanmean(found.maturity, axis=0) if np.isfinite(found.maturity).any() else np.nan,
    }
    for index, domain in enumerate(found.domains):
        columns[f"weight_{domain}"] = found.weight[index].mean(0)
        if found.worth is not None and found.worth_error is not None:
            columns[f"worth_{domain}"] = found.worth[index]
            columns[f"worth_error_{domain}"] = found.worth_error[index]
    return _pandas().DataFrame(columns)


def similarity(found: Measurements, router: str | None = None) -> DataFrame:
    """[E, E] cosine of the experts' products, over all linears or those of one router.

    Raises:
        ValueError: there is no router of that name.
    """
    return _pandas().DataFrame(found.geometry_of(router).similarity.numpy())


def token_table(found: Measurements, domain: str) -> DataFrame:
    """One row per token of a domain and router: text, document, loss, expert and its weight.

    Raises:
        ValueError: there is no domain of that name.
    """
    if domain not in found.domains:
        raise ValueError(f"`domain` ({domain!r}) does not exist; there are {', '.join(found.domains)}")
    view = found.tokens[found.domains.index(domain)]
    num_tokens, num_routers = len(view.pieces), len(found.routers)
    top = view.weights.max(-1) / 255
    return _pandas().DataFrame(
        {
            "router": np.repeat(np.array(found.routers, dtype=object), num_tokens),
            "token": np.tile(np.arange(num_tokens), num_routers),
            "document": np.tile(view.documents, num_routers),
            "text": view.pieces * num_routers,
            "loss": np.tile(view.losses, num_routers),
            "expert": view.weights.argmax(-1).ravel(),
            "weight": top.ravel(),
        }
    )


def training_table(found: Measurements) -> DataFrame:
    """One row per log, router and expert: load, maturity, entropy; empty without a training log."""
    rows = []
    history = found.history
    for name, series in (history.routers if history else {}).items():
        for step, load, maturity, entropy in zip(
            history.steps if history else [], series["expert_load"], series["maturity"], series["entropy"], strict=True
        ):
            rows += [(step, name, expert, load[expert], maturity[expert], entropy) for expert in range(len(load))]
    return _pandas().DataFrame(rows, columns=["step", "router", "expert", "load", "maturity", "entropy"])
