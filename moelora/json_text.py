"""JSON that strangers wrote: nothing in it ends in a traceback, here or in whatever walks through the values."""

import json
from typing import Any

DEEPEST = 100
"""Levels that lists and mappings may lie in each other: whatever walks through them calls itself once for each."""


class NotReadableError(ValueError):
    """A file or a text is no regular file or does not hold what it should; the message says why, not where."""


def parse_json(text: str) -> Any:
    """A value from JSON, which nests at most [`DEEPEST`] levels.

    Raises:
        NotReadableError: it is no JSON, nests deeper, or holds a number of thousands of digits.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise NotReadableError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise NotReadableError(_TOO_DEEP) from None
    except ValueError as error:  # Python's limit on the digits of an integer
        raise NotReadableError(f"not JSON that can be read ({error})") from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Refuse a value of lists and mappings that nests deeper than [`DEEPEST`] levels.

    Raises:
        NotReadableError: it does.
    """
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [inner for item in level if isinstance(item, (dict, list)) for inner in _parts(item)]
        if not level:
            return
    raise NotReadableError(_TOO_DEEP)


def _parts(item: dict[Any, Any] | list[Any]) -> Any:
    return item.values() if isinstance(item, dict) else item


_TOO_DEEP = f"lists and mappings lie in each other more than {DEEPEST} levels deep"
