"""What a label is called: the same whether a file or a configuration writes it as a number or as text."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

WHOLE = re.compile(r"-?\d+\.0+")  # a whole number as a column of decimals writes it


def name_of(value: Any) -> str:
    """A label value as its name: 1, 1.0, '1' and '1.0' are the same label, which files write in different ways."""
    if type(value) is str:
        return _name_of_text(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return _name_of_text(str(value))


@lru_cache(maxsize=4096)  # of all rows' labels few are different
def _name_of_text(text: str) -> str:
    name = text.strip()
    return name[: name.index(".")] if WHOLE.fullmatch(name) else name


def name_of_number(value: Any) -> Any:
    """The name of a label that YAML reads as a number; anything else, true and false too, as it is."""
    return name_of(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
