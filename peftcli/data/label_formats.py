"""Row formats with labels: a text and its class, or words and their tags."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftcli.data.class_labels import LabelColumn, Names, read_labels, tag_names
from peftcli.data.examples import Maker, from_templates
from peftcli.data.formats import Given, RowFormat, joined, missing_columns
from peftcli.data.rows import Rows, listed
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
EMPTY_TEXT = "with an empty text"
LABEL_WORDS = {"single-label": "class", "multi-label": "classes", "regression": "number"}


def check_named(first: Rows, section: SourceSection) -> None:
    """Refuse columns of the recipe that the rows lack."""
    chosen = section.columns.model_dump(exclude_none=True) if section.columns is not None else {}
    missing = [name for name in chosen.values() if name not in first.columns]
    if missing:
        keys = joined([f"dataset.columns.{key}" for key, name in chosen.items() if name in missing])
        raise missing_columns(first, missing, len(chosen), keys, section)


def choose_tagging(first: Rows, section: SourceSection, given: Given) -> RowFormat:
    """How rows of words with tags are read: the columns that the recipe names, or the only ones that fit.

    Args:
        first: the first rows of the source, joins included.
        section: the source in the recipe.
        given: what else is known of the labels.

    Raises:
        DataError: a column is missing, or none or several fit.
    """
    check_named(first, section)
    named = section.columns
    words = (named.tokens if named else None) or only_column(first, WORDS, "tokens", "the words", ())
    tags = (named.tags if named else None) or only_column(first, TAGS, "tags", "their tags", ())
    names = given.names or given.of_columns.get(tags)
    said = f"the words of {words} with the tags of {tags}{_as_said(named)}"
    reads = (words, tags)
    return RowFormat("tagging", "tags", said, reads, None, reads, _from_words(words, tags, names), names=names)


def choose_classification(first: Rows, section: SourceSection, given: Given) -> RowFormat:
    """How rows of texts with a label are read; arguments and errors as for `choose_tagging`."""
    check_named(first, section)
    named = section.columns
    texts = _texts(first, section)
    column, names = choose_label(first, section, given, texts.reads)
    label = column.name
    return RowFormat(
        kind="classification",
        name="labels",
        said=f"{texts.said} with the {LABEL_WORDS[column.problem_type]} in {label}{_as_said(named)}",
        columns=tuple(dict.fromkeys([*texts.reads, label])),
        prompt=section.text,
        reads=(*texts.reads, label),
        make=_from_texts(texts, column),
        problem_type=column.problem_type,
        names=None if column.problem_type == "regression" else names,
    )


def choose_label(
    first: Rows, section: SourceSection, given: Given, taken: Sequence[str], asked: str | None = None
) -> tuple[LabelColumn, Names | None]:
    """The column of the labels, and the names of the classes where they are given.

    Args:
        taken: columns that are used for something else.
        asked: the problem type, in place of that of the recipe.

    Raises:
        DataError: no column, or more than one, may hold the labels, or they can be read in two ways.
    """
    named = section.columns
    label = (named.label if named else None) or only_column(first, LABELS, "label", "the label", taken)
    if label in taken:
        raise DataError(f"{first.file}: the column {label} is the label and stands in the text too; leave it out there")
    names = given.names or given.of_columns.get(label)
    of_hub = given.names is None and names is not None
    problem_type = asked or given.rule.problem_type
    return read_labels(first.columns[label], label, problem_type, names, first.file, unlabelled=of_hub), names


@dataclass(frozen=True)
class _Texts:
    """Where the text of a row stands, or its two texts.

    Attributes:
        reads: columns whose values are taken.
        said: the columns for a sentence.
        fill: makes the text that a template says, from all values but that of `pair`; None where a column is the text.
        pair: the last column is a second text.
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


def _texts(first: Rows, section: SourceSection) -> _Texts:
    named = section.columns
    pair = named.text_pair if named is not None else None
    beside = () if pair is None else (pair,)
    if section.text is not None:
        paths = template_columns(section.text)
        ways = [split_path(path, first.columns) for path in paths]
        missing = [path for path, way in zip(paths, ways, strict=True) if way is None]
        if missing:
            raise missing_columns(first, missing, len(paths), "dataset.text", section)
        found = [way for way in ways if way is not None]
        fill = from_templates([section.text], paths, [steps for _, steps in found])
        said = f"the template of the recipe over {joined([*paths, *beside])}"
        return _Texts((*(column for column, _ in found), *beside), said, fill, pair is not None)
    own = named.text if named is not None else None
    if own is None and pair is None and (both := _pair(first)) is not None:
        return _Texts(both, joined(both), None, True)
    reads = (own or only_column(first, TEXTS, "text", "the text", beside), *beside)
    return _Texts(reads, joined(reads), None, pair is not None)


def _pair(first: Rows) -> tuple[str, str] | None:
    """The two texts of a row, where its columns have the names of one kind of pairs."""
    fits = [pair for pair in PAIRS if set(pair) <= set(first.columns)]
    if len(fits) > 1:
        raise DataError(
            f"{first.file}: the two texts of a row may stand in {joined([' and '.join(pair) for pair in fits])}; "
            "name them in dataset.columns.text and dataset.columns.text_pair"
        )
    return fits[0] if fits else None


def only_column(first: Rows, usual: Sequence[str], key: str, what: str, taken: Sequence[str]) -> str:
    """The only column with a usual name, whatever its case.

    Raises:
        DataError: there is none, or more than one.
    """
    found = [name for name in first.columns if name.strip().lower() in usual and name not in taken]
    if len(found) == 1:
        return found[0]
    problem = f"{what} may stand in {joined(found)}" if found else f"no column is known to hold {what}"
    it_has = "" if found else f"; it has {listed(first.columns)}"
    raise DataError(f"{first.file}: {problem}{it_has}; name it in dataset.columns.{key}")


def _as_said(named: Any) -> str:
    return ", as dataset.columns says" if named is not None else ""


def _from_texts(texts: _Texts, column: LabelColumn) -> Maker:
    """A maker of: text, second text or nothing, label, and the texts as the user's own words."""

    def make(values: tuple[Any, ...]) -> tuple[str, ...]:
        made = texts.of(values[:-1])
        label = column.text(values[-1])
        return made[0], made[1] if texts.pair else "", label, "\n".join(made)

    return make


def _from_words(words_name: str, tags_name: str, names: Names | None) -> Maker:
    """A maker of: words and tags, both as JSON lists, and the words as the user's own."""
    read_tag = tag_names(names, tags_name)

    def make(values: tuple[Any, ...]) -> tuple[str, ...]:
        words = [_word(word, words_name) for word in _items(values[0], words_name)]
        tags = [read_tag(tag) for tag in _items(values[1], tags_name)]
        if not words:
            raise SkipRow(f"with no word in {words_name}")
        if len(words) != len(tags):
            raise SkipRow(f"with another number of {tags_name} than of {words_name}")
        return json.dumps(words, ensure_ascii=False), json.dumps(tags, ensure_ascii=False), " ".join(words)

    return make


def _items(value: Any, name: str) -> Sequence[Any]:
    """A list, the list that a JSON text holds, or the words of a plain text."""
    if isinstance(value, str) and not value.lstrip().startswith("["):
        return value.split()
    if is_null(value):
        raise SkipRow(f"with {name} null")
    return parsed_list(value, f"with {name} not a list")


def _word(value: Any, name: str) -> str:
    if is_null(value):
        raise SkipRow(f"with a word of {name} null")
    return template_text(value, name)
