"""Row formats: detects the format of a source from its columns, and builds examples.

If the columns are ambiguous, the recipe must name the format.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftcli.data.chat_formats import ChatRules, is_chat, is_sharegpt
from peftcli.data.class_labels import Names
from peftcli.data.examples import (
    Maker,
    from_chat_pairs,
    from_chats,
    from_columns,
    from_instructions,
    from_questions,
    from_templates,
    inner_value,
)
from peftcli.data.loss_flags import flag_columns, flag_keys
from peftcli.data.other_tasks import (
    rating,
    refuse_other_tasks,
    refuse_ratings_and_media,
    template_pair,
    text_path,
)
from peftcli.data.rows import LONG_NAME, Rows, first_value, listed, shown
from peftcli.data.values import InvalidValue, SkipRow, parsed_list
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
"""The columns of the examples of each kind; for `LABELLED` kinds the last is the label, as text or JSON."""
LABELLED = ("classification", "tagging", "images")

_LONE_SURROGATE = "with a lone surrogate (half a character)"
_QUESTION_CONTEXT = ("context", "passage", "choices", "options", "system", "system_prompt")
_LEARNED = re.compile(r"answer|response|output|completion|reply|target|label|summary|translation", re.IGNORECASE)
_ASKED = re.compile(r"prompt|question|instruction|query|input|source|sentence|request", re.IGNORECASE)
_SENTENCE = re.compile(r"\S\s+\S+\s+\S+\s+\S|\S\s.*[.?!]\s*$", re.DOTALL)
_NO_EXAMPLE = re.compile(r"(^|_)(id|index|idx)$|^\s*$|[{}\[\]:!]", re.IGNORECASE)
"""Columns that are not used for the example in a message: row numbers, and names that a template cannot contain."""


@dataclass(frozen=True)
class Examples:
    """Examples built from one batch of rows.

    Attributes:
        columns: named as in KINDS[kind]; messages and tools are JSON, tools and text_pair are empty if a row has none.
        kept: the row in the batch of each example.
        dropped: dropped rows of the batch, with the reason.
        content: the text of each example without templates and system messages.
    """

    columns: dict[str, list[str]]
    kept: list[int]
    dropped: list[tuple[int, str]]
    content: list[str]


@dataclass(frozen=True)
class RowFormat:
    """How the columns of a source become examples.

    Attributes:
        kind: a key of KINDS.
        name: templates, columns, or the detected format.
        said: description for the data report.
        columns: the used columns of the first rows.
        prompt: template for new prompts; None for chats and plain text.
        reads: columns that are passed to `make`, in order; some may be missing in the first rows.
        make: builds the example of one row.
        problem_type: for classification: single-label, multi-label or regression.
        names: names of the classes or tags in order, if they are given.
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
        """The examples of a batch; every row is kept, or dropped with a reason."""
        missing = [None] * len(rows)
        made: list[tuple[str, ...]] = []
        kept: list[int] = []
        dropped: list[tuple[int, str]] = []
        for number, values in enumerate(zip(*(rows.columns.get(name, missing) for name in self.reads), strict=True)):
            try:
                made.append(self.make(values))
            except SkipRow as reason:
                dropped.append((number, str(reason)))
            except InvalidValue as problem:
                raise DataError(f"{rows.place(number)}: {problem}") from problem
            else:
                kept.append(number)
        invalid = _lone_surrogates(made)
        if invalid:
            dropped = sorted([*dropped, *((kept[number], _LONE_SURROGATE) for number in invalid)])
            kept = [row for number, row in enumerate(kept) if number not in invalid]
            made = [texts for number, texts in enumerate(made) if number not in invalid]
        names = KINDS[self.kind]
        *columns, content = [list(column) for column in zip(*made, strict=True)] or [[] for _ in (*names, "content")]
        return Examples(dict(zip(names, columns, strict=True)), kept, dropped, content)


@dataclass(frozen=True)
class Given:
    """What decides, besides the rows, how they are read.

    Attributes:
        rule: the task and, if known, the problem type.
        names: `dataset.labels`.
        of_columns: class names by column, from the metadata of the dataset.
        folder: base folder of relative image paths.
        chats: the tokenizer has a chat template, so instructions and questions become chats.
    """

    rule: LossMask
    names: Names | None
    of_columns: Mapping[str, Names]
    folder: Path | None = None
    chats: bool = False


