"""What the model card of an adapter says of moelora: PEFT's own says nothing of what PEFT does not know by itself."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from ..config_rules import LIBRARY

_HEADING = f"## Loading it needs {LIBRARY}"
_TEXT = f"""{_HEADING}

This adapter is a mixture of LoRA experts, which PEFT does not know by itself. Every process that loads it has to import
{LIBRARY} first, or PEFT ends with `KeyError: 'MOELORA'`.

```python
import {LIBRARY}
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder, or its name on the hub")
```
"""


def say_what_to_import(path: Path) -> None:
    """Add that to a model card, which PEFT has just written or updated, unless it says so already."""
    card = ModelCard.load(path)
    card.data["tags"] = sorted({*(card.data.get("tags") or []), LIBRARY})
    if _HEADING not in card.text.splitlines():
        card.text = f"{_TEXT}\n{card.text.lstrip()}"
    card.save(path)
