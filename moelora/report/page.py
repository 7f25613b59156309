"""The HTML report: an analysis as one page that needs nothing else.

Shapes: D domains, R routers, E experts, T tokens.
"""

from __future__ import annotations

import base64
import math
import zlib
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from ..storage.run_record import finite
from ..version import __version__
from .advice import Thresholds
from .analysis import Analysis
from .findings import findings
from .history import History
from .measure import TokenView
from .measurements import short_names
from .palette import style_of

SCRIPTS = ("core.js", "tokens.js", "tables.js", "charts.js")
MOST_WEIGHTS = 32_000_000
"""Routers x tokens x experts that the token view holds, a byte each before compression: more open slowly."""
LOSS_STEPS, NO_LOSS = 20, 255


@dataclass(frozen=True)
class About:
    """What the page says of where it comes from."""

    adapter: str
    base: str
    routing: str


def render(found: Analysis, about: About, permutations: int) -> str:
    """The whole page. Every text is escaped: by the template, in the JSON, and by the script, which writes nodes."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_file("report.html")).render(
        title=about.adapter,
        **asdict(about),
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        num_experts=found.num_experts,
        num_routers=len(found.routers),
        top_k=found.top_k,
        domains=[_fact(found, index) for index in range(len(found.domains))],
        findings=findings(found),
        thresholds=_thresholds(found),
        payload=payload(found, permutations),
        css=Markup(_file("report.css")),
        script=Markup("\n".join(map(_file, SCRIPTS))),
    )


def _file(name: str) -> str:
    return (resources.files(__package__) / "template" / name).read_text(encoding="utf-8")


def _fact(found: Analysis, index: int) -> dict[str, str]:
    loss = found.loss[index]
    return {
        "name": found.domains[index],
        "loss": "-" if math.isnan(loss) else f"{loss:.3f}",
        "tokens": f"{found.num_tokens[index]:,}",
        "note": ", held out" if found.is_held_out[index] else "",
    }


def _thresholds(found: Analysis) -> str:
    limits = Thresholds()
    worth = (
        f"prune, when removing the expert adds less than {limits.worth} nats per token in every domain, two standard "
        "errors included"
        if found.worth is not None
        else f"look at, when no domain gives the expert {limits.load:.0%} of a fair share: its worth is not measured"
    )
    return (
        f"Rules: {worth}; merge, when two experts' products have a cosine of {limits.similarity} or more. Worth is "
        "measured one expert at a time: after pruning one, measure again before pruning another."
    )


# ---- data ------------------------------------------------------------------------------------------------------------


def payload(found: Analysis, permutations: int) -> dict[str, Any]:
    """Everything that the page's script draws, as JSON values."""
    limit = MOST_WEIGHTS // max(1, len(found.routers) * found.num_experts * len(found.domains))
    return {
        "experts": found.experts,
        "routers": found.routers,
        "shortRouters": short_names(found.routers),
        "startRouter": _most_telling(found),
        "styles": [style_of(expert)._asdict() for expert in range(found.num_experts)],
        "domains": [
            {
                "name": found.domains[index],
                "tokens": found.num_tokens[index],
                "heldOut": found.is_held_out[index],
                "loss": _plain(found.loss[index], 4),
                "worthTokens": found.worth_tokens[index],
            }
            for index in range(len(found.domains))
        ],
        "shares": {"weight": _plain(found.weight, 4), "load": _plain(found.load, 4)},
        "specialisation": _specialisation(found, permutations),
        "worth": None if found.worth is None else _plain(found.worth, 5),
        "worthError": None if found.worth_error is None else _plain(found.worth_error, 5),
        "maturity": _plain(found.maturity, 3),
        "norm": _plain(found.whole.norm.numpy(), 4),
        "rank": _plain(found.whole.effective_rank.numpy(), 2),
        "similarity": _plain(found.whole.similarity.numpy(), 3),
        "similarityByRouter": [_plain(found.by_router[name].similarity.numpy(), 3) for name in found.routers],
        "history": _history(found.history),
        "suggestions": [asdict(suggestion) for suggestion in found.suggestions],
        "keepReason": _keep_reason(found),
        "view": [_view(view, limit) for view in found.tokens],
    }


def _most_telling(found: Analysis) -> int:
    """The router to show first: where domains differ most, for there is most to see."""
    return 0 if found.specialisation is None else int(found.specialisation.observed[:-1].argmax())


def _plain(values: Any, digits: int) -> Any:
    """Arrays as lists of rounded numbers; JSON knows no NaN."""
    if isinstance(values, list):
        return [_plain(value, digits) for value in values]
    if isinstance(values, float):
        return round(values, digits) if math.isfinite(values) else None
    return _plain(np.asarray(values, dtype=float).tolist(), digits)


def _specialisation(found: Analysis, permutations: int) -> dict[str, Any] | None:
    if (special := found.specialisation) is None:
        return None
    names = {"observed": "observed", "chance": "chance", "low": "low", "high": "high", "p_value": "pValue"}
    return {key: _plain(getattr(special, name), 6) for name, key in names.items()} | {
        "maximum": special.maximum,
        "permutations": permutations,
        "unit": "documents" if found.unit_is_document else "blocks",
    }


def _history(history: History | None) -> dict[str, Any] | None:
    return None if history is None else finite(asdict(history))


def _keep_reason(found: Analysis) -> str:
    if found.num_experts < 2:
        return "There is only one expert."
    if found.worth is None:
        return "None idles and no two are alike; what each is worth was not measured."
    return "Some domain's loss rises without each of them, or too little text was given to tell; and no two are alike."


def _view(view: TokenView, limit: int) -> dict[str, Any]:
    """One domain's tokens, compressed; the weights router by router, for a reader looks at one at a time."""
    pieces = view.pieces[:limit]
    numbers = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    ids = np.array([numbers[piece] for piece in pieces], dtype="<u4")
    losses = np.where(np.isnan(view.losses), NO_LOSS, np.minimum(view.losses * LOSS_STEPS, NO_LOSS - 1).round())
    documents = view.documents[:limit]
    starts = np.flatnonzero(np.diff(documents, prepend=-1))
    return {
        "pieces": list(numbers),
        "ids": _packed(ids),
        "losses": _packed(losses[:limit].astype(np.uint8)),
        "starts": starts.tolist(),
        "weights": [_packed(weights[:limit]) for weights in view.weights],
    }


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 6)).decode("ascii")
