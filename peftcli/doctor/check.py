"""The result of one check, in words that are safe to paste in public."""

import getpass
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from peftcli.errors import PeftcliError
from peftcli.recipe.problems import hide_secrets

OK, WARN, FAIL = "ok", "warn", "fail"
_ABSOLUTE = re.compile(r"(?<![\w./~:-])(?:~|/[^\s/'\",;:()]+)(?:/[^\s/'\",;:()]+)+/?")


@dataclass(frozen=True)
class Check:
    """The answer to one question.

    Attributes:
        name: the question, in a word or two.
        result: `ok`, `warn` (go on, knowing this) or `fail` (a run would stop here, or miss the card).
        found: what is there, against what may be.
        fix: what to do about a warn or a fail, empty for ok.
    """

    name: str
    result: str
    found: str
    fix: str = ""

    @property
    def line(self) -> str:
        """What is there, and the mend behind it."""
        return f"{self.found}; {self.fix}" if self.fix else self.found


def refused(name: str, problem: PeftcliError) -> Check:
    """A fail from an error of ours, whose message says on its last line or after its last semicolon how to mend it."""
    text = str(problem).strip()
    there, _, mend = text.rpartition("\n" if "\n" in text else "; ")
    there, mend = (" ".join(part.split()) for part in (there, mend))
    return Check(name, FAIL, there or mend, mend if there else "")


def private_words() -> dict[str, str]:
    """What tells who and where somebody is, each with what is written for it; longer words come first."""
    words = {str(Path.home()): "~", platform.node(): "***"}
    with suppress(KeyError, OSError):  # a user without a name, as in some containers
        words[getpass.getuser()] = "***"
    # `root` and `localhost` tell nothing, and would spoil sentences that mean something else.
    kept = {word: sign for word, sign in words.items() if word not in ("", "/", "root", "/root", "localhost")}
    return dict(sorted(kept.items(), key=lambda pair: -len(pair[0])))


def anonymous(verdict: Check, private: Mapping[str, str]) -> Check:
    """The same verdict without paths, names of users and hosts, or tokens."""
    return replace(verdict, found=without_private(verdict.found, private), fix=without_private(verdict.fix, private))


def without_private(text: str, private: Mapping[str, str]) -> str:
    """Shorten each full path to its last part, and put signs for private words and tokens.

    >>> without_private("/mnt/anna/models/llama: no such folder on pc7", {"anna": "***", "pc7": "***"})
    '.../llama: no such folder on ***'
    >>> without_private("org/model of https://huggingface.co/org", {})
    'org/model of https://huggingface.co/org'
    """
    text = _ABSOLUTE.sub(lambda found: ".../" + found[0].rstrip("/").rpartition("/")[2], hide_secrets(text))
    for word, sign in private.items():
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", sign, text)
    return text
