"""The result of one check, without anything that must not be pasted in public."""

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
    """The result of one check.

    Attributes:
        name: what was checked, in a word or two.
        result: `ok`, `warn` (a run works, but the user should know) or `fail` (a run would stop, or not use the GPU).
        found: what was found, and what is expected.
        fix: what to do about a warning or a failure; empty for `ok`.
    """

    name: str
    result: str
    found: str
    fix: str = ""

    @property
    def line(self) -> str:
        """What was found, followed by the fix."""
        return f"{self.found}; {self.fix}" if self.fix else self.found


def refused(name: str, problem: PeftcliError) -> Check:
    """A failed check from one of our errors; the fix is the last line of the message, or what follows the last "; "."""
    text = str(problem).strip()
    found, _, fix = text.rpartition("\n" if "\n" in text else "; ")
    found, fix = (" ".join(part.split()) for part in (found, fix))
    return Check(name, FAIL, found or fix, fix if found else "")


def private_words() -> dict[str, str]:
    """Names that identify the user or the machine, with their replacements; longer names come first."""
    words = {str(Path.home()): "~", platform.node(): "***"}
    with suppress(KeyError, OSError):  # a user without a name, as in some containers
        words[getpass.getuser()] = "***"
    # `root` and `localhost` identify nobody, and replacing them would garble other sentences.
    common = ("", "/", "root", "/root", "localhost")
    private = {word: replacement for word, replacement in words.items() if word not in common}
    return dict(sorted(private.items(), key=lambda pair: -len(pair[0])))


def anonymous(check: Check, private: Mapping[str, str]) -> Check:
    """The check without paths, user names, host names or tokens."""
    return replace(check, found=without_private(check.found, private), fix=without_private(check.fix, private))


def without_private(text: str, private: Mapping[str, str]) -> str:
    """Shorten absolute paths to their last component, and replace private names and tokens.

    >>> without_private("/mnt/anna/models/llama: no such folder on pc7", {"anna": "***", "pc7": "***"})
    '.../llama: no such folder on ***'
    >>> without_private("org/model of https://huggingface.co/org", {})
    'org/model of https://huggingface.co/org'
    """
    text = _ABSOLUTE.sub(lambda found: ".../" + found[0].rstrip("/").rpartition("/")[2], hide_secrets(text))
    for word, replacement in private.items():
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", replacement, text)
    return text
