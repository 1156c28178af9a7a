"""What a cell of a table of items or users says: nothing, one value, or several. Every stage reads it alike."""

NO_VALUE = frozenset({"", "nan", "null", "none", "<na>"})
"""Texts, casefolded, that mean "nothing here": an empty cell and what pandas, SQL and Python write for one."""
SEPARATORS = "|;,"
"""Any of these characters stands between the values of one cell: "Comedy|Drama", "Comedy, Drama"."""


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