def choose_text_format(first: Rows, section: SourceSection, given: Given) -> RowFormat:
    """The format that the recipe defines, or the only one that the columns fit.

    Args:
        first: the first rows of the source after joins; their columns and values decide.
        section: the source in the recipe.
        given: whether the tokenizer has a chat template.

    Raises:
        DataError: a column is missing, no format or more than one fits, or the rows are for another task.
    """
    if section.text is not None:
        return _by_templates(first, section, "text", {"text": section.text})
    if section.prompt is not None and section.completion is not None:
        templates = {"prompt": section.prompt, "completion": section.completion}
        return _by_templates(first, section, "prompt_completion", templates)
    rules = ChatRules(section.turns, section.mask_history, given.rule.assistant_only)
    if section.columns is not None:
        chosen = _by_columns(first, section, section.columns, rules)
    else:
        chosen = _detected(first, section, given, rules)
    refuse_ratings_and_media(first, chosen.kind, {*chosen.reads, *(section.where or ())})
    return chosen


def _detected(first: Rows, section: SourceSection, given: Given, rules: ChatRules) -> RowFormat:
    found = detect_format(first, section)
    if found.format in ("messages", "sharegpt"):
        return _chats(first, found.needs[0], None, rules)
    if found.format == "alpaca":
        return _instructions(first, found, given.chats, rules)
    if found.format == "question_answer":
        return _questions(found, given.chats)
    return _plain(first, found.needs, found.name, "", rules)


def _by_templates(first: Rows, section: SourceSection, kind: str, templates: dict[str, str]) -> RowFormat:
    paths = list(dict.fromkeys(path for template in templates.values() for path in template_columns(template)))
    ways = [split_path(path, first.columns) for path in paths]
    found = [way for way in ways if way is not None]
    learned = "text" if kind == "text" else "completion"
    if not template_columns(templates[learned]):
        text = f"dataset.{learned} has no column, so all rows would be equal; write {{column}} where a value goes"
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
        said=f"the recipe's templates with {joined(paths)}",
        columns=columns,
        prompt=templates.get("prompt"),
        reads=reads,
        make=from_templates(list(templates.values()), paths, [steps for _, steps in found]),
    )


def _by_columns(first: Rows, section: SourceSection, named: ColumnsSection, rules: ChatRules) -> RowFormat:
    chosen = named.model_dump(exclude_none=True)
    paths = [named.messages] if named.messages is not None and split_path(named.messages, first.columns) else []
    missing = [name for name in chosen.values() if name not in (*first.columns, *paths)]
    if missing:
        keys = [f"dataset.columns.{key}" for key, name in chosen.items() if name in missing]
        raise missing_columns(first, missing, len(chosen), joined(keys), section)
    if named.messages is not None:
        return _chats(first, named.messages, "columns", rules)
    kind = "text" if named.text is not None else "prompt_completion"
    return _plain(first, [chosen[column] for column in KINDS[kind]], "columns", ", from dataset.columns", rules)


def _plain(first: Rows, names: Sequence[str], name: str, why: str, rules: ChatRules) -> RowFormat:
    """Columns without templates: a text, or a prompt and a completion, which may be lists of messages."""
    values = [first_value(first, column) for column in names]
    if len(names) == 2 and is_chat(values[0]) and (is_chat(values[1]) or is_chat([values[1]])):
        reads = (*names, "tools")
        said = f"chats: the messages of {names[0]}, then those of {names[1]}, which are trained{why}"
        return RowFormat("messages", name, said, _present(first, reads), None, reads, from_chat_pairs(rules))
    kind = "text" if len(names) == 1 else "prompt_completion"
    prompt = "{prompt}" if kind == "prompt_completion" else None
    said = f"{joined(names)}{why}"
    return RowFormat(kind, name, said, tuple(names), prompt, tuple(names), from_columns(names))


def _chats(first: Rows, column: str, name: str | None, rules: ChatRules) -> RowFormat:
    """Chats in a column, or under a key of the objects in a column."""
    root, steps = split_path(column, first.columns) or (column, ())
    given = [value for value in (inner_value(value, steps) for value in first.columns[root]) if value is not None]
    sharegpt = is_sharegpt(given[0] if given else None)
    said = f"chats in {column} ({'from, value' if sharegpt else 'role, content'})"
    if "system" in first.columns:
        said += ", with system as the first message"
    tools = next((tools for tools in ("tools", "functions") if tools in first.columns), None)
    said += f", with the tools in {tools}" if tools is not None else ""
    flags = _flag_columns(first)
    marked = [*flags, *(f"{key} of a message" for key in flag_keys(given))]
    said += f", with the loss flags in {joined(marked)}" if marked else ""
    said += ", with the last answer trained" if rules.mask_history else ""
    name = name or ("sharegpt" if sharegpt else "messages")
    reads = (root, "system", "tools", "functions", *flags)
    make = from_chats(rules, flags, steps)
    return RowFormat("messages", name, said, _present(first, reads), None, reads, make)


