"""Formats numbers and untrusted strings for readers.

Missing values are a dash, and rounding never gives 0 or 1. Invisible characters in strings are made visible, so that
text is shown as text everywhere.
"""

import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"

# Joiners are part of emoji and several scripts; any other format character only misleads.
JOINERS = "\u200c\u200d"
HOME = re.compile(r"(?:/home/|/Users/|[A-Za-z]:\\Users\\)[^/\\\s\"']+|/root(?=/)")


def significant(value: float | None, digits: int = 4) -> str:
    """Format a value with a fixed number of significant digits, for comparing losses and perplexities.

    >>> significant(2.3149), significant(0.41), significant(18342.7), significant(1.234e-7), significant(None)
    ('2.315', '0.4100', '18,340', '1.234e-7', '–')
    """
    if value is None:
        return DASH
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -4 or exponent > 9:
        return _scientific(f"{value:.{digits - 1}e}")
    rounded = round(value, digits - 1 - exponent)
    return _signed(f"{rounded:,.{max(0, digits - 1 - exponent)}f}")


def compact(value: float | None) -> str:
    """Format a value with up to four significant digits and no trailing zeros.

    >>> compact(2e-4), compact(0.48), compact(32), compact(0.00123), compact(-1.5)
    ('2e-4', '0.48', '32', '0.00123', '−1.5')
    """
    if value is None:
        return DASH
    if float(value).is_integer() and abs(value) < 1e15:
        return count(value)
    if 1e-3 <= abs(value) < 1e4:
        return _signed(f"{value:.4g}")
    return significant(value) if abs(value) >= 1e4 else _scientific(f"{value:.3e}", short=True)


def text(value: Any) -> str:
    """Format a value as words: a dash for None, yes and no for booleans, commas between the parts of a list.

    >>> text(None), text(True), text([1, None]), text({"a": 1}), text(())
    ('–', 'yes', '1, –', 'a 1', 'none')
    """
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(text(part) for part in value) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {text(part)}" for key, part in value.items()) or "none"
    return str(value)


def several(number: float, one: str, many: str) -> str:
    """Format a number of things with the singular or plural.

    >>> several(1, "row was", "rows were"), several(1200, "row was", "rows were")
    ('1 row was', '1,200 rows were')
    """
    return f"{count(number)} {one if number == 1 else many}"


def count(value: float | None) -> str:
    """Format a whole number with thousands separators.

    >>> count(39750), count(0), count(None)
    ('39,750', '0', '–')
    """
    return DASH if value is None else _signed(f"{round(value):,}")


def score(value: float | None) -> str:
    """Format a score between 0 and 1 with three decimals; only exact 0 and 1 are written as such.

    >>> score(0.8688), score(1.0), score(0.99996), score(0.0001)
    ('0.869', '1.000', '> 0.999', '< 0.001')
    """
    if value is None:
        return DASH
    if 0.9995 <= value < 1:
        return "> 0.999"
    return "< 0.001" if 0 < value < 0.0005 else _signed(f"{value:.3f}")


def percent(ratio: float | None) -> str:
    """Format a ratio of 0..1 as a percentage; only exact 0 and 1 are written as such.

    >>> percent(0.1234), percent(1.0), percent(0.99999), percent(0.00001), percent(0.004955)
    ('12.3 %', '100 %', '> 99.99 %', '< 0.01 %', '0.50 %')
    """
    if ratio is None:
        return DASH
    if ratio in (0, 1):
        return f"{round(ratio * 100)} %"
    if 0.9999 < ratio < 1:
        return "> 99.99 %"
    if 0 < ratio < 0.0001:
        return "< 0.01 %"
    decimals = 2 if ratio < 0.01 or 0.99 < ratio < 1 else 1
    return _signed(f"{ratio * 100:.{decimals}f} %")


def size(number_of_bytes: float | None) -> str:
    """Format a number of bytes in binary units.

    >>> size(134235048), size(13476839424), size(812), size(None)
    ('128 MiB', '12.6 GiB', '812 B', '–')
    """
    if number_of_bytes is None:
        return DASH
    amount, units = float(number_of_bytes), ["TiB", "GiB", "MiB", "KiB", "B"]
    while amount >= 1023.5 and len(units) > 1:
        amount /= 1024
        units.pop()
    unit = units[-1]
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 99.95 else f"{amount:.1f} {unit}"


def duration(seconds: float | None) -> str:
    """Format a duration with its two largest units.

    >>> duration(96), duration(8.44), duration(30600), duration(0), duration(None)
    ('1m 36s', '8.4s', '8h 30m', '0s', '–')
    """
    if seconds is None:
        return DASH
    if 0 < seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    return f"{minutes // 1440}d {minutes % 1440 // 60:02d}h"


def share(part: float | None, whole: float | None) -> str:
    """Format one number as a percentage of another; a dash if either is missing or the whole is 0.

    >>> share(1, 4), share(1, 0), share(None, 4)
    ('25.0 %', '–', '–')
    """
    return DASH if part is None or not whole else percent(part / whole)


def _signed(text: str) -> str:
    return text.replace("-", MINUS)


def _scientific(text: str, *, short: bool = False) -> str:
    mantissa, _, exponent = text.partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if short else mantissa
    return f"{_signed(mantissa)}e{int(exponent)}"


@dataclass(frozen=True)
class Piece:
    """Plain text, or a mark for an invisible character; a `break` ends a line."""

    kind: Literal["text", "mark", "break"]
    text: str


def visible(text: str) -> str:
    """Replace every invisible character by a symbol or a code point; line breaks become ⏎.

    The result can always be encoded, contains no control characters and no direction overrides.

    >>> visible("a\\x1b[31mb"), visible("x\\u202ey"), visible("two\\nlines")
    ('a␛[31mb', 'x‹U+202E›y', 'two⏎lines')
    """
    return "".join(_picture(character) or character for character in text.replace("\r\n", "\n"))


def pieces(text: str) -> list[Piece]:
    """Split a prompt or an answer into text and marks; spaces at both ends are marked.

    >>> [piece.text for piece in pieces(" food\\n")]
    ['·', 'food', '⏎', '']
    """
    text = text.replace("\r\n", "\n")
    start = len(text) - len(text.lstrip(" "))
    end = len(text.rstrip(" "))
    found: list[Piece] = []
    plain = ""
    for index, character in enumerate(text):
        mark = "·" if character == " " and (index < start or index >= end) else _picture(character)
        if mark is None:
            plain += character
            continue
        if plain:
            found.append(Piece("text", plain))
            plain = ""
        found.append(Piece("mark", mark))
        if character == "\n":
            found.append(Piece("break", ""))
    return [*found, Piece("text", plain)] if plain else found


def clip(text: str, limit: int) -> str:
    """Truncate a long text and add the number of removed characters.

    >>> clip("abcdef", 4)
    'abcd… (2 more characters)'
    """
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} more characters)"


def without_home(text: str) -> str:
    """Replace the home folder of a path by `~`, because reports are shared.

    >>> without_home("/home/ada/data/products.csv")
    '~/data/products.csv'
    """
    return HOME.sub("~", text)


def _picture(character: str) -> str | None:
    code = ord(character)
    if 0x20 <= code < 0x7F:
        return None
    if character == "\n":
        return "⏎"
    if character == "\t":
        return "⇥"
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\N{SYMBOL FOR DELETE}"
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in JOINERS
    return f"‹U+{code:04X}›" if hidden else None
