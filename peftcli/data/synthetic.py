"""Synthetic rows for a dataset that a smoke run does not download."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peftcli.data.rows import Rows
from peftcli.recipe.schema import SourceSection
from peftcli.recipe.template import template_columns
from peftcli.tasks.registry import DEFAULT, TASKS


@dataclass(frozen=True)
class SyntheticSource:
    """A source of synthetic rows with the columns that a section uses.

    Attributes:
        section: of the source that is replaced.
        rows: number of rows.
        like: section with the row format, if it is another one, as for test rows.
        task, problem_type, labels: of the recipe; rows alternate between two labels.
    """

    section: Any
    rows: int
    like: Any = None
    task: str = DEFAULT
    problem_type: str = "auto"
    labels: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        return f"{self.section.name or 'a database'} (synthetic rows of a smoke run)"

    def fingerprint(self) -> str:
        """Constant, since the rows are; other keys of the section distinguish sources."""
        return f"made up {self.rows} {self.task} {self.problem_type} {self.labels}"

    def batches(self) -> Iterator[Rows]:
        """All rows at once."""
        yield Rows("made-up", list(range(1, self.rows + 1)), self._columns())

    def _columns(self) -> dict[str, list[Any]]:
        read = self.like or self.section
        section = read if isinstance(read, SourceSection) else None
        if not TASKS[self.task].generates:
            return self._labelled(section)
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

    def _labelled(self, section: SourceSection | None) -> dict[str, list[Any]]:
        named = section.columns if section is not None else None
        numbers = range(self.rows)
        if TASKS[self.task].label_of == "token":
            words, tags = (named.tokens if named else None) or "tokens", (named.tags if named else None) or "tags"
            first, second = (self.labels or ("O", "B-number"))[:2]
            tagged = [[first, second] if number % 2 else [first, first] for number in numbers]
            return {words: [["number", str(number)] for number in numbers], tags: tagged}
        texts = [name.split(".")[0] for name in template_columns(section.text)] if section and section.text else []
        texts = texts or [(named.text if named else None) or "text"]
        texts += [named.text_pair] if named and named.text_pair else []
        label = (named.label if named else None) or "label"
        made: dict[str, list[Any]] = {name: [f"{name} number {number}" for number in numbers] for name in texts}
        return made | {label: [self._label(number) for number in numbers]}

    def _label(self, number: int) -> Any:
        """The label of a row: one of two classes, a list with it, or a number."""
        one = (self.labels or ("0", "1"))[:2][number % 2]
        if self.problem_type == "regression":
            return number / 2
        return [one] if self.problem_type == "multi-label" else one


_TURNS = (("user", "Say the number {}."), ("assistant", "The number is {}."))
_OF_FORMATS: dict[Any, list[str]] = {
    "text": ["text"],
    "prompt_completion": ["prompt", "completion"],
    "alpaca": ["instruction", "input", "output"],
    "question_answer": ["question", "answer"],
}
