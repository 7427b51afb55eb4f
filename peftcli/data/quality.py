"""Scans the columns for mixed types, missing values, damaged text, personal data and secrets; never stores the values.

Every search takes linear time: the patterns start with a literal or a small set of characters, followed by a bounded
number of characters.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeAlias

from peftcli.data.rows import FIRST_PLACES, Rows
from peftcli.data.values import type_name
from peftcli.recipe.problems import printable

PERSONAL_SHARE = 0.01
"""Share of rows with an e-mail address or a phone number above which there is a warning."""
PERSONAL_ROWS = 3
"""Minimum number of such rows for a warning."""

_WARNINGS = {
    "key": ("what looks like an access key", "remove and revoke it; a model can reproduce its training data"),
    "email": ("an e-mail address", "a model can reproduce its training data; replace private addresses"),
    "phone": ("a phone number", "a model can reproduce its training data; replace private numbers"),
    "control_characters": ("control characters", "the model learns to write them; remove them"),
    "replacement_characters": (
        "wrongly decoded characters",
        "the model learns to write them; set dataset.encoding, or fix the file",
    ),
}

Search: TypeAlias = Callable[[str], Iterator[int]]
"""Yields the positions of matches from left to right; no match crosses a line break."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_MOJIBAKE = re.compile("\ufffd|â€|Ã[\x80-\xbf]|Â[\xa0-\xbf]|ï»¿|ðŸ")
_EMAIL = re.compile(r"@(?<=[A-Za-z0-9_+%-]@)(?:[A-Za-z0-9][A-Za-z0-9-]{0,62}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9])")
_INTERNATIONAL = re.compile(r"\+(?<![\w+.)]\+)[1-9](?:[ .()-]{0,2}[0-9]){7,14}(?![0-9])")
_DASHED = re.compile(r"-(?<=[0-9]{3}-)(?<![0-9.][0-9]{3}-)[0-9]{3}-[0-9]{4}(?![0-9]|[.-][0-9])")
_DOTTED = re.compile(r"\.(?<=[0-9]{3}\.)(?<![0-9.][0-9]{3}\.)[0-9]{3}\.[0-9]{4}(?![0-9]|[.-][0-9])")
_IN_BRACKETS = re.compile(r"\([0-9]{3}\) ?[0-9]{3}[ .-][0-9]{4}(?![0-9])")
_KEY_STARTS = ("hf_", "sk-", "gho_", "ghp_", "ghs_", "ghu_", "github_pat_", "AKIA", "xox", "-----BEGIN ", "eyJ")
_KEY = re.compile(
    # The same keys as in recipe/problems.py, but with bounds, since a row may be as long as a book.
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20}|sk-(?:[a-z]{1,12}[0-9]{0,4}-){0,4}[A-Za-z0-9_]{20}"
    r"|gh[opsu]_[A-Za-z0-9]{20}|AKIA[0-9A-Z]{16}|github_pat_[A-Za-z0-9_]{20}|xox[bp]-[A-Za-z0-9-]{20})"
    r"|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"
    r"|(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{10,}+\.eyJ[A-Za-z0-9_-]{10,}+\.[A-Za-z0-9_-]{10}"
)
_WHOLE_KEY = re.compile(
    rf"-----BEGIN [A-Z ]{{0,30}}PRIVATE KEY-----.*?(?:-----END|\Z)|(?:{_KEY.pattern})[A-Za-z0-9_.-]*", re.DOTALL
)


@dataclass
class _Column:
    """Counts of one column."""

    rows: int = 0
    null: int = 0
    empty: int = 0
    types: Counter[str] = field(default_factory=Counter)
    traces: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)
    of_type: dict[str, list[str]] = field(default_factory=dict)


class ColumnScan:
    """Collects statistics of the used columns of a source, batch by batch."""

    def __init__(self, source: str, columns: Sequence[str]) -> None:
        """Start without rows.

        Args:
            source: its name in the data report.
            columns: columns to scan; a column that no row has is not reported.
        """
        self.source = source
        self._columns = {name: _Column() for name in columns}
        self._seen: set[str] = set()

    def add(self, rows: Rows) -> None:
        """Count a batch."""
        for name, column in self._columns.items():
            values = rows.columns.get(name)
            self._seen.update([name] if values is not None else [])
            _add(column, [None] * len(rows) if values is None else values, rows)

    def facts(self) -> list[dict[str, Any]]:
        """One object per column: counts of types, null and empty values, and findings, with the first locations."""
        return [
            {
                "source": self.source,
                "column": name,
                "rows": column.rows,
                "null": column.null,
                "empty": column.empty,
                "types": dict(column.types.most_common()),
                **{trace: column.traces[trace] for trace in SEARCHES},
                "first": {what: list(places) for what, places in column.first.items()},
            }
            for name, column in self._columns.items()
            if name in self._seen
        ]

    def warnings(self) -> list[str]:
        """Sentences with a count and the first location."""
        return [text for name, column in self._columns.items() for text in self._column_warnings(name, column)]

    def _column_warnings(self, name: str, column: _Column) -> Iterator[str]:
        where = f"{self.source}: column {printable(name)}"
        if len(column.types) > 1:
            (most, many), *others = column.types.most_common()
            rest = ", ".join(f"{count} {kind} (first {column.of_type[kind][0]})" for kind, count in others)
            yield f"{where} has mixed types: {many} rows are {most}, {rest}; use one type"
        for trace, (what, fix) in _WARNINGS.items():
            count = column.traces[trace]
            if trace in ("email", "phone") and (count < PERSONAL_ROWS or count <= PERSONAL_SHARE * column.rows):
                continue
            if count:
                rows = f"{count} row{'s have' if count > 1 else ' has'}"
                yield f"{where}: {rows} {what} (first {column.first[trace][0]}); {fix}"


