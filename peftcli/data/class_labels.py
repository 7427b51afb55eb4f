"""Reads a label column (one class, several classes, or a number) and the class names."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peftcli.data.rows import listed
from peftcli.data.values import InvalidValue, SkipRow, is_null, python_list, type_name
from peftcli.errors import DataError
from peftcli.tasks.labels import OUTSIDE

SMALL_RANGE = 20
"""Whole numbers within a smaller range than this are classes; for others the recipe must set the problem type."""
LARGEST = 3.4e38
"""Maximum of float32, the dtype of regression labels."""
MOSTLY = 0.9
"""Share of numeric labels, some with decimals, from which on the problem is regression; other labels are dropped."""
SEPARATORS = ("|", ";", ",")
_WHOLE = re.compile(r"[+-]?\d+")
_SWITCHES = re.compile(r"[01](\.0*)?((\s*[,;|]\s*|\s+)[01](\.0*)?){2,}")
"""At least three 0 or 1 in a string; two could be a number with a decimal comma."""

Names = tuple[str, ...]


@dataclass(frozen=True)
class LabelColumn:
    """How the labels of a source are read.

    Attributes:
        name: of the column.
        problem_type: single-label, multi-label or regression.
        names: class names by id, if the recipe or the dataset has them.
        separator: between classes in a string such as `toxic|insult`.
        width: length of multi-hot lists (0 or 1 for each class); None if the lists have classes.
        unlabelled: -1 means no label, as in Hub datasets.
    """

    name: str
    problem_type: str
    names: Names | None = None
    separator: str | None = None
    width: int | None = None
    unlabelled: bool = False

    def text(self, value: Any) -> str:
        """The label of a row as stored: a class, a JSON list of classes, or a number.

        Raises:
            SkipRow: the row has no label.
            InvalidValue: a class is not one of the names.
        """
        if self.problem_type == "regression":
            return _number_text(value, self.name)
        if self.problem_type == "multi-label":
            return json.dumps(self._several(value), ensure_ascii=False)
        return self.one(value)

    def one(self, value: Any) -> str:
        """The name of one class."""
        if isinstance(value, list | tuple | dict):
            raise SkipRow(f"with {self.name} not a single class (a {type_name(type(value))})")
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
        if self.width is not None:
            return self._switched_on(value, self.width)
        return list(dict.fromkeys(self.one(one) for one in value))

    def _switched_on(self, value: Sequence[Any], width: int) -> list[str]:
        """The classes at the positions that are not 0."""
        switches = list(map(_switch, value))
        if len(switches) != width or None in switches:
            raise SkipRow(f"with {self.name} not a 0 or 1 for each class")
        names = self.names or numbered(width)
        return [name for name, one in zip(names, switches, strict=True) if one]


def numbered(count: int) -> Names:
    """Names of classes that have none: their ids.

    >>> numbered(3)
    ('0', '1', '2')
    """
    return tuple(map(str, range(count)))


def class_text(value: Any, name: str) -> str:
    """The class name of a value: stripped text, and whole numbers without decimals.

    >>> class_text(" spam ", "label"), class_text(2.0, "label"), class_text(True, "label")
    ('spam', '2', 'true')

    Raises:
        SkipRow: the value is null or empty.
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
    values: Sequence[Any], name: str, problem_type: str, names: Names | None, where: str, *, unlabelled: bool = False
) -> LabelColumn:
    """Decide how to read a label column from its first values.

    Args:
        values: of the first rows.
        name: of the column.
        problem_type: `model.problem_type`; `auto` to detect it.
        names: class names, if given.
        where: file, for messages.
        unlabelled: -1 means no label.

    Raises:
        DataError: the values are ambiguous.
    """
    present = [value for value in values if not is_null(value) and value != ""]
    problem_type = _detect_problem(present, name, names, where) if problem_type == "auto" else problem_type
    if problem_type != "multi-label":
        return LabelColumn(name, problem_type, names, unlabelled=unlabelled and problem_type == "single-label")
    texts = [value for value in present if isinstance(value, str) and not value.lstrip().startswith("[")]
    separator = _separator(texts, name, names, where)
    lists = [_parsed(value, separator) if isinstance(value, str) else value for value in present]
    return LabelColumn(name, problem_type, names, separator, _multi_hot_width(lists, name, names, where))


def label_said(label: str, problem_type: str) -> str:
    """A stored label for display.

    >>> label_said("spam", "single-label"), label_said('["toxic", "insult"]', "multi-label")
    ('spam', 'toxic, insult')
    """
    return ", ".join(json.loads(label)) if problem_type == "multi-label" else label


def sorted_names(names: Sequence[str]) -> Names:
    """Class names in order: whole numbers numerically, then text alphabetically; O before all other tags.

    >>> sorted_names(["10", "9"]), sorted_names(["spam", "ham"]), sorted_names(["I-PER", "O", "B-PER"])
    (('9', '10'), ('ham', 'spam'), ('O', 'B-PER', 'I-PER'))
    """

    def key(name: str) -> tuple[bool, bool, int, str]:
        whole = _WHOLE.fullmatch(name) is not None
        return name != OUTSIDE, not whole, int(name) if whole else 0, name

    return tuple(sorted(set(names), key=key))


