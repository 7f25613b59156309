"""The model card of an adapter: PEFT's own says nothing of what PEFT does not know by itself.

What is written here stands between two marks, and every save writes it anew; what a user writes around it stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from transformers import PreTrainedModel

from ..config import count_experts
from ..config_rules import LIBRARY
from ..console import printable
from ..files.adapter_files import checkpoint_in
from .run_record import LEARNED_BEFORE, read_record

_TAGS = (LIBRARY, "mixture-of-experts")
_BASE_TAG = "base_model:adapter:"
_BEGIN = f"<!-- {LIBRARY}: every save writes anew what stands from here to the end mark -->"
_END = f"<!-- {LIBRARY}: end -->"
_OURS = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
_PLACEHOLDER = "this folder, or its name on the hub"

# ---- the file --------------------------------------------------------------------------------------------------------


def begin_card(path: Path) -> dict[str, Any]:
    """Make sure that there is a card, for PEFT to update; what its metadata are before that.

    Without one PEFT would begin with a form of two hundred lines to fill in.
    """
    if not path.exists():
        path.write_text("---\n{}\n---\n\n# A mixture of LoRA experts\n", encoding="utf-8")
    return ModelCard.load(path).data.to_dict()


def complete_card(model: PeftModel, path: Path, before: Mapping[str, Any]) -> None:
    """Add what this package knows to a card that PEFT has just updated.

    Args:
        model: a mixture.
        path: the card.
        before: from [`begin_card`]; PEFT drops the user's tags, and names a base model that may be a local folder.
    """
    card = ModelCard.load(path)
    base = next(filter(is_on_hub, (_base_name(model), before.get("base_model"))), None)
    card.data["base_model"] = base  # None is left out; a folder the hub would refuse
    tags = {*(before.get("tags") or []), *(card.data.get("tags") or []), *_TAGS}
    tags = {tag for tag in tags if not tag.startswith(_BASE_TAG)} | ({f"{_BASE_TAG}{base}"} if base else set())
    card.data["tags"] = sorted(tags)
    sections = _sections(model, _measured_run(model, path.parent))
    card.text = _with_ours(card.text, "\n\n".join([_BEGIN, *sections, _END]))
    card.save(path)


def _with_ours(text: str, ours: str) -> str:
    """A card's text with what is written here in its earlier place, or below the title."""
    if _OURS.search(text):
        return _OURS.sub(lambda _: ours, text, count=1)
    text = text.strip()
    title, _, rest = text.partition("\n") if text.startswith("# ") else ("", "", text)
    return "\n\n".join(part for part in (title, ours, rest.strip()) if part) + "\n"


def name_repository(path: Path, repo_id: str) -> None:
    """Put a repository's name in the place of the one that a card leaves open."""
    card = ModelCard.load(path)
    card.text = _OURS.sub(lambda found: found[0].replace(_PLACEHOLDER, repo_id), card.text)
    card.save(path)


def is_on_hub(name: Any) -> bool:
    """Whether a base model's name can be one of the hub's: a folder of this machine, or no name, cannot.

    >>> is_on_hub("HuggingFaceTB/SmolLM2-135M"), is_on_hub("/home/me/model"), is_on_hub("")
    (True, False, False)
    """
    try:
        validate_repo_id(name)
    except HFValidationError:  # no text, too
        return False
    return bool(name) and not Path(name).exists()


# ---- the run that it tells of ----------------------------------------------------------------------------------------


def _measured_run(model: PeftModel, folder: Path) -> dict[str, Any] | None:
    """The run.json of the run that measured exactly these weights; None where there is none.

    It lies in the folder of the card, or in one that the model was loaded from: equal checksums tell that it has not
    changed since.
    """
    here = checkpoint_in(folder)
    read_from = filter(None, (getattr(config, "read_from", None) for config in model.peft_config.values()))
    for place in (folder, *(Path(source) for source, _ in read_from)):
        there = checkpoint_in(place)
        record = read_record(place) if there and there["files"] == here.get("files") else None
        if record is not None and record["status"] == "finished" and record.get("save") == there["id"]:
            return record
    return None


