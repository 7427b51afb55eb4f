"""Reads a label column: one class, several, or a number; and the names of the classes."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peftcli.data.rows import listed
from peftcli.data.values import InvalidValue, SkipRow, is_null, type_name
from peftcli.errors import DataError
from peftcli.metrics.tagging import OUTSIDE

SMALL_RANGE = 20
"""Whole numbers that span no more than this are taken for classes; of others the recipe must say what they are."""
LARGEST = 3.4e38
"""Of float32, in which numbers are learned."""
MOSTLY = 0.9
"""Labels of which so many are numbers, some with decimals, are amounts; the others are left out."""
SEPARATORS = ("|", ";", ",")
_WHOLE = re.compile(r"[+-]?\d+")

Names = tuple[str, ...]


@dataclass(frozen=True)
class LabelColumn:
    """How the labels of a source are read.

    Attributes:
        name: of the column.
        problem_type: single-label, multi-label or regression.
        names: of the classes by number, where the recipe or the data set gives them.
        separator: between the classes of a text such as `toxic|insult`.
        switches: each list holds a 0 or a 1 for each class, in place of the classes.
        unlabelled: -1 stands for no label, as in data sets of the Hub.
    """

    name: str
    problem_type: str
    names: Names | None = None
    separator: str | None = None
    switches: bool = False
    unlabelled: bool = False

    def text(self, value: Any) -> str:
        """The label of a row as it is stored: a class, a JSON list of classes, or a number.

        Raises:
            Unused: the row has no label.
            Wrong: a class is none of the names.
        """
        if self.problem_type == "regression":
            return _number_text(value, self.name)
        if self.problem_type == "multi-label":
            return json.dumps(self._several(value), ensure_ascii=False)
        return self.one(value)

    def one(self, value: Any) -> str:
        """The name of one class."""
        if isinstance(value, list | tuple | dict):
            raise SkipRow(f"with {self.name} not one class (a {type_name(type(value))})")
        plain = class_text(value, self.name)
        if self.unlabelled and plain == "-1":
            raise SkipRow(f"with no {self.name} (-1)")
        return plain if self.names is None else _named(plain, self.names, self.name)

    def _several(self, value: Any) -> list[str]:
        if isinstance(value, str):
            value = _parsed(value, self.separator)
        if is_null(value):
            raise SkipRow(f"with {self.name} null")
        if not isinstance(value, list | tuple):
            value = [value]
        if self.switches:
            return self._switched_on(value)
        return list(dict.fromkeys(self.one(one) for one in value))

    def _switched_on(self, value: Sequence[Any]) -> list[str]:
        wanted = None if self.names is None else len(self.names)
        if (wanted is not None and len(value) != wanted) or any(
            class_text(one, self.name) not in "01" for one in value
        ):
            raise SkipRow(f"with {self.name} not a 0 or a 1 for each class")
        names = self.names or tuple(str(number) for number in range(len(value)))
        return [name for name, one in zip(names, value, strict=True) if class_text(one, self.name) == "1"]


def class_text(value: Any, name: str) -> str:
    """The name of a class that a value writes: text as it is, outer space aside, and whole numbers without decimals.

    >>> class_text(" spam ", "label"), class_text(2.0, "label"), class_text(True, "label")
    ('spam', '2', 'true')

    Raises:
        Unused: nothing stands there.
    """
    if is_null(value):
        raise SkipRow(f"with {name} null")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value).strip()
    if not text:
        raise SkipRow(f"with {name} empty")
    return text


def read_labels(
    values: Sequence[Any], name: str, asked: str, names: Names | None, where: str, *, unlabelled: bool = False
) -> LabelColumn:
    """How a column of labels is read, from its first values.

    Args:
        values: of the first rows.
        name: of the column.
        asked: `model.problem_type`; `auto` decides.
        names: of the classes, where they are given.
        where: file, for messages.
        unlabelled: -1 stands for no label.

    Raises:
        DataError: the values can be read in two ways.
    """
    present = [value for value in values if not is_null(value) and value != ""]
    problem_type = _problem(present, name, names, where) if asked == "auto" else asked
    if problem_type != "multi-label":
        return LabelColumn(name, problem_type, names, unlabelled=unlabelled and problem_type == "single-label")
    texts = [value for value in present if isinstance(value, str) and not value.lstrip().startswith("[")]
    separator = _separator(texts, name, names, where)
    lists = [_parsed(value, separator) if isinstance(value, str) else value for value in present]
    return LabelColumn(name, problem_type, names, separator, _are_switches(lists))


def label_said(label: str, problem_type: str) -> str:
    """A stored label as people read it.

    >>> label_said("spam", "single-label"), label_said('["toxic", "insult"]', "multi-label")
    ('spam', 'toxic, insult')
    """
    return ", ".join(json.loads(label)) if problem_type == "multi-label" else label


def sorted_names(names: Sequence[str]) -> Names:
    """Names of classes in their order: whole numbers by size, then text by letters; O before all other tags.

    >>> sorted_names(["10", "9"]), sorted_names(["spam", "ham"]), sorted_names(["I-PER", "O", "B-PER"])
    (('9', '10'), ('ham', 'spam'), ('O', 'B-PER', 'I-PER'))
    """

    def key(name: str) -> tuple[bool, bool, int, str]:
        whole = _WHOLE.fullmatch(name) is not None
        return name != OUTSIDE, not whole, int(name) if whole else 0, name

    return tuple(sorted(set(names), key=key))


def _problem(present: Sequence[Any], name: str, names: Names | None, where: str) -> str:
    if any(isinstance(value, list | tuple) for value in present):
        return "multi-label"
    if any(isinstance(value, str) and value.lstrip().startswith("[") and _is_list(value) for value in present):
        return "multi-label"
    numbers = [_as_number(value) for value in present]
    known = [number for number in numbers if number is not None]
    if names is not None or not known or len(known) < MOSTLY * len(numbers):
        return "single-label"
    if any(not number.is_integer() for number in known):
        return "regression"
    if len(known) < len(numbers):
        return "single-label"
    low, high = min(known), max(known)
    if high - low < SMALL_RANGE:
        return "single-label"
    raise DataError(
        f"{where}: {name} holds whole numbers from {low:.0f} to {high:.0f}, which may be classes or amounts; "
        "set model.problem_type: single-label or model.problem_type: regression"
    )


def _separator(texts: Sequence[str], name: str, names: Names | None, where: str) -> str | None:
    """The sign between the classes of texts that are no JSON lists; None where there are no such texts."""
    if not texts:
        return None
    found = [sign for sign in SEPARATORS if any(sign in text for text in texts)]
    if len(found) > 1 and names is not None:
        fits = [sign for sign in found if all(part.strip() in names for text in texts for part in text.split(sign))]
        found = fits or found
    if len(found) > 1:
        signs = " and ".join(found)
        raise DataError(
            f"{where}: {name} holds {signs}, which may both part classes; name the classes in dataset.labels"
        )
    return found[0] if found else SEPARATORS[0]


def _are_switches(lists: Sequence[Any]) -> bool:
    """Whether lists hold a 0 or a 1 for each class: all of one length, and some with the same number twice."""
    given = [value for value in lists if isinstance(value, list | tuple)]
    if len({len(value) for value in given}) != 1 or any(not isinstance(one, int) for value in given for one in value):
        return False
    return all(one in (0, 1) for value in given for one in value) and any(len(set(v)) < len(v) for v in given)


def _parsed(text: str, separator: str | None) -> Any:
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):  # RecursionError: brackets within brackets, thousands deep
            return text
    return [part for part in text.split(separator or SEPARATORS[0]) if part.strip()]


def _is_list(text: str) -> bool:
    return isinstance(_parsed(text, None), list)


def _as_number(value: Any) -> float | None:
    """The number that a value is or writes; None for true, false and other text."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if abs(number) <= LARGEST else None  # no number is neither


def _number_text(value: Any, name: str) -> str:
    if is_null(value) or value == "":
        raise SkipRow(f"with {name} null")
    number = _as_number(value)
    if number is None:
        raise SkipRow(f"with {name} no number")
    return repr(number)


def _named(plain: str, names: Names, column: str) -> str:
    if plain in names:
        return plain
    # Numbers stand for the names in their order, unless the names are numbers themselves.
    if plain.isascii() and plain.isdecimal() and int(plain) < len(names) and not any(map(_WHOLE.fullmatch, names)):
        return names[int(plain)]
    raise InvalidValue(
        f"{column} is {plain[:80]}, none of the {len(names)} classes ({listed(names)}); add it to dataset.labels"
    )


def tag_names(names: Names | None, column: str) -> Callable[[Any], str]:
    """A reader of single tags, each a name or the number of one of the names."""
    read = LabelColumn(column, "single-label", names)

    def tag(value: Any) -> str:
        text = read.one(value)
        if _WHOLE.fullmatch(text) and int(text) < 0:
            raise SkipRow(f"with {column} below 0")
        return text

    return tag
