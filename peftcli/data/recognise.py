"""What columns mean by their names; where that is not certain, the recipe must say it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftcli.data.chats import is_turns
from peftcli.data.names import LONG_NAME, listed, shown
from peftcli.data.rows import Rows
from peftcli.errors import DataError
from peftcli.nearest import nearest
from peftcli.recipe.problems import choice_text
from peftcli.recipe.schema import SourceSection


@dataclass(frozen=True)
class Dialect:
    """Columns that together mean something.

    Attributes:
        name: of the reading.
        format: value of `dataset.format` that chooses it.
        needs: columns that it cannot do without.
    """

    name: str
    format: str
    needs: tuple[str, ...]


DIALECTS = (
    Dialect("text", "text", ("text",)),
    Dialect("prompt_completion", "prompt_completion", ("prompt", "completion")),
    Dialect("messages", "messages", ("messages",)),
    Dialect("sharegpt", "sharegpt", ("conversations",)),
    Dialect("alpaca", "alpaca", ("instruction", "output")),
    Dialect("dolly", "alpaca", ("instruction", "response")),
    Dialect("question_answer", "question_answer", ("question", "answer")),
    Dialect("question_answer", "question_answer", ("query", "response")),
    Dialect("question_answer", "question_answer", ("question", "response")),
)
_TAGS = ("tags", "ner_tags", "pos_tags", "labels")
_LABELLED = ("text", "sentence")
_BESIDE_A_QUESTION = ("context", "passage", "choices", "options", "system", "system_prompt")
_LEARNED = re.compile(r"answer|response|output|completion|reply|target|label|summary|translation", re.IGNORECASE)
_SENTENCE = re.compile(r"\S\s+\S+\s+\S+\s+\S|\S\s.*[.?!]\s*$", re.DOTALL)
_NO_EXAMPLE = re.compile(r"(^|_)(id|index|idx)$|^\s*$|[{}\[\]:!]", re.IGNORECASE)
"""Columns that an example in a message leaves out: numbers of rows, and names that a template cannot hold."""


def recognise(first: Rows, section: SourceSection) -> Dialect:
    """The dialect that the recipe names, or the only one that the columns fit.

    Raises:
        DataError: none fits, or more than one.
    """
    if section.format is not None:
        return _named(first, section.format)
    fits = [dialect for dialect in DIALECTS if set(dialect.needs) <= set(first.columns)]
    _refuse_other_trades(first)
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
    mend = (
        f"did you mean {choice_text([shown(name) for name in dict.fromkeys(near)])}?"
        if near
        else f"name one of these in {key}"
    )
    hint = (_header_hint(first, section) if len(missing) == wanted else "") or _edge_hint(first)
    return DataError(f"{first.file}: no column {listed(missing)}; it has {listed(first.columns)}; {mend}{hint}")


def first_value(first: Rows, name: str) -> Any:
    """The first value of a column that is not null."""
    return next((value for value in first.columns.get(name, ()) if value is not None), None)


def joined(names: Sequence[str]) -> str:
    """Names for a sentence: a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""


def _named(first: Rows, format_: str) -> Dialect:
    # A list of turns is read the same way under either name, so each may stand for the other.
    ways = {"messages": ("messages", "sharegpt"), "sharegpt": ("sharegpt", "messages")}.get(format_)
    if ways is not None:
        chats = [dialect for way in ways for dialect in DIALECTS if dialect.name == way]
        fits = [dialect for dialect in chats if dialect.needs[0] in first.columns][:1]
    else:
        chats = [dialect for dialect in DIALECTS if dialect.format == format_]
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


def _several(first: Rows, fits: Sequence[Dialect]) -> str:
    shown = joined([f"{dialect.format} ({', '.join(dialect.needs)})" for dialect in fits])
    formats = list(dict.fromkeys(dialect.format for dialect in fits))
    if len(formats) == len(fits):
        mend = f"set dataset.format: {choice_text(formats)}"
    else:
        mend = f"say which columns with templates, such as {_pair(*fits[0].needs)}"
    return f"{first.file}: its columns ({listed(first.columns)}) can be read in {len(fits)} ways: {shown}; {mend}"


def _beside_a_question(first: Rows, dialect: Dialect, beside: str) -> str:
    question, answer = dialect.needs
    return (
        f"{first.file}: the column {beside} beside {question} and {answer} may belong into the prompt; say it with "
        f'templates, such as prompt: "{{{beside}}}\\n\\n{{{question}}}\\n", completion: "{{{answer}}}", or leave it '
        "out with dataset.format: question_answer"
    )


def _unknown(first: Rows, section: SourceSection) -> str:
    names = [name for name in first.columns if not _NO_EXAMPLE.search(name)] or ["column"]
    chat = next((name for name in first.columns if is_turns(first_value(first, name))), None)
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


def _refuse_other_trades(first: Rows) -> None:
    """Raise for data made for another kind of training, with what they can teach here."""
    names = set(first.columns)
    tags = next((name for name in _TAGS if name in names), None)
    labelled = next((name for name in _LABELLED if name in names), None)
    if {"chosen", "rejected"} <= names:
        what = "a chosen and a rejected answer in each row (preference data)"
        mend = f"to learn the chosen ones, set {_chosen(first)}"
    elif {"prompt", "completion", "label"} <= names and _is_true_or_false(first_value(first, "label")):
        what = "completions labelled as good or bad (KTO data)"
        mend = (
            "every completion would be learned as good; keep the rows whose label is true, and set "
            "dataset.format: prompt_completion"
        )
    elif "tokens" in names and tags is not None:
        what = f"a tag for each word ({tags}; token classification)"
        mend = f"set model.task: token-classification, or, to learn the tags as text, {_pair('tokens', tags)}"
        if isinstance(first_value(first, tags), list) and not all(isinstance(v, str) for v in first_value(first, tags)):
            mend += f", with the tags' names in {tags} in place of numbers"
    elif labelled is not None and "label" in names and not {"prompt", "completion"} <= names:
        what = f"a label for each {labelled} (classification)"
        mend = f"set model.task: sequence-classification, or, to learn the label as text, {_pair(labelled, 'label')}"
        mend += "; to learn the text alone, dataset.format: text" if labelled == "text" else ""
    else:
        return
    raise DataError(f"{first.file}: its columns ({listed(first.columns)}) hold {what}; {mend}")


def _chosen(first: Rows) -> str:
    prompted = "prompt" in first.columns
    if is_turns(first_value(first, "chosen")):
        both = prompted and is_turns(first_value(first, "prompt"))
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
