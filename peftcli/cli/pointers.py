"""Where a command line says that the base and the rows of a run are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pointers:
    """What the command line says about a run.

    Attributes:
        model: where its base is now: a local folder or a Hub id.
        data: where the files with its rows are now.
        overrides: `section.key=value` strings.
    """

    model: str | None = None
    data: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the overrides."""
        return tuple(one.partition("=")[0].strip() for one in self.overrides)
