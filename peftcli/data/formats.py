"""Row formats: detects what the columns of a source mean and builds examples from them.

Where the column names leave a doubt, the recipe must say it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftcli.data.chat_formats import is_chat, is_sharegpt
from peftcli.data.class_labels import Names
from peftcli.data.examples import (
    Maker,
    from_chat_pairs,
    from_chats,
    from_columns,
    from_instructions,
    from_questions,
    from_templates,
)
from peftcli.data.rows import LONG_NAME, Rows, listed, shown
from peftcli.data.values import InvalidValue, SkipRow
from peftcli.errors import DataError
from peftcli.nearest import nearest
from peftcli.plan.plan import LossMask
from peftcli.recipe.problems import choice_text
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
_TAGS = ("tags", "ner_tags", "pos_tags", "labels")
_LABELLED = ("text", "sentence")
_BESIDE_A_QUESTION = ("context", "passage", "choices", "options", "system", "system_prompt")
_LEARNED = re.compile(r"answer|response|output|completion|reply|target|label|summary|translation", re.IGNORECASE)
_SENTENCE = re.compile(r"\S\s+\S+\s+\S+\s+\S|\S\s.*[.?!]\s*$", re.DOTALL)
_NO_EXAMPLE = re.compile(r"(^|_)(id|index|idx)$|^\s*$|[{}\[\]:!]", re.IGNORECASE)
"""Columns that an example in a message leaves out: numbers of rows, and names that a template cannot hold."""


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
class RowFormat:
    """What the columns of a source mean.

    Attributes:
        kind: a key of KINDS.
        name: templates, columns, or the dialect that was recognised.
        said: one short sentence for the data report.
        columns: columns of the first rows that are used.
        prompt: template that new prompts are written in; None for chats and for plain text.
        reads: columns whose values `make` takes, in its order; later rows may have some that the first lack.
        make: makes the example of one row.
        problem_type: of a classification: single-label, multi-label or regression.
        names: of the classes or tags in their order, where they are given.
    """

    kind: str
    name: str
    said: str
    columns: tuple[str, ...]
    prompt: str | None
    reads: tuple[str, ...] = field(repr=False)
    make: Maker = field(repr=False)
    problem_type: str | None = None
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
            except SkipRow as reason:
                dropped.append((number, str(reason)))
            except InvalidValue as problem:
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


@dataclass(frozen=True)
class Given:
    """What decides, besides the rows, how they are read.

    Attributes:
        rule: the task and, where it is known, the problem type.
        names: `dataset.labels`.
        of_columns: names of classes by column, as data sets of the Hub keep them.
        folder: that the names of images are relative to.
        chats: the tokenizer has a chat template, so instructions and questions become chats.
    """

    rule: LossMask
    names: Names | None
    of_columns: Mapping[str, Names]
    folder: Path | None = None
    chats: bool = False


def choose_text_format(first: Rows, section: SourceSection, given: Given) -> RowFormat:
    """The reading that the recipe asks for, or the only one that the columns fit.

    Args:
        first: the first rows of the source, joins included; their columns and values decide.
        section: the source in the recipe.
        given: whether the tokenizer has a chat template.

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
    dialect = detect_format(first, section)
    if dialect.format in ("messages", "sharegpt"):
        return _chats(first, dialect.needs[0], None)
    if dialect.format == "alpaca":
        return _instructions(first, dialect, given.chats)
    if dialect.format == "question_answer":
        return _questions(dialect, given.chats)
    return _plain(first, dialect.needs, dialect.name, "")


def _by_templates(first: Rows, section: SourceSection, kind: str, templates: dict[str, str]) -> RowFormat:
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
    return RowFormat(
        kind=kind,
        name="templates",
        said=f"templates of the recipe over {joined(paths)}",
        columns=columns,
        prompt=templates.get("prompt"),
        reads=reads,
        make=from_templates(list(templates.values()), paths, [steps for _, steps in found]),
    )


