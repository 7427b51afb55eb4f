"""Names of columns, and other short words out of the data, as messages show them."""

from collections.abc import Iterable

from peftcli.recipe.problems import printable

MOST_NAMES = 20
"""Columns that a message names."""
LONG_NAME = 40
"""A column name longer than this looks like a cell; letters."""


def shown(name: str) -> str:
    """A name without what a terminal would act on; in quotes where white space at its edge would not be seen.

    >>> shown("price"), shown(" price"), shown("")
    ('price', '" price"', '""')
    """
    text = printable(name, LONG_NAME)
    return text if name and name == name.strip() else f'"{text}"'


def listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are.

    >>> listed(["a", "b "]), listed(map(str, range(22)))[-14:]
    ('a, "b "', '19, and 2 more')
    """
    given = [shown(name) for name in names]
    more = [f"and {len(given) - MOST_NAMES} more"] if len(given) > MOST_NAMES else []
    return ", ".join([*given[:MOST_NAMES], *more])
