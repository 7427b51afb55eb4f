"""What tells where a run was made: paths, the user name and the host name; replaces them, and looks for any left."""

import getpass
import html
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
"""Files of all possible words; a single one says nothing about this machine."""
NO_HOST = ("", "localhost")
HOST = "HOST"
USER = "USER"
_ABSOLUTE = re.compile(r"(?<![\w./~:-])(?:/[^\s/'\",;:()=]+)+/?")


@dataclass(frozen=True)
class Private:
    """What must not be in an archive.

    Attributes:
        paths: absolute paths with their replacements, longer ones first.
        user: name of the user.
        hosts: names of this machine.
    """

    paths: Mapping[str, str]
    user: str
    hosts: tuple[str, ...]

    @classmethod
    def of_machine(cls, paths: Iterable[str]) -> "Private":
        """What identifies this machine and its user.

        Args:
            paths: absolute paths of the run, its base and its rows.
        """
        found = {str(Path.home()): "~"}
        for path in paths:
            found |= {one: os.path.basename(one) for one in (os.path.abspath(path), os.path.realpath(path))}
        user = ""
        with suppress(KeyError, OSError):  # a user without a name, as in some containers
            user = getpass.getuser()
        node = platform.node()
        hosts = tuple(dict.fromkeys(host for host in (node, node.partition(".")[0]) if host not in NO_HOST))
        kept = {path: name for path, name in found.items() if path != "/"}
        return cls(dict(sorted(kept.items(), key=lambda pair: -len(pair[0]))), user, hosts)

    def clean(self, text: str, *, all_paths: bool = False) -> str:
        """A text without anything private.

        Args:
            all_paths: also shorten other absolute paths to their last component; not for texts that may hold rows.
        """
        for path, name in self.paths.items():
            text = re.sub(rf"{re.escape(path)}(?![\w-]|\.\w)", name.replace("\\", r"\\"), text)
        if all_paths:
            text = _ABSOLUTE.sub(lambda found: found[0].rstrip("/").rpartition("/")[2], text)
        for host in self.hosts:
            text = re.sub(rf"(?<![\w.-]){re.escape(host)}(?![\w-])", HOST, text)
        if self.user:
            user = re.escape(self.user)
            text = re.sub(rf"(?<![\w./-])((?:/[\w.-]+)*/){user}(?![\w.-])", rf"\1{USER}", text)
            text = re.sub(rf"(?<![\w.-]){user}@", f"{USER}@", text)
        return text

    def clean_json(self, value: Any, *, all_paths: bool = False) -> Any:
        """A JSON value whose texts have nothing private."""
        if isinstance(value, str):
            return self.clean(value, all_paths=all_paths)
        if isinstance(value, list):
            return [self.clean_json(one, all_paths=all_paths) for one in value]
        if isinstance(value, dict):
            return {
                self.clean(key, all_paths=all_paths): self.clean_json(one, all_paths=all_paths)
                for key, one in value.items()
            }
        return value

    def leaks(self, content: bytes, name: str) -> list[str]:
        """What is private in a file, each in words.

        Args:
            name: of the file. In weights and vocabularies only longer paths are looked for: a short name occurs there
                by chance.
        """
        text = None if name.endswith(VOCABULARIES) else _decoded(content)
        paths = [path for path in self.paths if text is not None or path.count("/") > 1]
        found = [f"the path {path}" for path in paths if any(form in content for form in _written_forms(path))]
        if not found and text is not None and self.clean(text) != text:
            found.append(" or ".join(["the user name " + self.user, *(f"the host name {host}" for host in self.hosts)]))
        return found


def _decoded(content: bytes) -> str | None:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _written_forms(path: str) -> set[bytes]:
    """A path as JSON and HTML files may write it, not as the beginning of a longer name."""
    escaped = {path, json.dumps(path)[1:-1], html.escape(path), path.replace("/", "&#47;"), path.replace("/", "\\/")}
    return {f"{one}{end}".encode() for one in escaped for end in ("/", '"', "'", " ", "\n", "&", "<", ",", ":", ")")}
