"""An analysis as matplotlib figures, in the colours of the HTML report; methods of [`moelora.Analysis`]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .measurements import Measurements, short_names
from .palette import style_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NUMBERS = 400  # cells of a heat map beyond which numbers in them are no longer legible


def _figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "moelora[report]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def loads(found: Measurements, measure: str = "weight") -> Figure:
    """Heat maps of routers by experts, one per domain, of `weight` or `load`.

    Raises:
        ValueError: measure is neither `weight` nor `load`.
    """
    if measure not in ("weight", "load"):
        raise ValueError(f"`measure` ({measure!r}) is not known; use 'weight' or 'load'")
    values_DRE = getattr(found, measure)
    height = max(2.5, 0.22 * len(found.routers) + 1)
    figure = _figure(1 + 2.2 * len(found.domains), height)
    axes = figure.subplots(1, len(found.domains), sharey=True, squeeze=False)[0]
    for axis, domain, values_RE in zip(axes, found.domains, values_DRE, strict=True):
        image = axis.imshow(values_RE, aspect="auto", cmap="viridis", vmin=0, vmax=values_DRE.max())
        axis.set(title=domain, xlabel="expert", xticks=range(found.num_experts))
        axis.set_yticks(range(len(found.routers)), short_names(found.routers))
        _number(axis, values_RE, "{:.0%}", values_DRE.max())
    axes[0].set_ylabel("router")
    figure.colorbar(image, ax=axes, format=lambda value, _: f"{value:.0%}", label=f"share of {measure}")
    return figure


def _number(axis: Any, values: Any, form: str, highest: float) -> None:
    if values.size > MOST_NUMBERS:
        return
    for (row, column), value in np.ndenumerate(values):
        colour = "black" if value > 0.6 * highest else "white"
        axis.text(column, row, form.format(value), ha="center", va="center", color=colour, fontsize=7)


def specialisation(found: Measurements) -> Figure:
    """Mutual information of each router beside its chance level.

    Raises:
        ValueError: there are not two domains to tell apart.
    """
    special = found.specialisation
    if special is None:
        raise ValueError("specialisation needs two domains or more; pass `texts` as a mapping of domains")
    rows = np.arange(len(found.routers))
    figure = _figure(6, max(2.5, 0.22 * len(rows) + 1))
    axis = figure.subplots()
    axis.hlines(rows, special.low[:-1], special.high[:-1], color="#999999", linewidth=5, label="chance, middle 95%")
    axis.plot(special.observed[:-1], rows, "o", color=style_of(0).colour, label="observed")
    axis.set_yticks(rows, short_names(found.routers))
    axis.set(xlabel="mutual information of domain and expert (bits)", ylabel="router", xlim=(0, None))
    axis.invert_yaxis()
    axis.legend()
    return figure


def similarity(found: Measurements, router: str | None = None) -> Figure:
    """Matrix of the experts' similarities, over all linears or those of one router."""
    figure = _figure(1.5 + 0.5 * found.num_experts, 1 + 0.5 * found.num_experts)
    axis = figure.subplots()
    image = axis.imshow(found.geometry_of(router).similarity.numpy(), cmap="PuOr", vmin=-1, vmax=1)
    axis.set(title=router or "all linears", xlabel="expert", ylabel="expert")
    axis.set_xticks(range(found.num_experts))
    axis.set_yticks(range(found.num_experts))
    figure.colorbar(image, ax=axis, label="cosine of products")
    return figure


def worth(found: Measurements) -> Figure:
    """What removing each expert adds to each domain's loss.

    Raises:
        ValueError: the worth was not measured.
    """
    if found.worth is None or found.worth_error is None:
        raise ValueError("the experts' worth was not measured; call `analyze` with `worth_tokens` above 0")
    figure = _figure(6, 3)
    axis = figure.subplots()
    width = 0.8 / len(found.domains)
    for index, domain in enumerate(found.domains):
        places = np.arange(found.num_experts) + index * width
        errors = 2 * np.nan_to_num(found.worth_error[index])
        axis.bar(places, found.worth[index], width, yerr=errors, label=domain, color=style_of(index).colour)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(np.arange(found.num_experts) + 0.4 - width / 2, map(str, range(found.num_experts)))
    axis.set(xlabel="expert removed", ylabel="added loss (nats per token)")
    axis.legend()
    return figure


def training(found: Measurements, router: str | None = None) -> Figure:
    """Load, entropy and maturity over training, of one router or the mean of all.

    Raises:
        ValueError: there is no training log, or no router of that name in it.
    """
    history = found.history
    if history is None:
        raise ValueError("there is no training log with routers; train with MoELoraCallback and pass `log_history`")
    chosen = [history.routers[found.known_router(router)]] if router else list(history.routers.values())
    figure = _figure(9, 3)
    panels = figure.subplots(1, 3)
    for panel, key in zip(panels, ("expert_load", "entropy", "maturity"), strict=True):
        values = np.mean([np.array(series[key], dtype=float) for series in chosen], axis=0)  # None becomes NaN
        for expert, line in enumerate(np.atleast_2d(values.T)):
            style = style_of(expert)
            dash = (0, style.dash) if style.dash else "-"
            panel.plot(history.steps, line, linestyle=dash, color=style.colour, label=str(expert))
        panel.set(title=key.removeprefix("expert_"), xlabel="step")
    panels[0].legend(title="expert", fontsize=7)
    return figure
