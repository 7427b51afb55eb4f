"""Rows that stand in for a data set that a smoke run cannot have, since it has no network."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peftcli.data.rows import Rows
from peftcli.recipe.schema import SourceSection
from peftcli.recipe.template import template_columns


@dataclass(frozen=True)
class MadeUp:
    """A source of made-up rows with the columns that a section asks for."""

    section: Any
    rows: int

    @property
    def name(self) -> str:
        return f"{self.section.name or 'a database'} (made-up rows of a smoke run)"

    def fingerprint(self) -> str:
        """The same rows each time; the section's own keys tell one source from another."""
        return f"made up {self.rows}"

    def batches(self) -> Iterator[Rows]:
        """All rows at once."""
        yield Rows("made-up", list(range(1, self.rows + 1)), self._columns())

    def _columns(self) -> dict[str, list[Any]]:
        section = self.section if isinstance(self.section, SourceSection) else None
        templates = [getattr(section, key, None) for key in ("text", "prompt", "completion")]
        names = [name.split(".")[0] for part in templates if part is not None for name in template_columns(part)]
        chosen = section.columns.model_dump(exclude_none=True) if section is not None and section.columns else {}
        names += [column for key, column in chosen.items() if key != "messages"]
        format_ = getattr(section, "format", None)
        names += _OF_FORMATS.get(format_, [])
        numbers = range(self.rows)
        columns: dict[str, list[Any]] = {name: [f"{name} number {number}" for number in numbers] for name in names}
        if not names:
            columns[chosen.get("messages", "messages")] = [
                [{"role": role, "content": text.format(number)} for role, text in _TURNS] for number in numbers
            ]
        return columns


_TURNS = (("user", "Say the number {}."), ("assistant", "The number is {}."))
_OF_FORMATS: dict[Any, list[str]] = {
    "text": ["text"],
    "prompt_completion": ["prompt", "completion"],
    "alpaca": ["instruction", "input", "output"],
    "question_answer": ["question", "answer"],
}
