"""Row formats with labels: texts with classes, or words with tags."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftcli.data.chat_formats import is_chat
from peftcli.data.class_labels import MOSTLY, LabelColumn, Names, numbered, read_labels, tag_names
from peftcli.data.examples import Maker, from_templates
from peftcli.data.formats import Given, RowFormat, joined, missing_columns
from peftcli.data.other_tasks import text_path
from peftcli.data.rows import Rows, first_value, listed
from peftcli.data.values import SkipRow, is_null, parsed_list, template_text, whole_text
from peftcli.errors import DataError
from peftcli.recipe.schema import SourceSection
from peftcli.recipe.template import split_path, template_columns

TEXTS = ("text", "sentence", "content", "review", "question", "comment", "message", "tweet", "document", "article")
PAIRS = (
    ("text", "text_pair"),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
)
LABELS = ["label", "labels", "target", "class", "category", "sentiment", "intent", "emotion", "topic"]
WORDS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "labels")
_TAG = re.compile(r"O|[BIESLU]-\S+")
EMPTY_TEXT = "with an empty text"
LABEL_WORDS = {"single-label": "class", "multi-label": "classes", "regression": "number"}


def check_named(first: Rows, section: SourceSection) -> None:
    """Reject columns of the recipe that the rows do not have."""
    chosen = section.columns.model_dump(exclude_none=True) if section.columns is not None else {}
    missing = [name for name in chosen.values() if name not in first.columns]
    if missing:
        keys = joined([f"dataset.columns.{key}" for key, name in chosen.items() if name in missing])
        raise missing_columns(first, missing, len(chosen), keys, section)


def choose_tagging(first: Rows, section: SourceSection, given: Given) -> RowFormat:
    """The format of words with tags: the columns that the recipe names, or the only ones that fit.

    Args:
        first: the first rows of the source after joins.
        section: the source in the recipe.
        given: what else is known about the labels.

    Raises:
        DataError: a column is missing, or no columns or more than one fit.
    """
    check_named(first, section)
    named = section.columns
    if list(first.columns) == ["text"] and _is_conll(first):
        raise DataError(
            f"{first.file}: is read as plain text, but its lines have a word and a tag; set dataset.file_format: conll"
        )
    words = (named.tokens if named else None) or only_column(first, WORDS, "tokens", "the words", ())
    tags = (named.tags if named else None) or only_column(first, TAGS, "tags", "their tags", ())
    names = given.names or given.of_columns.get(tags)
    said = f"the words in {words} with the tags in {tags}{_source_of(named)}"
    reads = (words, tags)
    return RowFormat("tagging", "tags", said, reads, None, reads, _from_words(words, tags, names), names=names)


def _is_conll(first: Rows) -> bool:
    """Whether the lines of a text end with a tag such as O or B-PER after a word."""
    lines = [line.split() for line in str(first_value(first, "text") or "").splitlines()[:200] if line.strip()]
    tagged = sum(len(fields) > 1 and _TAG.fullmatch(fields[-1]) is not None for fields in lines)
    return len(lines) > 1 and tagged >= MOSTLY * len(lines)


def choose_classification(first: Rows, section: SourceSection, given: Given) -> RowFormat:
    """The format of texts with a label; arguments and errors as for `choose_tagging`."""
    check_named(first, section)
    named = section.columns
    texts = choose_texts(first, section)
    column, names = choose_label(first, section, given, texts.reads)
    label = column.name
    return RowFormat(
        kind="classification",
        name="labels",
        said=f"{texts.said} with the {LABEL_WORDS[column.problem_type]} in {label}{_source_of(named)}",
        columns=tuple(dict.fromkeys([*texts.reads, label])),
        prompt=section.text,
        reads=(*texts.reads, label),
        make=_from_texts(texts, column),
        problem_type=column.problem_type,
        names=None if column.problem_type == "regression" else names,
    )


def choose_label(
    first: Rows, section: SourceSection, given: Given, taken: Sequence[str], problem_type: str | None = None
) -> tuple[LabelColumn, Names | None]:
    """The label column, and the class names if they are given.

    Args:
        taken: columns that have another use.
        problem_type: overrides that of the recipe.

    Raises:
        DataError: no column or more than one could be the label, or the labels are ambiguous.
    """
    named = section.columns
    label = (named.label if named else None) or only_column(first, LABELS, "label", "the label", taken)
    if label in taken:
        raise DataError(f"{first.file}: the column {label} is the label and also part of the text; remove it there")
    names = given.names or given.of_columns.get(label)
    of_hub = given.names is None and names is not None
    problem_type = problem_type or given.rule.problem_type
    column = read_labels(first.columns[label], label, problem_type, names, first.file, unlabelled=of_hub)
    if names is None and column.width is not None:
        names = numbered(column.width)  # each position is a class, also one that no row has
    return column, names


@dataclass(frozen=True)
class Texts:
    """How the text of a row, or its text pair, is built.

    Attributes:
        reads: columns that are read.
        said: description of the columns.
        fill: fills the template from all values except that of `pair`; None if a column is the text.
        pair: the last column is the second text of a pair.
    """

    reads: tuple[str, ...]
    said: str
    fill: Maker | None
    pair: bool

    def of(self, values: tuple[Any, ...]) -> list[str]:
        """The texts of a row, one or two."""
        if self.fill is None:
            texts = [whole_text(value, name) for value, name in zip(values, self.reads, strict=True)]
        else:
            count = len(self.reads) - self.pair
            more = zip(values[count:], self.reads[count:], strict=True)
            texts = [self.fill(values[:count])[0], *(whole_text(value, name) for value, name in more)]
        if not all(text.strip() for text in texts):
            raise SkipRow(EMPTY_TEXT)
        return texts


def choose_texts(first: Rows, section: SourceSection) -> Texts:
    """The columns of the text, or of a pair of texts: those that the recipe names, or the only ones that fit.

    Raises:
        DataError: a column is missing, or no columns or more than one fit.
    """
    named = section.columns
    pair = named.text_pair if named is not None else None
    second = () if pair is None else (pair,)
    if section.text is not None:
        paths = template_columns(section.text)
        targets = [split_path(path, first.columns) for path in paths]
        missing = [path for path, target in zip(paths, targets, strict=True) if target is None]
        if missing:
            raise missing_columns(first, missing, len(paths), "dataset.text", section)
        found = [target for target in targets if target is not None]
        fill = from_templates([section.text], paths, [steps for _, steps in found])
        said = f"the recipe's template with {joined([*paths, *second])}"
        return Texts((*(column for column, _ in found), *second), said, fill, pair is not None)
    own = named.text if named is not None else None
    if own is None and pair is None and (both := _pair(first)) is not None:
        return Texts(both, joined(both), None, True)
    if own is None:
        _refuse_chats(first)
    reads = (own or only_column(first, TEXTS, "text", "the text", second), *second)
    return Texts(reads, joined(reads), None, pair is not None)


def _refuse_chats(first: Rows) -> None:
    """Raise an error with a template if the texts are in messages."""
    chat = next((name for name in first.columns if is_chat(first_value(first, name))), None)
    if chat is not None and not any(name.strip().lower() in TEXTS for name in first.columns):
        path = f"{chat}{text_path(first_value(first, chat))}"
        raise DataError(
            f"{first.file}: no column has a usual name for the text; for the first message in {chat}, set "
            f'dataset.text: "{{{path}}}"'
        )


def _pair(first: Rows) -> tuple[str, str] | None:
    """The columns of a text pair, if they have usual names."""
    fits = [pair for pair in PAIRS if set(pair) <= set(first.columns)]
    if len(fits) > 1:
        raise DataError(
            f"{first.file}: the text pair could be in {joined([' and '.join(pair) for pair in fits])}; "
            "set dataset.columns.text and dataset.columns.text_pair"
        )
    return fits[0] if fits else None


def only_column(first: Rows, usual: Sequence[str], key: str, what: str, taken: Sequence[str]) -> str:
    """The only column with a usual name, ignoring case.

    Raises:
        DataError: there is none, or more than one.
    """
    found = [name for name in first.columns if name.strip().lower() in usual and name not in taken]
    if len(found) == 1:
        return found[0]
    problem = f"{what} could be in {joined(found)}" if found else f"no column has a usual name for {what}"
    it_has = "" if found else f"; it has {listed(first.columns)}"
    raise DataError(f"{first.file}: {problem}{it_has}; set dataset.columns.{key}")


def _source_of(named: Any) -> str:
    return ", from dataset.columns" if named is not None else ""


def _from_texts(texts: Texts, column: LabelColumn) -> Maker:
    """A maker of: text, second text or an empty string, label, and the texts."""

    def make(values: tuple[Any, ...]) -> tuple[str, ...]:
        made = texts.of(values[:-1])
        label = column.text(values[-1])
        return made[0], made[1] if texts.pair else "", label, "\n".join(made)

    return make


def _from_words(words_name: str, tags_name: str, names: Names | None) -> Maker:
    """A maker of: words and tags, both as JSON lists, and the words as text."""
    read_tag = tag_names(names, tags_name)

    def make(values: tuple[Any, ...]) -> tuple[str, ...]:
        words = [word_text(word, words_name) for word in word_items(values[0], words_name)]
        tags = [read_tag(tag) for tag in word_items(values[1], tags_name)]
        if not words:
            raise SkipRow(f"without words in {words_name}")
        if len(words) != len(tags):
            raise SkipRow(f"with different numbers of {tags_name} and {words_name}")
        return json.dumps(words, ensure_ascii=False), json.dumps(tags, ensure_ascii=False), " ".join(words)

    return make


def word_items(value: Any, name: str) -> Sequence[Any]:
    """A list, a list in a JSON string, or the words of a plain string."""
    if isinstance(value, str) and not value.lstrip().startswith("["):
        return value.split()
    if is_null(value):
        raise SkipRow(f"with {name} null")
    return parsed_list(value, f"with {name} not a list")


def word_text(value: Any, name: str) -> str:
    if is_null(value):
        raise SkipRow(f"with a null word in {name}")
    return template_text(value, name)
