"""The interface through which the commands report progress, independent of how it is shown."""

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Receives progress messages while a command runs."""

    def note(self, text: str) -> None:
        """Print one line permanently."""

    def start(self, what: str, total: int) -> None:
        """Start a progress bar over `total` units of work; 0 if the total is unknown."""

    def advance(self, done: int, figures: Mapping[str, str] | None = None) -> None:
        """Report that `done` units are complete; `figures` are names and values to show."""

    def end(self) -> None:
        """Finish the progress bar."""


class Silent:
    """Shows nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""

    def start(self, what: str, total: int) -> None:
        """Show nothing."""

    def advance(self, done: int, figures: Mapping[str, str] | None = None) -> None:
        """Show nothing."""

    def end(self) -> None:
        """Show nothing."""
