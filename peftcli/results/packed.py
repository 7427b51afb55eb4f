"""`pack.json`: what an archive of a run contains, and what it needs."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from peftcli.results.schema import SCHEMA


@dataclass(frozen=True, kw_only=True)
class PackedBase:
    """The base model of a packed run.

    Attributes:
        name: Hub id, `tiny:...`, or the name of a local folder.
        found_by: `hub`, `built_in`, `archive` (it is in the archive) or `model_option` (pass it with `--model`); None
            for a merged model.
        commit: of the Hub repository.
        config_sha256: of its configuration.
        weights_sha256: of a sample of its weights.
    """

    name: str = ""
    found_by: str | None = None
    commit: str | None = None
    config_sha256: str | None = None
    weights_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class PackJson:
    """`pack.json`.

    Attributes:
        model: `adapter` or `merged`.
        test_rows: in `test.jsonl`; None if they were not packed.
        needs: options that a command needs on another machine.
        files: SHA-256 by name.
    """

    schema: int = SCHEMA
    name: str = ""
    model: str = "adapter"
    base: PackedBase = field(default_factory=PackedBase)
    test_rows: int | None = None
    needs: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