def _add(column: _Column, values: Sequence[Any], rows: Rows) -> None:
    column.rows += len(values)
    is_text = set(map(type, values)) == {str}
    # NaN is the only value that is not equal to itself.
    nulls = [] if is_text else [row for row, value in enumerate(values) if value is None or value != value]
    texts = values if is_text else [_nested_text(value) for value in values]
    column.null += len(nulls)
    _keep(column.first, "null", nulls, rows)
    _add_types(column, values, set(nulls), rows)
    blank = [row for row, text in enumerate(texts) if (not text or text.isspace()) and isinstance(values[row], str)]
    column.empty += len(blank)
    _keep(column.first, "empty", blank, rows)
    whole = "\n".join(texts)
    ends = list(accumulate(len(text) + 1 for text in texts))
    for trace, search in SEARCHES.items():
        found = list(dict.fromkeys(bisect_right(ends, position) for position in search(whole)))
        column.traces[trace] += len(found)
        _keep(column.first, trace, found, rows)


def _add_types(column: _Column, values: Sequence[Any], nulls: set[int], rows: Rows) -> None:
    names = {kind: type_name(kind) for kind in set(map(type, values))}
    counts: Counter[str] = Counter()
    for kind, count in Counter(map(type, values)).items():
        counts[names[kind]] += count
    for row in nulls:
        counts[names[type(values[row])]] -= 1
    for name, count in counts.items():
        if count > 0:
            column.types[name] += count
            if len(column.of_type.get(name, ())) < FIRST_PLACES:
                found = (row for row, v in enumerate(values) if names[type(v)] == name and row not in nulls)
                _keep(column.of_type, name, found, rows)


def _keep(first: dict[str, list[str]], what: str, found: Iterable[int], rows: Rows) -> None:
    """Store the first few locations."""
    for row in found:
        places = first.setdefault(what, [])
        if len(places) == FIRST_PLACES:
            return
        places.append(rows.place(row))


def _nested_text(value: Any) -> str:
    """All strings inside a value, one per line."""
    texts: list[str] = []
    open_values = [value]
    while open_values:
        one = open_values.pop()
        if isinstance(one, str):
            texts.append(one)
        elif isinstance(one, dict):
            open_values.extend(reversed(one.values()))
        elif isinstance(one, list | tuple):
            open_values.extend(reversed(one))
    return "\n".join(texts)


def hide_keys(texts: Sequence[str]) -> list[str]:
    """Replace keys by *** in consecutive parts of one text, including keys that cross the boundary of parts.

    >>> hide_keys(["is hf_" + "a" * 10, "a" * 24 + " it?"])
    ['is ***', ' it?']
    """
    whole = "".join(texts)
    spans = [match.span() for match in _WHOLE_KEY.finditer(whole)] if any(map(whole.__contains__, _KEY_STARTS)) else []
    hidden, begin = [], 0
    for text in texts:
        end, at, pieces = begin + len(text), begin, []
        for start, stop in spans:
            if start < end and stop > begin:
                pieces += [whole[at:start], "***"] if start >= begin else []
                at = min(stop, end)
        hidden.append("".join([*pieces, whole[at:end]]))
        begin = end
    return hidden


def control_characters(text: str) -> Iterator[int]:
    """Control characters except line breaks and tabs."""
    return (match.start() for match in _CONTROL.finditer(text))


def replacement_characters(text: str) -> Iterator[int]:
    """Replacement characters, and UTF-8 that was decoded as Latin-1, such as `Ã©` instead of `é`."""
    return iter(()) if text.isascii() else (match.start() for match in _MOJIBAKE.finditer(text))


def emails(text: str) -> Iterator[int]:
    """E-mail addresses; the position is that of the @."""
    return (match.start() for match in _EMAIL.finditer(text))


def phones(text: str) -> Iterator[int]:
    """Unambiguous phone numbers: +44 20 7946 0958, 555-010-1234, (555) 010-1234."""
    yield from sorted(
        [
            *(match.start() for match in _INTERNATIONAL.finditer(text) if _is_dialled(match.group())),
            *(match.start() for match in _DASHED.finditer(text) if _begins_a_number(text, match.start() - 3)),
            *(match.start() for match in _DOTTED.finditer(text) if _begins_a_number(text, match.start() - 3)),
            *(match.start() for match in _IN_BRACKETS.finditer(text)),
        ]
    )


def keys(text: str) -> Iterator[int]:
    """Access tokens, private keys and signed tokens (JWT)."""
    found = any(start in text for start in _KEY_STARTS)
    return (match.start() for match in _KEY.finditer(text)) if found else iter(())


SEARCHES: dict[str, Search] = {
    "control_characters": control_characters,
    "replacement_characters": replacement_characters,
    "email": emails,
    "phone": phones,
    "key": keys,
}


def _is_dialled(number: str) -> bool:
    """Whether the digits are grouped like a phone number, not like a decimal fraction or a list of numbers."""
    groups = re.findall(r"[0-9]+", number)
    is_fraction = number.count(".") == 1 and len(groups) == 2
    return not is_fraction and len(groups) <= 6 and sum(len(group) == 1 for group in groups[1:]) <= 1


def _begins_a_number(text: str, start: int) -> bool:
    """Whether nothing but the North American prefix 1- precedes: 1-555-010-1234, but not the parts of an ISBN."""
    before = text[max(0, start - 3) : start]
    return not before.endswith(("-", "+", "/")) or re.fullmatch(r"(.*[^0-9-])?1-", before, re.DOTALL) is not None
