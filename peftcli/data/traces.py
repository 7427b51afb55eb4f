"""Traces of persons, of keys and of damage in texts; every search takes time linear in the length of the text.

The patterns begin with a literal or with a small set of letters and look at a bounded number of letters after it.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

Search: TypeAlias = Callable[[str], Iterator[int]]
"""Gives the positions of what it finds, from left to right; nothing found reaches over a line break."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_MOJIBAKE = re.compile("\ufffd|â€|Ã[\x80-\xbf]|Â[\xa0-\xbf]|ï»¿|ðŸ")
_EMAIL = re.compile(r"@(?<=[A-Za-z0-9_+%-]@)(?:[A-Za-z0-9][A-Za-z0-9-]{0,62}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9])")
_INTERNATIONAL = re.compile(r"\+(?<![\w+.)]\+)[1-9](?:[ .()-]{0,2}[0-9]){7,14}(?![0-9])")
_DASHED = re.compile(r"-(?<=[0-9]{3}-)(?<![0-9.][0-9]{3}-)[0-9]{3}-[0-9]{4}(?![0-9]|[.-][0-9])")
_DOTTED = re.compile(r"\.(?<=[0-9]{3}\.)(?<![0-9.][0-9]{3}\.)[0-9]{3}\.[0-9]{4}(?![0-9]|[.-][0-9])")
_IN_BRACKETS = re.compile(r"\([0-9]{3}\) ?[0-9]{3}[ .-][0-9]{4}(?![0-9])")
_KEY_STARTS = ("hf_", "sk-", "gho_", "ghp_", "ghs_", "ghu_", "github_pat_", "AKIA", "xox", "-----BEGIN ", "eyJ")
_KEY = re.compile(
    # What a recipe may not hold either (recipe/problems.py), with bounds, since a row may be a whole book.
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20}|sk-(?:[a-z]{1,12}[0-9]{0,4}-){0,4}[A-Za-z0-9_]{20}"
    r"|gh[opsu]_[A-Za-z0-9]{20}|AKIA[0-9A-Z]{16}|github_pat_[A-Za-z0-9_]{20}|xox[bp]-[A-Za-z0-9-]{20})"
    r"|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"
    r"|(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{10,}+\.eyJ[A-Za-z0-9_-]{10,}+\.[A-Za-z0-9_-]{10}"
)
_WHOLE_KEY = re.compile(
    rf"-----BEGIN [A-Z ]{{0,30}}PRIVATE KEY-----.*?(?:-----END|\Z)|(?:{_KEY.pattern})[A-Za-z0-9_.-]*", re.DOTALL
)


def hide_keys(texts: Sequence[str]) -> list[str]:
    """Consecutive stretches of one text with *** for each key, also for one that reaches over an edge.

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
    """Characters that act on a terminal and mean nothing in a text; line breaks and tabs aside."""
    return (match.start() for match in _CONTROL.finditer(text))


def replacement_characters(text: str) -> Iterator[int]:
    """The sign for a lost letter, and UTF-8 that was read as Latin-1, such as `Ã©` where `é` should stand."""
    return iter(()) if text.isascii() else (match.start() for match in _MOJIBAKE.finditer(text))


def emails(text: str) -> Iterator[int]:
    """Addresses of e-mail; the position is that of the @."""
    return (match.start() for match in _EMAIL.finditer(text))


def phones(text: str) -> Iterator[int]:
    """Telephone numbers that can hardly be anything else: +44 20 7946 0958, 555-010-1234, (555) 010-1234."""
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
    """Whether the digits stand in groups as they are dialled, not as a decimal fraction or a row of figures."""
    groups = re.findall(r"[0-9]+", number)
    is_fraction = number.count(".") == 1 and len(groups) == 2
    return not is_fraction and len(groups) <= 6 and sum(len(group) == 1 for group in groups[1:]) <= 1


def _begins_a_number(text: str, start: int) -> bool:
    """Whether only the 1 of North America may stand before: 1-555-010-1234, but not the parts of an ISBN."""
    before = text[max(0, start - 3) : start]
    return not before.endswith(("-", "+", "/")) or re.fullmatch(r"(.*[^0-9-])?1-", before, re.DOTALL) is not None