def _flag_columns(first: Rows) -> list[str]:
    try:
        return flag_columns(first.columns, {name: first_value(first, name) for name in first.columns})
    except InvalidValue as problem:
        raise DataError(f"{first.file}: {problem}") from problem


@dataclass(frozen=True)
class ColumnFormat:
    """A format that is detected by its columns.

    Attributes:
        name: of the format.
        format: value of `dataset.format` that selects it.
        needs: required columns.
    """

    name: str
    format: str
    needs: tuple[str, ...]


def _instructions(first: Rows, found: ColumnFormat, chats: bool, rules: ChatRules) -> RowFormat:
    instruction, answer = found.needs
    more = "context" if found.name == "dolly" else "input"
    reads = (instruction, more, answer, "system", "history")
    used = _present(first, reads)
    make = from_instructions(reads, chats=chats, rules=rules)
    said = f"{found.name} rows ({', '.join(used)}) "
    if chats:
        both = joined([name for name in (instruction, more) if name in used])
        said += f"as chats: {both} from the user, {answer} from the assistant"
        return RowFormat("messages", found.name, said, used, None, reads, make)
    said += 'with the headings "### Instruction:", "### Input:" (if there is one) and "### Response:"'
    prompt = f"### Instruction:\n{{{instruction}}}\n\n### Response:\n"
    return RowFormat("prompt_completion", found.name, said, used, prompt, reads, make)


def _questions(found: ColumnFormat, chats: bool) -> RowFormat:
    question, answer = found.needs
    make = from_questions(found.needs, chats=chats)
    if chats:
        said = f"{question} and {answer} as chats: {question} from the user, {answer} from the assistant"
        return RowFormat("messages", found.name, said, found.needs, None, found.needs, make)
    prompt = f"Question: {{{question}}}\nAnswer:"
    said = f'{question} and {answer} as "Question: {{{question}}}", and on a new line "Answer: {{{answer}}}"'
    return RowFormat("prompt_completion", found.name, said, found.needs, prompt, found.needs, make)


def _present(first: Rows, reads: Sequence[str]) -> tuple[str, ...]:
    return tuple(column for column in reads if column in first.columns)


def _lone_surrogates(made: list[tuple[str, ...]]) -> set[int]:
    """Examples with a lone surrogate, which JSON can represent but UTF-8 cannot."""

    def is_valid(texts: Iterable[str]) -> bool:
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            return False
        return True

    if is_valid(map("".join, made)):
        return set()
    return {number for number, texts in enumerate(made) if not is_valid(texts)}


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
    """The format that the recipe names, or the only one that the columns fit.

    Raises:
        DataError: no format or more than one fits.
    """
    if section.format is not None:
        return _named(first, section.format)
    fits = [one for one in COLUMN_FORMATS if set(one.needs) <= set(first.columns)]
    refuse_other_tasks(first)
    if len(fits) > 1:
        raise DataError(_several(first, fits))
    if not fits:
        raise DataError(_unknown(first, section))
    context = [name for name in _QUESTION_CONTEXT if name in first.columns]
    if fits[0].name == "question_answer" and context:
        raise DataError(_unused_context(first, fits[0], context[0]))
    return fits[0]


def missing_columns(first: Rows, missing: Sequence[str], wanted: int, key: str, section: SourceSection) -> DataError:
    """The error for columns in the recipe that the rows do not have.

    Args:
        first: the first rows.
        missing: names of the missing columns.
        wanted: total number of columns in the recipe.
        key: the recipe key with these columns.
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
        else f"set {key} to one of these"
    )
    hint = (_header_hint(first, section) if len(missing) == wanted and not near else "") or _edge_hint(first)
    return DataError(f"{first.file}: no column {listed(missing)}; it has {listed(first.columns)}; {fix}{hint}")


def joined(names: Sequence[str]) -> str:
    """Join names for a sentence: a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""


def _named(first: Rows, format_: str) -> ColumnFormat:
    # Both chat formats are read in the same way, so either name works for both.
    names = {"messages": ("messages", "sharegpt"), "sharegpt": ("sharegpt", "messages")}.get(format_)
    if names is not None:
        formats = [one for name in names for one in COLUMN_FORMATS if one.name == name]
        fits = [one for one in formats if one.needs[0] in first.columns][:1]
    else:
        formats = [one for one in COLUMN_FORMATS if one.format == format_]
        fits = [one for one in formats if set(one.needs) <= set(first.columns)]
    if not fits:
        needs = choice_text([" with ".join(one.needs) for one in formats])
        raise DataError(
            f"{first.file}: dataset.format: {format_} needs the columns {needs}; it has {listed(first.columns)}; "
            "use templates (dataset.prompt and dataset.completion) or dataset.columns"
        )
    if len(fits) > 1:
        raise DataError(_several(first, fits))
    return fits[0]


