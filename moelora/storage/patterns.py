"""Whether the patterns of a configuration come to an end, checked before anything is matched with them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from ..config_rules import shown

SECONDS = 5.0
_FIELDS_OF_PATTERNS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)

# Python's `re` takes no time limit and cannot be interrupted: patterns that might never end are tried in a process of
# their own, which can be killed.
_TRY = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.fullmatch(pattern, name)
        re.match(rf"(.*\\.)?({pattern})$", name)
"""


def check_patterns_end(config: Any, names: Iterable[str]) -> None:
    """Refuse regular expressions that do not come to an end on the names of a model's modules.

    Args:
        config: a LoRA's configuration.
        names: of the modules.

    Raises:
        ValueError: naming the field.
    """
    fields = {name: _patterns(getattr(config, name, None)) for name in _FIELDS_OF_PATTERNS}
    suspects = {name: found for name, patterns in fields.items() if (found := [p for p in patterns if _repeats(p)])}
    if not suspects:
        return
    names = [name for name in names if name]
    for field, patterns in suspects.items():
        try:
            subprocess.run(
                [sys.executable, "-I", "-S", "-c", _TRY],
                input=json.dumps([patterns, names]).encode(),
                capture_output=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(
                f"`{field}` ({shown(patterns)}) is a pattern that did not come to an end on {len(names)} module "
                f"names in {SECONDS:.0f} s; write one without repetitions inside repetitions"
            ) from None


def _patterns(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _repeats(pattern: str) -> bool:
    """Whether a pattern may take longer than its names are long, squared: it repeats twice, or repeats a group."""
    return sum(map(pattern.count, "*+{?")) > 1 or any(f"){sign}" in pattern for sign in "*+{")
