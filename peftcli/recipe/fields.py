"""Parsers of single values for the schema, including durations and gates.

A parser gets the value from YAML and returns the value of the field. It raises `PydanticCustomError("recipe", text)`;
the text becomes the end of the message to the user.
"""

import codecs
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pydantic_core import PydanticCustomError

from peftcli.methods.base import LEFT_OUT
from peftcli.methods.registry import METHODS
from peftcli.nearest import nearest
from peftcli.recipe.aliases import METHOD_WORDS
from peftcli.recipe.template import template_columns
from peftcli.tasks.registry import TASKS

_DURATION = re.compile(
    r"(?:(?P<d>\d+(?:\.\d+)?)d)?(?:(?P<h>\d+(?:\.\d+)?)h)?(?:(?P<m>\d+(?:\.\d+)?)m(?:in)?)?(?:(?P<s>\d+(?:\.\d+)?)s)?"
)
_UNIT_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}

_RUN_METRICS = (
    "forgetting_loss",
    "forgetting_change",
    "merge_top1_agreement",
    "merge_max_abs_logit_difference",
    "merge_mean_abs_logit_difference",
    "merge_kl_nats",
)
"""Metrics of every task: what was forgotten, and what the merge changed."""
GATE_NAMES = tuple(dict.fromkeys([*(name for task in TASKS.values() for name in task.metrics), *_RUN_METRICS]))
_GATE = re.compile(r"\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")


def wrong(text: str) -> PydanticCustomError:
    """An error whose text is shown to the user unchanged."""
    return PydanticCustomError("recipe", "{text}", {"text": text})


def freeze_rows(value: Any) -> Any:
    """Turn a list into a tuple; the items are checked by the field."""
    if not isinstance(value, list | tuple):
        raise wrong("must be a list")
    if all(isinstance(item, str) for item in value):
        _no_double(value)
    return tuple(value)


def freeze_names(value: Any) -> tuple[str, ...]:
    """Turn one name or a list of names into a tuple."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        raise wrong("must be a name or a list of names")
    if not names:
        raise wrong("must have at least one name")
    _no_double(names)
    return tuple(names)


def read_trained_dtype(value: Any) -> Any:
    """Reject float16 for trained weights, with the reason; the field checks the rest."""
    if value in ("float16", "fp16"):
        raise wrong(
            "float16 weights cannot be trained: torch's gradient scaler rejects float16 gradients, because small "
            "ones underflow; set float32, or bfloat16 on a GPU of sm_80 or later"
        )
    return value


def read_targets(value: Any) -> tuple[str, ...] | str | None:
    """Read `adapter.target_modules`: all-linear, a regular expression or a list of names."""
    if value is None:
        return None
    if value == "all-linear":
        return "all-linear"
    if isinstance(value, str):
        if re.fullmatch(r"[\w.-]*", value):
            # PEFT would compare it with full names, which no short name equals.
            raise wrong(f"must be all-linear or a list of module names, such as [{value or 'q_proj'}]")
        try:
            re.compile(value)
        except re.error as problem:
            raise wrong(f"is not a regular expression ({problem}); fix it, or list module names") from None
        return value
    try:
        return freeze_names(value)
    except PydanticCustomError:
        if isinstance(value, list) and value and all(isinstance(name, str) and name for name in value):
            raise
        raise wrong("must be all-linear or a list of module names, such as [q_proj, v_proj]") from None


def read_method(value: Any) -> str:
    """Read `adapter.method`."""
    if isinstance(value, str) and value in METHODS:
        return value
    if not isinstance(value, str):
        raise wrong("must be the name of a method; `peftcli methods` lists them")
    plain = value.lower().replace("-", "_")
    same = next((row.name for row in METHODS.values() if plain in (row.name, row.peft_module, row.title.lower())), None)
    near = same or METHOD_WORDS.get(plain) or nearest(value, METHODS)
    if near is None and plain.upper() in LEFT_OUT:
        raise wrong(f"is not offered: {LEFT_OUT[plain.upper()]}")
    raise wrong(f"is not a method; did you mean {near}?" if near else "is not a method; `peftcli methods` lists them")


def freeze_mapping(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Make a read-only copy of a mapping."""
    return MappingProxyType(dict(value))


def read_where(value: Any) -> Mapping[str, Any] | None:
    """Read `dataset.where`: the wanted values of columns; a list is stored as a tuple."""
    if value is None:
        return None
    scalar = (str, int, float, type(None))
    if not isinstance(value, Mapping) or not value:
        raise wrong("must be columns with the values to keep, such as {label: true}")
    for name, wanted in value.items():
        values = wanted if isinstance(wanted, list | tuple) else [wanted]
        if not values or not all(isinstance(one, scalar) for one in values):
            raise wrong(f'needs a value or a list of values for {name}, such as true, [en, de] or ">= 4"')
    return freeze_mapping({str(name): tuple(one) if isinstance(one, list) else one for name, one in value.items()})


def read_template(value: Any) -> str:
    """Read a template and check its braces."""
    if isinstance(value, dict):
        raise wrong("must be text; put a template that starts with { in quotes")
    if not isinstance(value, str):
        raise wrong("must be text with {column} where a value goes")
    if not value:
        raise wrong("must not be empty")
    try:
        template_columns(value)
    except ValueError as error:
        raise wrong(str(error)) from None
    return value