# ---- what it says ----------------------------------------------------------------------------------------------------


def _sections(model: PeftModel, record: Mapping[str, Any] | None) -> list[str]:
    return list(filter(None, (_what(model), _losses(record), _loading(model), _serving(model))))


def _what(model: PeftModel) -> str:
    active = set(model.active_adapters)
    rows = [
        (name, count_experts(name, config), config.r, "yes" if name in active else "no")
        for name, config in model.peft_config.items()
    ]
    kind = model.active_peft_config.router_type
    if model.base_model.routing_or_none is None:
        how = "The base model's own router weighs them."
    else:
        how = "Their weights are fixed." if kind == "fixed" else f"A router (`{kind}`) weighs them for every token."
    text = f"LoRA experts for {_name(_base_name(model)) or 'a model without a name'}. {how}"
    return f"## What it is\n\n{text}\n\n{_table(('adapter', 'experts', 'rank of each', 'active'), rows)}"


def _losses(record: Mapping[str, Any] | None) -> str | None:
    if record is None:
        return None
    rows = [
        (name, *(_number(noted.get(f"{what}_{when}")) for what in ("loss", "perplexity") for when in _WHEN))
        for name, noted in record["domains"].items()
    ]
    head = ("domain", "loss before", "loss after", "perplexity before", "perplexity after")
    text = f"Loss per token (nats) on held-out texts, without the adapter and with it.\n\n{_table(head, rows)}"
    if earlier := [domain["name"] for domain in record.get(LEARNED_BEFORE, ())]:
        text += f"\n\nLearned earlier: {', '.join(map(_cell, earlier))}."
    return f"## What it learned\n\n{text}"


_WHEN = ("before", "after")


def _loading(model: PeftModel) -> str:
    base = model.get_base_model()
    return f"""## Loading it needs {LIBRARY}

PEFT does not know mixtures of LoRA experts by itself. Install {LIBRARY} (`pip install {LIBRARY}`), and import it in
every process that loads this adapter: without that PEFT ends with `KeyError: 'MOELORA'`.

```python
import {LIBRARY}
from peft import PeftModel
{_base_model(base, _base_name(model))}
model = PeftModel.from_pretrained(base_model, "{_PLACEHOLDER}")
```{_ROUTER if _has_attached(model) else ""}"""


_ROUTER = """

The router is a module of its author's, saved as `router.safetensors`. A stack of torch.nn's own layers comes back by
itself; any other has to be given: `PeftModel.from_pretrained(..., router=module)`."""


def _has_attached(model: PeftModel) -> bool:
    """Whether a router of its author's decides; where only native experts are adapted, none of ours does."""
    routing = model.base_model.routing_or_none
    return routing is not None and routing.attached is not None


def _base_model(base: Any, name: str) -> str:
    """The lines that load the base model, as far as they are known."""
    if not isinstance(base, PreTrainedModel) or not type(base).__module__.startswith("transformers.") or not name:
        return "\nbase_model = ...  # the model that it was trained on"
    cls = type(base).__name__
    return f"from transformers import {cls}\n\nbase_model = {cls}.from_pretrained({name!r})"


def _serving(model: PeftModel) -> str | None:
    """How to serve it; nothing where no server takes it."""
    if _has_attached(model) or model.active_peft_config.task_type != "CAUSAL_LM":
        return None
    return f"""## Serving

```
hf download "{_PLACEHOLDER}" --local-dir adapter
{LIBRARY} serve adapter
```

That serves it over OpenAI's API, by vLLM where that is installed, else by transformers' own server."""


def _base_name(model: PeftModel) -> str:
    return str(
        getattr(model.get_base_model(), "name_or_path", None) or model.active_peft_config.base_model_name_or_path or ""
    )


def _name(base: str) -> str:
    return f"[{base}](https://huggingface.co/{base})" if is_on_hub(base) else f"`{printable(base)}`" if base else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    return printable(value).replace("|", "\\|").replace("<", "&lt;")


def _number(value: Any) -> str:
    return "not finite" if value is None else f"{value:.3f}"
