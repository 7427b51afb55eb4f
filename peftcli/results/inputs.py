"""`inputs.json`: the files that the recipe of a run names."""

from dataclasses import dataclass

from peftcli.results.schema import SCHEMA


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A file, a folder or a glob that the recipe names.

    Attributes:
        key: of the recipe, such as `dataset.join[0].path`.
        path: absolute, at the time of training.
        beside: the same path as seen from the run folder.
        sha256: of the content; None for what holds no rows.
    """

    key: str
    path: str
    beside: str
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class InputsJson:
    """`inputs.json`."""

    schema: int = SCHEMA
    inputs: tuple[InputFile, ...] = ()
