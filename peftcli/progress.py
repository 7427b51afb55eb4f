"""How the verbs tell somebody what they are at, without knowing who listens."""

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Receives what a person may want to see while work goes on."""

    def note(self, text: str) -> None:
        """One line that stays."""

    def start(self, what: str, total: int) -> None:
        """A stretch of `total` units of work begins; 0 where nobody knows how many."""

    def advance(self, done: int, figures: Mapping[str, str] | None = None) -> None:
        """`done` units are through; `figures` are names and values for people."""

    def end(self) -> None:
        """The stretch is over."""


class Silent:
    """Nobody listens."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def start(self, what: str, total: int) -> None:
        """Show nothing."""

    def advance(self, done: int, figures: Mapping[str, str] | None = None) -> None:
        """Show nothing."""

    def end(self) -> None:
        """Show nothing."""
