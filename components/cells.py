"""What a cell of a table of items or users says: nothing, one value, or several. Every stage reads it alike."""

import ast
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

NO_VALUE = frozenset({"", "nan", "null", "none", "<na>"})
"""Texts, casefolded, that mean "nothing here": an empty cell and what pandas, SQL and Python write for one."""
SEPARATORS = "|;,"
"""Any of these characters stands between the values of one cell: "Comedy|Drama", "Comedy, Drama"."""

# strings with nothing but a space between them, which Python would read as one: so numpy writes its arrays
_NO_COMMA = re.compile(r"""(?<![\[,\s])['"]\s+['"]""")


def text_of(value: Any, clean: Callable[[str], str]) -> str:
    """What a cell or a field says as one text, "" for nothing: of a list its values, joined by commas.

    Args:
        value: a text, which may be a list as Python writes one ("['Comedy', 'Drama']", as a saved frame has it), a number, or a
            list of such. Truth values and mappings say nothing, no order being known in which they could be read; a text that
            holds one is a text.
        clean: makes what is shown of one text.
    """
    if isinstance(value, str):
        value = _unlisted(value)
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, (text_of(one, clean) for one in value)))
    if value is None or isinstance(value, bool | dict) or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    text = clean(str(value))
    return "" if text.casefold() in NO_VALUE else text


def _unlisted(text: str) -> Any:
    """The list that a text is as Python writes it; the text itself where it is none, or only looks like one."""
    stripped = text.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")) or _NO_COMMA.search(stripped):
        return text
    try:
        with warnings.catch_warnings(action="ignore"):  # a backslash that escapes nothing
            found = ast.literal_eval(stripped)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return text
    return found if _can_be_read(found) else text


def _can_be_read(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_can_be_read, value))
    return value is None or isinstance(value, str | int | float)


def values_of(cell: str, separators: str = SEPARATORS) -> list[str]:
    """The values of one cell in their order, each once.

    Args:
        cell: its text.
        separators: any of these characters stands between two values; "": the cell is one value.
    """
    for mark in separators[1:]:
        cell = cell.replace(mark, separators[0])
    parts = cell.split(separators[0]) if separators else [cell]
    return list(dict.fromkeys(value for part in parts if (value := part.strip())))


def are_shared(num_distinct: int, num_values: int) -> bool:
    """Whether the values of a column repeat among its rows as genres do, twice or more on average; phrases hardly do."""
    return 2 * num_distinct <= num_values
