"""The version of the files of a run, which each of them states, and types that several use."""

from collections.abc import Mapping
from typing import TypeAlias

SCHEMA = 1
Counts: TypeAlias = Mapping[str, int | None]
