"""`make check` finds words that are not the field's where users and developers read them."""

from pathlib import Path

import pytest
import words

CLEAN = '''"""A model card, a stand-alone model and a stand-in."""

mend = told = 1  # identifiers are not read, except in comments
print(f"{mend} GPUs, {told} fixes")
'''


def found(root: Path, name: str, text: str) -> list[str]:
    """What the check says of a repository with one file."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")
    return [line for file in words.files(root) for line in words.problems(file, root)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("peftcli/a.py", 'X = 1\nY = f"{X}: the mend"\n', "peftcli/a.py:2: 'mend': write 'fix'"),
        ("peftcli/a.py", '"""First.\n\nStands in a file.\n"""\n', "peftcli/a.py:3: 'Stands': write 'is'"),
        ("peftcli/a.py", 'X = "held "\\\n    "against"\n', "peftcli/a.py:1: 'held against': write 'compared with'"),
        ("scripts/a.py", "X = 1\nY = 2  # read anew\n", "scripts/a.py:2: 'anew': write 'again'"),
        ("docs/a.md", "# A\n\nOn a\ncard.\n", "docs/a.md:4: 'card': write 'GPU'"),
        ("docs/b/a.md", "It is held\nagainst it.\n", "docs/b/a.md:1: 'held\\nagainst': write 'compared with'"),
        ("README.md", "No levers.\n", "README.md:1: 'levers': write 'optimization, setting'"),
    ],
    ids=["f-string", "docstring", "joined strings", "comment", "page", "line break", "readme"],
)
def test_a_planted_word_is_found_with_its_line_and_the_usual_word(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    assert found(tmp_path, name, text) == [message]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("peftcli/a.py", CLEAN),
        ("docs/a.md", "A model card, on a GPU.\n"),
        ("docs/a.css", "/* the card */\n"),
        ("scripts/quickstart_text.py", 'X = "it stood on the shelf"\n'),
        ("peftcli/results/plan.py", 'KEYS = ["mends"]\n'),
    ],
    ids=["Python", "Markdown", "another kind of file", "an allowed file", "an allowed string"],
)
def test_clean_text_and_exceptions_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setattr(words, "UNCHECKED", ())
    assert found(tmp_path, name, text) == []


def test_an_exception_covers_one_string_of_its_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "UNCHECKED", ())
    assert found(tmp_path, "peftcli/results/plan.py", 'KEYS = ["mends"]\nX = "the mend"\n') == [
        "peftcli/results/plan.py:2: 'mend': write 'fix'"
    ]


def test_unchecked_folders_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "UNCHECKED", ("peftcli/plan",))
    assert found(tmp_path, "peftcli/plan/a.py", '"""The mend."""\n') == []
    assert len(found(tmp_path, "peftcli/planner.py", '"""The mend."""\n')) == 1


def test_the_repository_passes() -> None:
    with pytest.raises(SystemExit) as exited:
        words.main()
    assert exited.value.code == 0, exited.value.code


def test_every_checked_and_unchecked_path_exists() -> None:
    names = [*words.CHECKED, *words.UNCHECKED, *(file for file, _ in words.ALLOWED)]
    assert [name for name in names if not (words.ROOT / name).exists()] == []
