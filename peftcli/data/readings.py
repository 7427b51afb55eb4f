"""How the rows of a source are read: what its columns mean, and the examples that they make."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from peftcli.data.chats import is_sharegpt, is_turns
from peftcli.data.fill import (
    Maker,
    from_chat_pairs,
    from_chats,
    from_columns,
    from_instructions,
    from_questions,
    from_templates,
)
from peftcli.data.recognise import Dialect, first_value, joined, missing_columns, recognise
from peftcli.data.rows import Rows
from peftcli.data.values import Unused, Wrong
from peftcli.errors import DataError
from peftcli.recipe.schema import ColumnsSection, SourceSection
from peftcli.recipe.template import split_path, template_columns

KINDS = {
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages", "tools"),
    "text": ("text",),
    "classification": ("text", "text_pair", "label"),
    "tagging": ("tokens", "tags"),
    "images": ("image", "name", "pixels", "label"),
}
"""The columns of the examples of each kind; of `LABELLED` kinds the last is the label, as text or as JSON."""
LABELLED = ("classification", "tagging", "images")

_HALF_CHARACTER = "with half a character (a lone surrogate)"


@dataclass(frozen=True)
class Examples:
    """Examples of one kind made from one batch of rows.

    Attributes:
        columns: the names of KINDS[kind]; messages and tools are JSON, tools and text_pair empty where a row has none.
        kept: for each example the row of the batch that it was made from.
        dropped: rows of the batch that make no example, with the reason.
        content: for each example the user's own words, without templates and system turns.
    """

    columns: dict[str, list[str]]
    kept: list[int]
    dropped: list[tuple[int, str]]
    content: list[str]


@dataclass(frozen=True)
class Reading:
    """What the columns of a source mean.

    Attributes:
        kind: a key of KINDS.
        name: templates, columns, or the dialect that was recognised.
        said: one short sentence for the data report.
        columns: columns of the first rows that are used.
        prompt: template that new prompts are written in; None for chats and for plain text.
        reads: columns whose values `make` takes, in its order; later rows may have some that the first lack.
        make: makes the example of one row.
        problem: of a classification: single-label, multi-label or regression.
        names: of the classes or tags in their order, where they are given.
    """

    kind: str
    name: str
    said: str
    columns: tuple[str, ...]
    prompt: str | None
    reads: tuple[str, ...] = field(repr=False)
    make: Maker = field(repr=False)
    problem: str | None = None
    names: tuple[str, ...] | None = None

    def examples(self, rows: Rows) -> Examples:
        """The examples of a batch; each row is either kept or dropped with a reason."""
        nothing = [None] * len(rows)
        made: list[tuple[str, ...]] = []
        kept: list[int] = []
        dropped: list[tuple[int, str]] = []
        for number, values in enumerate(zip(*(rows.columns.get(name, nothing) for name in self.reads), strict=True)):
            try:
                made.append(self.make(values))
            except Unused as reason:
                dropped.append((number, str(reason)))
            except Wrong as problem:
                raise DataError(f"{rows.place(number)}: {problem}") from problem
            else:
                kept.append(number)
        halves = _half_characters(made)
        if halves:
            dropped = sorted([*dropped, *((kept[number], _HALF_CHARACTER) for number in halves)])
            kept = [row for number, row in enumerate(kept) if number not in halves]
            made = [texts for number, texts in enumerate(made) if number not in halves]
        names = KINDS[self.kind]
        *columns, content = [list(column) for column in zip(*made, strict=True)] or [[] for _ in (*names, "content")]
        return Examples(dict(zip(names, columns, strict=True)), kept, dropped, content)


def choose_reading(first: Rows, section: SourceSection, *, chats: bool) -> Reading:
    """The reading that the recipe asks for, or the only one that the columns fit.

    Args:
        first: the first rows of the source, joins included; their columns and values decide.
        section: the source in the recipe.
        chats: the tokenizer has a chat template, so that instructions and questions become chats.

    Raises:
        DataError: a column is missing, no reading fits, or more than one.
    """
    if section.text is not None:
        return _by_templates(first, section, "text", {"text": section.text})
    if section.prompt is not None and section.completion is not None:
        templates = {"prompt": section.prompt, "completion": section.completion}
        return _by_templates(first, section, "prompt_completion", templates)
    if section.columns is not None:
        return _by_columns(first, section, section.columns)
    dialect = recognise(first, section)
    if dialect.format in ("messages", "sharegpt"):
        return _chats(first, dialect.needs[0], None)
    if dialect.format == "alpaca":
        return _instructions(first, dialect, chats)
    if dialect.format == "question_answer":
        return _questions(dialect, chats)
    return _plain(first, dialect.needs, dialect.name, "")


def _by_templates(first: Rows, section: SourceSection, kind: str, templates: dict[str, str]) -> Reading:
    paths = list(dict.fromkeys(path for template in templates.values() for path in template_columns(template)))
    ways = [split_path(path, first.columns) for path in paths]
    found = [way for way in ways if way is not None]
    learned = "text" if kind == "text" else "completion"
    if not template_columns(templates[learned]):
        text = f"dataset.{learned} names no column, so all rows are equal; write {{column}} where a column goes"
        raise DataError(f"{first.file}: {text}")
    if len(found) < len(paths):
        missing = [path for path, way in zip(paths, ways, strict=True) if way is None]
        keys = [f"dataset.{key}" for key, text in templates.items() if set(missing) & set(template_columns(text))]
        raise missing_columns(first, missing, len(paths), joined(keys), section)
    reads = tuple(column for column, _ in found)
    columns = tuple(dict.fromkeys(reads))
    return Reading(
        kind=kind,
        name="templates",
        said=f"templates of the recipe over {joined(paths)}",
        columns=columns,
        prompt=templates.get("prompt"),
        reads=reads,
        make=from_templates(list(templates.values()), paths, [steps for _, steps in found]),
    )


def _by_columns(first: Rows, section: SourceSection, named: ColumnsSection) -> Reading:
    chosen = named.model_dump(exclude_none=True)
    missing = [name for name in chosen.values() if name not in first.columns]
    if missing:
        keys = [f"dataset.columns.{key}" for key, name in chosen.items() if name in missing]
        raise missing_columns(first, missing, len(chosen), joined(keys), section)
    if named.messages is not None:
        return _chats(first, named.messages, "columns")
    kind = "text" if named.text is not None else "prompt_completion"
    return _plain(first, [chosen[column] for column in KINDS[kind]], "columns", ", as dataset.columns says")


def _plain(first: Rows, names: Sequence[str], name: str, why: str) -> Reading:
    """Columns as they are: a text, or a prompt and a completion, which may be lists of turns."""
    if len(names) == 2 and all(is_turns(first_value(first, column)) for column in names):
        reads = (*names, "tools")
        said = f"chats: the turns of {names[0]}, then those of {names[1]}, which alone are learned{why}"
        return Reading("messages", name, said, _present(first, reads), None, reads, from_chat_pairs)
    kind = "text" if len(names) == 1 else "prompt_completion"
    prompt = "{prompt}" if kind == "prompt_completion" else None
    said = f"{joined(names)} as {'it is' if kind == 'text' else 'they are'}{why}"
    return Reading(kind, name, said, tuple(names), prompt, tuple(names), from_columns(names))


def _chats(first: Rows, column: str, name: str | None) -> Reading:
    spoken = is_sharegpt(first_value(first, column))
    said = f"chats in {column} ({'from, value' if spoken else 'role, content'})"
    if "system" in first.columns:
        said += ", system as their first turn"
    tools = next((tools for tools in ("tools", "functions") if tools in first.columns), None)
    said += f", with the tools in {tools}" if tools is not None else ""
    name = name or ("sharegpt" if spoken else "messages")
    reads = (column, "system", "tools", "functions")
    return Reading("messages", name, said, _present(first, reads), None, reads, from_chats)


def _instructions(first: Rows, dialect: Dialect, chats: bool) -> Reading:
    asked, answer = dialect.needs
    more = "context" if dialect.name == "dolly" else "input"
    reads = (asked, more, answer, "system", "history")
    used = _present(first, reads)
    make = from_instructions(reads, chats=chats)
    said = f"{dialect.name} rows ({', '.join(used)}) "
    if chats:
        both = joined([name for name in (asked, more) if name in used])
        said += f"as chats: the user says {both}, the assistant {answer}"
        return Reading("messages", dialect.name, said, used, None, reads, make)
    said += 'under the headings "### Instruction:", "### Input:" (where there is one) and "### Response:"'
    prompt = f"### Instruction:\n{{{asked}}}\n\n### Response:\n"
    return Reading("prompt_completion", dialect.name, said, used, prompt, reads, make)


def _questions(dialect: Dialect, chats: bool) -> Reading:
    question, answer = dialect.needs
    make = from_questions(dialect.needs, chats=chats)
    if chats:
        said = f"{question} and {answer} as chats: the user says {question}, the assistant {answer}"
        return Reading("messages", dialect.name, said, dialect.needs, None, dialect.needs, make)
    prompt = f"Question: {{{question}}}\nAnswer:"
    said = f'{question} and {answer} as "Question: {{{question}}}", then on a new line "Answer: {{{answer}}}"'
    return Reading("prompt_completion", dialect.name, said, dialect.needs, prompt, dialect.needs, make)


def _present(first: Rows, reads: Sequence[str]) -> tuple[str, ...]:
    return tuple(column for column in reads if column in first.columns)


def _half_characters(made: list[tuple[str, ...]]) -> set[int]:
    """Examples with half of a pair that UTF-16 writes one character with: JSON can hold it, UTF-8 cannot."""

    def is_whole(texts: Iterable[str]) -> bool:
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            return False
        return True

    if is_whole(map("".join, made)):
        return set()
    return {number for number, texts in enumerate(made) if not is_whole(texts)}