def _by_columns(first: Rows, section: SourceSection, named: ColumnsSection) -> RowFormat:
    chosen = named.model_dump(exclude_none=True)
    missing = [name for name in chosen.values() if name not in first.columns]
    if missing:
        keys = [f"dataset.columns.{key}" for key, name in chosen.items() if name in missing]
        raise missing_columns(first, missing, len(chosen), joined(keys), section)
    if named.messages is not None:
        return _chats(first, named.messages, "columns")
    kind = "text" if named.text is not None else "prompt_completion"
    return _plain(first, [chosen[column] for column in KINDS[kind]], "columns", ", as dataset.columns says")


def _plain(first: Rows, names: Sequence[str], name: str, why: str) -> RowFormat:
    """Columns as they are: a text, or a prompt and a completion, which may be lists of turns."""
    if len(names) == 2 and all(is_chat(first_value(first, column)) for column in names):
        reads = (*names, "tools")
        said = f"chats: the turns of {names[0]}, then those of {names[1]}, which alone are learned{why}"
        return RowFormat("messages", name, said, _present(first, reads), None, reads, from_chat_pairs)
    kind = "text" if len(names) == 1 else "prompt_completion"
    prompt = "{prompt}" if kind == "prompt_completion" else None
    said = f"{joined(names)} as {'it is' if kind == 'text' else 'they are'}{why}"
    return RowFormat(kind, name, said, tuple(names), prompt, tuple(names), from_columns(names))


def _chats(first: Rows, column: str, name: str | None) -> RowFormat:
    spoken = is_sharegpt(first_value(first, column))
    said = f"chats in {column} ({'from, value' if spoken else 'role, content'})"
    if "system" in first.columns:
        said += ", system as their first turn"
    tools = next((tools for tools in ("tools", "functions") if tools in first.columns), None)
    said += f", with the tools in {tools}" if tools is not None else ""
    name = name or ("sharegpt" if spoken else "messages")
    reads = (column, "system", "tools", "functions")
    return RowFormat("messages", name, said, _present(first, reads), None, reads, from_chats)


@dataclass(frozen=True)
class ColumnFormat:
    """Columns that together mean something.

    Attributes:
        name: of the reading.
        format: value of `dataset.format` that chooses it.
        needs: columns that it cannot do without.
    """

    name: str
    format: str
    needs: tuple[str, ...]


def _instructions(first: Rows, dialect: ColumnFormat, chats: bool) -> RowFormat:
    asked, answer = dialect.needs
    more = "context" if dialect.name == "dolly" else "input"
    reads = (asked, more, answer, "system", "history")
    used = _present(first, reads)
    make = from_instructions(reads, chats=chats)
    said = f"{dialect.name} rows ({', '.join(used)}) "
    if chats:
        both = joined([name for name in (asked, more) if name in used])
        said += f"as chats: the user says {both}, the assistant {answer}"
        return RowFormat("messages", dialect.name, said, used, None, reads, make)
    said += 'under the headings "### Instruction:", "### Input:" (where there is one) and "### Response:"'
    prompt = f"### Instruction:\n{{{asked}}}\n\n### Response:\n"
    return RowFormat("prompt_completion", dialect.name, said, used, prompt, reads, make)


def _questions(dialect: ColumnFormat, chats: bool) -> RowFormat:
    question, answer = dialect.needs
    make = from_questions(dialect.needs, chats=chats)
    if chats:
        said = f"{question} and {answer} as chats: the user says {question}, the assistant {answer}"
        return RowFormat("messages", dialect.name, said, dialect.needs, None, dialect.needs, make)
    prompt = f"Question: {{{question}}}\nAnswer:"
    said = f'{question} and {answer} as "Question: {{{question}}}", then on a new line "Answer: {{{answer}}}"'
    return RowFormat("prompt_completion", dialect.name, said, dialect.needs, prompt, dialect.needs, make)


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


COLUMN_FORMATS = (
    ColumnFormat("text", "text", ("text",)),
    ColumnFormat("prompt_completion", "prompt_completion", ("prompt", "completion")),
    ColumnFormat("messages", "messages", ("messages",)),
    ColumnFormat("sharegpt", "sharegpt", ("conversations",)),
    ColumnFormat("alpaca", "alpaca", ("instruction", "output")),
    ColumnFormat("dolly", "alpaca", ("instruction", "response")),
    ColumnFormat("question_answer", "question_answer", ("question", "answer")),
    ColumnFormat("question_answer", "question_answer", ("query", "response")),
    ColumnFormat("question_answer", "question_answer", ("question", "response")),
)


