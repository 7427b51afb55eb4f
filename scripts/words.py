"""Find words that the field does not use, in strings, docstrings, comments and the documentation."""

import ast
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHECKED = ("peftcli", "scripts", "docs", "README.md")
"""Files and folders, relative to the root; of a folder, all Python and Markdown files."""

UNCHECKED: tuple[str, ...] = ("scripts/bench/results",)
"""Files and folders among them that are not rewritten yet."""

PLAIN = {
    r"mend(?:s|ed|ing)?": "fix",
    r"anew": "again",
    r"foret(?:ell|ells|old)": "estimate",
    r"told": "given, reported",
    r"held\s+against": "compared with",
    r"levers?": "optimization, setting",
    r"twins?": "duplicate, counterpart",
    r"flat\s+lines?": "padding-free batch",
    r"a\s+word\s+each": "one word per item",
    r"nothing\s+of\s+(?:it|them)": "none of it",
    r"(?<!model\s)cards?": "GPU",
    r"(?:stands?|stood)(?!-)": "is",
}
"""Regular expressions of words that have no use in this field, and the words to use instead."""

ALLOWED = {
    ("scripts/words.py", ".*"): "the table itself",
    ("scripts/bench/table.py", "flat lines"): "a title in recorded results",
    ("scripts/quickstart_text.py", ".*"): "training text, in which goods stand on shelves",
    ("peftcli/results/training.py", ".*levers.*"): "a key of `train.json` in schema 1",
    ("peftcli/results/plan.py", "mends|card|Schema 1 has .*"): "keys of `plan.json` in schema 1",
}
"""Exceptions: a file and a regular expression of a whole string, comment or line of it, and the reason."""

WORDS = {re.compile(rf"\b(?:{word})\b", re.IGNORECASE): plain for word, plain in PLAIN.items()}


def main() -> None:
    """Print the words that are found, each with its file and line, and exit with 1 if there are any."""
    found = [line for file in files() for line in problems(file)]
    sys.exit("\n".join(found) or 0)


def files(root: Path = ROOT) -> list[Path]:
    """The files to check, in order."""
    skipped = [root / name for name in UNCHECKED]
    return sorted(
        file
        for name in CHECKED
        for file in (*root.glob(name), *root.glob(f"{name}/**/*"))
        if file.suffix in (".py", ".md") and not any(file.is_relative_to(one) for one in skipped)
    )


def problems(file: Path, root: Path = ROOT) -> list[str]:
    """One line for each word of the table in a file."""
    name = file.relative_to(root).as_posix()
    allowed = [re.compile(text, re.DOTALL) for path, text in ALLOWED if path == name]
    texts = python_texts(file) if file.suffix == ".py" else markdown_texts(file)
    found = sorted(
        (first + text.count("\n", 0, match.start()), match[0], plain)
        for first, text in texts
        if not any(one.fullmatch(text) for one in allowed)
        for pattern, plain in WORDS.items()
        for match in pattern.finditer(text)
    )
    return [f"{name}:{line}: {word!r}: write {plain!r}" for line, word, plain in found]


def python_texts(file: Path) -> Iterator[tuple[int, str]]:
    """The strings, docstrings and comments of a Python file, each with its first line; identifiers are not read."""
    with tokenize.open(file) as stream:
        source = stream.read()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def markdown_texts(file: Path) -> Iterator[tuple[int, str]]:
    """The paragraphs of a Markdown file, each with its first line."""
    source = file.read_text(encoding="utf-8")
    for match in re.finditer(r"(?:.+\n?)+", source):
        yield source.count("\n", 0, match.start()) + 1, match[0]


if __name__ == "__main__":
    main()