def read_test_size(value: Any) -> float | int:
    """Read `dataset.split.test_size`: a share below 1, a number of rows, or 0 for no test rows."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value == 0:
            return 0
        if 0 < value < 1 or (isinstance(value, int) and value >= 1):
            return value
        if isinstance(value, float) and 1 <= value < 1e15 and value.is_integer():
            raise wrong(f"must be a share between 0 and 1, or a whole number of rows such as {int(value)}")
    raise wrong("must be a share between 0 and 1, or a whole number of rows")


def read_tokens(value: Any) -> int | str:
    """Read a count, or `auto`."""
    if value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise wrong("must be auto or a whole number of at least 1")


def read_answered_rows(value: Any) -> int | str | None:
    """Read `evaluation.rows`."""
    if value is None:
        return None
    if value == "all":
        return "all"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise wrong("must be a whole number of at least 1, all, or null for at most 500")


def read_seconds(value: Any) -> float:
    """Read a duration into seconds."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise wrong("must be a duration such as 90s, 10min or 8h30m")
    try:
        return parse_duration(value if isinstance(value, str) else repr(value))
    except ValueError as error:
        raise wrong(str(error)) from None


def read_share(value: Any) -> float:
    """Read a share of the rows; 0 and 1 may be integers."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise wrong("must be a share between 0 and 1, such as 0.05")


def read_delimiter(value: Any) -> str:
    """Read the delimiter of a CSV file."""
    if isinstance(value, str) and len(value) == 1 and value not in '\r\n"':
        return value
    raise wrong('must be one character in quotes, such as ";" or "\\t"')


def read_quote(value: Any) -> str:
    """Read the quote character of a CSV file."""
    if isinstance(value, str) and (
        value == "none" or (len(value) == 1 and not value.isalnum() and value.isprintable())
    ):
        return value
    raise wrong("must be none or one character in quotes, such as '\"'")


def read_encoding(value: Any) -> str:
    """Read the name of a text encoding."""
    try:
        if isinstance(value, str) and codecs.lookup(value)._is_text_encoding:
            return value
    except LookupError:
        pass
    raise wrong("must be the name of an encoding, such as utf-8, latin-1, cp1252 or utf-16")


LONGEST_NAME = 100
"""Characters of the name of a run."""


def read_name(value: Any) -> str:
    """Read the name of the run, which is also a folder name."""
    if not isinstance(value, str):
        raise wrong("must be text")
    if len(value) > LONGEST_NAME:
        raise wrong(f"has {len(value)} characters, and a folder name of a run has at most {LONGEST_NAME}; shorten it")
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", value):
        raise wrong(
            "is a folder name, which may have ASCII letters (a-z, A-Z), digits, '.', '_' and '-', and no dot at its "
            "start; set another name, and output_dir for a folder of any name"
        )
    return value


def _no_double(names: Any) -> None:
    for index, name in enumerate(names):
        if name in names[:index]:
            raise wrong(f"has {name} twice")


def parse_duration(text: str) -> float:
    """Seconds of a duration such as `90s`, `10min`, `8h30m` or `1d`.

    >>> parse_duration("8h30m"), parse_duration("10min"), parse_duration("1.5h")
    (30600.0, 600.0, 5400.0)

    Raises:
        ValueError: the text is not a positive duration, or its unit is missing.
    """
    bare = text.strip()
    if re.fullmatch(r"\d+(?:\.\d*)?|\.\d+", bare):
        raise ValueError(f"the unit is missing; write {bare}s, {bare}min or {bare}h")
    match = _DURATION.fullmatch(bare)
    if match is None or not bare:
        raise ValueError("must be a duration such as 90s, 10min or 8h30m")
    seconds = sum(float(match[unit]) * size for unit, size in _UNIT_SECONDS.items() if match[unit])
    if seconds <= 0 or not math.isfinite(seconds):
        raise ValueError("must be a duration above zero, such as 90s, 10min or 8h30m")
    return seconds


def duration_text(seconds: float) -> str:
    """Format seconds so that `parse_duration` returns the same number.

    >>> duration_text(30600.0), duration_text(0.5)
    ('8h30m', '0.5s')
    """
    if seconds != int(seconds):
        return f"{seconds!r}s" if "e" not in repr(seconds) else f"{seconds:.20f}s"
    rest, text = int(seconds), ""
    for unit, size in (("h", 3600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        text += f"{count}{unit}" if count else ""
    return text


@dataclass(frozen=True)
class Gate:
    """A limit that a metric of the run must meet; otherwise the command exits with code 7."""

    name: str
    operator: str
    limit: float

    @property
    def text(self) -> str:
        """The limit as written in a recipe.

        >>> Gate("exact_match", ">=", 0.8).text
        '>= 0.8'
        """
        short = f"{self.limit:.15g}"
        return f"{self.operator} {short if float(short) == self.limit else repr(self.limit)}"

    def met(self, value: float) -> bool:
        """Whether a value meets the limit; NaN never does.

        >>> Gate("loss", "<", 2.0).met(1.9), Gate("loss", "<", 2.0).met(float("nan"))
        (True, False)
        """
        if self.operator == ">=":
            return value >= self.limit
        if self.operator == "<=":
            return value <= self.limit
        return value > self.limit if self.operator == ">" else value < self.limit


def parse_gate(name: str, text: str) -> Gate:
    """Parse a gate.

    >>> parse_gate("loss", "<2")
    Gate(name='loss', operator='<', limit=2.0)

    Raises:
        ValueError: the text is not an operator and a number.
    """
    match = _GATE.fullmatch(text)
    if match is None or not math.isfinite(float(match[2])):
        raise ValueError('must be a limit in quotes such as ">= 0.8" (>=, <=, > or <, and a number)')
    return Gate(name, match[1], float(match[2]))