def detect_format(first: Rows, section: SourceSection) -> ColumnFormat:
    """The dialect that the recipe names, or the only one that the columns fit.

    Raises:
        DataError: none fits, or more than one.
    """
    if section.format is not None:
        return _named(first, section.format)
    fits = [dialect for dialect in COLUMN_FORMATS if set(dialect.needs) <= set(first.columns)]
    _refuse_other_tasks(first)
    if len(fits) > 1:
        raise DataError(_several(first, fits))
    if not fits:
        raise DataError(_unknown(first, section))
    beside = [name for name in _BESIDE_A_QUESTION if name in first.columns]
    if fits[0].name == "question_answer" and beside:
        raise DataError(_beside_a_question(first, fits[0], beside[0]))
    return fits[0]


def missing_columns(first: Rows, missing: Sequence[str], wanted: int, key: str, section: SourceSection) -> DataError:
    """The error for columns that the recipe names and the rows do not have.

    Args:
        first: the first rows.
        missing: the names.
        wanted: how many columns the recipe names in all.
        key: the recipe key that names them.
        section: the source.
    """
    near = [
        found
        for name in missing
        if (found := nearest(name, first.columns) or nearest(name.partition(".")[0], first.columns)) is not None
    ]
    fix = (
        f"did you mean {choice_text([shown(name) for name in dict.fromkeys(near)])}?"
        if near
        else f"name one of these in {key}"
    )
    hint = (_header_hint(first, section) if len(missing) == wanted else "") or _edge_hint(first)
    return DataError(f"{first.file}: no column {listed(missing)}; it has {listed(first.columns)}; {fix}{hint}")


def first_value(first: Rows, name: str) -> Any:
    """The first value of a column that is not null."""
    return next((value for value in first.columns.get(name, ()) if value is not None), None)


