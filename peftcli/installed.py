"""Which packages are installed, without importing them."""

import importlib.metadata
from collections.abc import Sequence


def installed_versions(names: Sequence[str]) -> dict[str, str | None]:
    """The installed version of each package, None if it is missing."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