def _detect_problem(present: Sequence[Any], name: str, names: Names | None, where: str) -> str:
    if any(isinstance(value, list | tuple) for value in present):
        return "multi-label"
    if any(isinstance(value, str) and value.lstrip().startswith("[") and _is_list(value) for value in present):
        return "multi-label"
    if present and all(isinstance(value, str) and _SWITCHES.fullmatch(value.strip()) for value in present):
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
        f"{where}: {name} has whole numbers from {low:.0f} to {high:.0f}, which may be classes or quantities; "
        "set model.problem_type: single-label or model.problem_type: regression"
    )


def _separator(texts: Sequence[str], name: str, names: Names | None, where: str) -> str | None:
    """The separator of classes in strings that are not JSON lists; None if there are no such strings."""
    if not texts:
        return None
    found = [sign for sign in SEPARATORS if any(sign in text for text in texts)]
    if not found and all(_SWITCHES.fullmatch(text.strip()) for text in texts):
        return None  # white space
    if len(found) > 1 and names is not None:
        fits = [sign for sign in found if all(part.strip() in names for text in texts for part in text.split(sign))]
        found = fits or found
    if len(found) > 1:
        signs = " and ".join(found)
        raise DataError(
            f"{where}: {name} has {signs}, which could both separate classes; name the classes in dataset.labels"
        )
    return found[0] if found else SEPARATORS[0]


def _multi_hot_width(lists: Sequence[Any], name: str, names: Names | None, where: str) -> int | None:
    """The length of multi-hot lists; None if the lists have names or ids of classes.

    Lists of one length that have only 0 and 1 are multi-hot: as ids, each list would have a class twice or all classes.
    Where floats, booleans or repeated numbers make that certain, a few other lists are allowed; their rows are dropped.
    """
    given = [value for value in lists if isinstance(value, list | tuple) and value]
    _refuse_soft_labels(given, name, where)
    switches = [value for value in given if all(_switch(one) is not None for one in value)]
    if not switches:
        return None
    ((width, count),) = Counter(map(len, switches)).most_common(1)
    certain = any(isinstance(one, float | bool) for v in switches for one in v) or any(
        len(set(map(_switch, value))) < len(value) for value in switches
    )
    if count < (MOSTLY if certain else 1) * len(given) or not (certain or width > 1):
        return None
    if names is None or len(names) == width:
        return width
    if not certain:
        return None  # ids of some of the named classes
    raise DataError(
        f"{where}: {name} has a 0 or 1 for each of {width} classes, but dataset.labels names {len(names)} "
        f"({listed(names)}); name all {width}, in the order of the positions"
    )


def _switch(value: Any) -> bool | None:
    """Whether a class is switched on; None for what is no 0 or 1."""
    if isinstance(value, str):
        return {"0": False, "1": True}.get(re.sub(r"\.0*$", "", value.strip()))
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def _refuse_soft_labels(lists: Sequence[Sequence[Any]], name: str, where: str) -> None:
    """Raise an error for probabilities, which would otherwise be read as the names of classes."""
    found = next(
        (one for v in lists for one in v if isinstance(one, float) and not one.is_integer() and one == one), None
    )
    if found is not None:
        raise DataError(
            f"{where}: {name} has {found:g} in a list; the labels of several classes are 0 or 1 for each class, or the "
            "names or ids of the classes; round probabilities to 0 and 1"
        )


def _parsed(text: str, separator: str | None) -> Any:
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):  # RecursionError: thousands of nested brackets
            return python_list(text)
    if separator is None and _SWITCHES.fullmatch(text.strip()):
        return text.split()
    return [part for part in text.split(separator or SEPARATORS[0]) if part.strip()]


def _is_list(text: str) -> bool:
    return isinstance(_parsed(text, None), list)


def _as_number(value: Any) -> float | None:
    """The numeric value of a number or a string; None for booleans and other text."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if abs(number) <= LARGEST else None  # also None for NaN


def _number_text(value: Any, name: str) -> str:
    if is_null(value) or value == "":
        raise SkipRow(f"with {name} null")
    number = _as_number(value)
    if number is None:
        raise SkipRow(f"with {name} not a number")
    return repr(number)


def _named(plain: str, names: Names, column: str) -> str:
    if plain in names:
        return plain
    # Numbers are class ids, unless the names are numbers themselves.
    if plain.isascii() and plain.isdecimal() and int(plain) < len(names) and not any(map(_WHOLE.fullmatch, names)):
        return names[int(plain)]
    raise InvalidValue(
        f"{column} is {plain[:80]}, not one of the {len(names)} classes ({listed(names)}); add it to dataset.labels"
    )


def tag_names(names: Names | None, column: str) -> Callable[[Any], str]:
    """A reader of single tags, each a name or an id."""
    read = LabelColumn(column, "single-label", names)

    def tag(value: Any) -> str:
        text = read.one(value)
        if _WHOLE.fullmatch(text) and int(text) < 0:
            raise SkipRow(f"with {column} below 0")
        return text

    return tag