def joined(names: Sequence[str]) -> str:
    """Names for a sentence: a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""


def _named(first: Rows, format_: str) -> ColumnFormat:
    # A list of turns is read the same way under either name, so each may stand for the other.
    ways = {"messages": ("messages", "sharegpt"), "sharegpt": ("sharegpt", "messages")}.get(format_)
    if ways is not None:
        chats = [dialect for way in ways for dialect in COLUMN_FORMATS if dialect.name == way]
        fits = [dialect for dialect in chats if dialect.needs[0] in first.columns][:1]
    else:
        chats = [dialect for dialect in COLUMN_FORMATS if dialect.format == format_]
        fits = [dialect for dialect in chats if set(dialect.needs) <= set(first.columns)]
    if not fits:
        needs = choice_text([" with ".join(dialect.needs) for dialect in chats])
        raise DataError(
            f"{first.file}: dataset.format: {format_} takes the columns {needs}; it has {listed(first.columns)}; "
            "name the columns in templates (dataset.prompt and dataset.completion) or in dataset.columns"
        )
    if len(fits) > 1:
        raise DataError(_several(first, fits))
    return fits[0]


def _several(first: Rows, fits: Sequence[ColumnFormat]) -> str:
    shown = joined([f"{dialect.format} ({', '.join(dialect.needs)})" for dialect in fits])
    formats = list(dict.fromkeys(dialect.format for dialect in fits))
    if len(formats) == len(fits):
        fix = f"set dataset.format: {choice_text(formats)}"
    else:
        fix = f"say which columns with templates, such as {_pair(*fits[0].needs)}"
    return f"{first.file}: its columns ({listed(first.columns)}) can be read in {len(fits)} ways: {shown}; {fix}"


def _beside_a_question(first: Rows, dialect: ColumnFormat, beside: str) -> str:
    question, answer = dialect.needs
    return (
        f"{first.file}: the column {beside} beside {question} and {answer} may belong into the prompt; say it with "
        f'templates, such as prompt: "{{{beside}}}\\n\\n{{{question}}}\\n", completion: "{{{answer}}}", or leave it '
        "out with dataset.format: question_answer"
    )


def _unknown(first: Rows, section: SourceSection) -> str:
    names = [name for name in first.columns if not _NO_EXAMPLE.search(name)] or ["column"]
    chat = next((name for name in first.columns if is_chat(first_value(first, name))), None)
    texts = [name for name in names if isinstance(first_value(first, name), str | int | float)] or names
    learned = next((name for name in texts if _LEARNED.search(name)), texts[-1])
    asked = next((name for name in texts if name != learned), None)
    if chat is not None:
        example = f"columns: {{messages: {chat}}}"
    elif asked is not None:
        example = f'{{prompt: "{{{asked}}} ->", completion: " {{{learned}}}"}}'
    else:
        example = f'{{text: "{{{learned}}}"}}'
    hint = _header_hint(first, section) if any(map(_is_like_a_cell, first.columns)) else _edge_hint(first)
    if hint:
        return f"{first.file}: its columns ({listed(first.columns)}) are no known format{hint}"
    return (
        f"{first.file}: its columns ({listed(first.columns)}) are no known format; known are text, prompt with "
        "completion, messages, conversations, instruction with output or response, and question with answer;\n  set "
        "dataset.prompt and dataset.completion (or dataset.text) to templates over the columns, or name them in "
        f"dataset.columns, for example\n  dataset: {example}"
    )


def _is_like_a_cell(name: str) -> bool:
    """Whether a column name is rather a number or a sentence out of the first row."""
    return len(name) > LONG_NAME or name.replace(".", "", 1).isdecimal() or _SENTENCE.search(name) is not None


def _refuse_other_tasks(first: Rows) -> None:
    """Raise for data made for another kind of training, with what they can teach here."""
    names = set(first.columns)
    tags = next((name for name in _TAGS if name in names), None)
    labelled = next((name for name in _LABELLED if name in names), None)
    if {"chosen", "rejected"} <= names:
        what = "a chosen and a rejected answer in each row (preference data)"
        fix = f"to learn the chosen ones, set {_chosen(first)}"
    elif {"prompt", "completion", "label"} <= names and _is_true_or_false(first_value(first, "label")):
        what = "completions labelled as good or bad (KTO data)"
        fix = (
            "every completion would be learned as good; keep the rows whose label is true, and set "
            "dataset.format: prompt_completion"
        )
    elif "tokens" in names and tags is not None:
        what = f"a tag for each word ({tags}; token classification)"
        fix = f"set model.task: token-classification, or, to learn the tags as text, {_pair('tokens', tags)}"
        if isinstance(first_value(first, tags), list) and not all(isinstance(v, str) for v in first_value(first, tags)):
            fix += f", with the tags' names in {tags} in place of numbers"
    elif labelled is not None and "label" in names and not {"prompt", "completion"} <= names:
        what = f"a label for each {labelled} (classification)"
        fix = f"set model.task: sequence-classification, or, to learn the label as text, {_pair(labelled, 'label')}"
        fix += "; to learn the text alone, dataset.format: text" if labelled == "text" else ""
    else:
        return
    raise DataError(f"{first.file}: its columns ({listed(first.columns)}) hold {what}; {fix}")


def _chosen(first: Rows) -> str:
    prompted = "prompt" in first.columns
    if is_chat(first_value(first, "chosen")):
        both = prompted and is_chat(first_value(first, "prompt"))
        return "dataset.columns: " + ("{prompt: prompt, completion: chosen}" if both else "{messages: chosen}")
    return 'dataset: {prompt: "{prompt}", completion: "{chosen}"}' if prompted else 'dataset.text: "{chosen}"'


def _is_true_or_false(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))


def _pair(asked: str, learned: str) -> str:
    return f'dataset: {{prompt: "{{{asked}}}\\n{learned}:", completion: " {{{learned}}}"}}'


def _edge_hint(first: Rows) -> str:
    return "" if all(name == name.strip() for name in first.columns) else "; write the names without white space around"


def _header_hint(first: Rows, section: SourceSection) -> str:
    """What to do where the first row of a CSV file was taken for its header."""
    is_csv = section.file_format in ("csv", "tsv") or re.search(r"\.[ct]sv(\.|$)", first.file.lower()) is not None
    if not is_csv or section.csv.column_names is not None:
        return ""
    return "; if its first line is a row and no header, name the columns in dataset.csv.column_names"