def _several(first: Rows, fits: Sequence[ColumnFormat]) -> str:
    shown = joined([f"{one.format} ({', '.join(one.needs)})" for one in fits])
    formats = list(dict.fromkeys(one.format for one in fits))
    if len(formats) == len(fits):
        fix = f"set dataset.format: {choice_text(formats)}"
    else:
        fix = f"choose the columns with templates, such as {template_pair(*fits[0].needs)}"
    return f"{first.file}: its columns ({listed(first.columns)}) fit {len(fits)} formats: {shown}; {fix}"


def _unused_context(first: Rows, found: ColumnFormat, context: str) -> str:
    question, answer = found.needs
    return (
        f"{first.file}: the column {context} may belong in the prompt together with {question}; use templates, such as "
        f'prompt: "{{{context}}}\\n\\n{{{question}}}\\n", completion: "{{{answer}}}", or ignore it with '
        "dataset.format: question_answer"
    )


def _unknown(first: Rows, section: SourceSection) -> str:
    usable = list(filter(_fits_a_template, first.columns))
    names = [name for name in usable if not _NO_EXAMPLE.search(name)] or usable
    chats = ((name, first_value(first, name)) for name in first.columns)
    chat = next((path for name, value in chats if (path := _chat_path(name, value)) is not None), None)
    paths = {name: name + text_path(first_value(first, name)) for name in names}
    texts = [name for name in names if paths[name] != name or _is_scalar(first_value(first, name))] or names
    learned = next((name for name in texts if _LEARNED.search(name)), "".join(texts[-1:]))
    others = [name for name in texts if name != learned]
    prompt = next((name for name in others if _ASKED.search(name)), others[0] if others else None)
    if chat is not None:
        example = f"{{columns: {{messages: {chat}}}}}"
    elif prompt is not None:
        rated = rating(first)
        only = f", where: {{{rated[0]}: {rated[1]}}}" if rated is not None else ""
        example = f'{{prompt: "{{{paths[prompt]}}} ->", completion: " {{{paths[learned]}}}"{only}}}'
    else:
        example = f'{{text: "{{{paths.get(learned, learned)}}}"}}'
    hint = _header_hint(first, section) if any(map(_is_like_a_cell, first.columns)) else _edge_hint(first)
    if hint:
        return f"{first.file}: its columns ({listed(first.columns)}) do not match a known format{hint}"
    if not names:
        return (
            f"{first.file}: its columns ({listed(first.columns)}) do not match a known format; give them names without "
            "brackets, colons, exclamation marks and control characters"
        )
    return (
        f"{first.file}: its columns ({listed(first.columns)}) do not match a known format; known are text, prompt with "
        "completion, messages, conversations, instruction with output or response, and question with answer;\n  set "
        "dataset.prompt and dataset.completion (or dataset.text) to templates with these columns, or set "
        f"dataset.columns, for example\n  dataset: {example}"
    )


def _chat_path(name: str, value: Any) -> str | None:
    """The path of the chat in a column: the column, or a key of its objects; None if there is none."""
    if _holds_chat(value):
        return name
    keys = [key for key, item in value.items() if _holds_chat(item)] if isinstance(value, dict) else []
    return f"{name}.{keys[0]}" if keys else None


def _holds_chat(value: Any) -> bool:
    """Whether a value is a list of messages, or a string with one."""
    try:
        return is_chat(list(parsed_list(value, "")))
    except SkipRow:
        return False


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _fits_a_template(name: str) -> bool:
    return name.isprintable() and bool(name.strip()) and not set(name) & set("{}[]:!")


def _is_like_a_cell(name: str) -> bool:
    """Whether a column name looks like a number or a sentence from the first row."""
    return len(name) > LONG_NAME or name.replace(".", "", 1).isdecimal() or _SENTENCE.search(name) is not None


def _edge_hint(first: Rows) -> str:
    return "" if all(name == name.strip() for name in first.columns) else "; remove white space around the names"


def _header_hint(first: Rows, section: SourceSection) -> str:
    """A hint if the first row of a CSV file was probably read as its header."""
    is_csv = section.file_format in ("csv", "tsv") or re.search(r"\.[ct]sv(\.|$)", first.file.lower()) is not None
    if not is_csv or section.csv.column_names is not None:
        return ""
    return "; if the first line is not a header, name the columns in dataset.csv.column_names"
