"""`--version`, and `-h` for every command."""

import importlib.metadata
import platform

import pytest
from typer.main import get_command

from peftcli.cli.doctor import ask_all
from peftcli.cli.main import app, main
from peftcli.doctor.packages import version_lines

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")
COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]


def test_the_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"peftcli {importlib.metadata.version('peftcli')}\n"


@pytest.mark.parametrize("words", [["--version", "--verbose"], ["--verbose", "--version"]])
def test_verbose_names_python_and_the_libraries(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(words) == 0
    expected = {"peftcli": importlib.metadata.version("peftcli"), "python": platform.python_version()}
    expected |= {name: importlib.metadata.version(name) for name in PACKAGES}
    assert capsys.readouterr().out.splitlines() == [f"{name} {version}" for name, version in expected.items()]


def test_doctor_begins_with_the_same_versions() -> None:
    first = next(iter(ask_all(None)))
    assert first.found.startswith(", ".join(version_lines()) + "; ")


def test_a_package_that_is_missing_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("peftcli", "trl"):
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    lines = version_lines()
    assert lines[0] == "peftcli (not installed)" and "trl missing" in lines


def test_verbose_alone_and_no_command_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--verbose", "methods"]) == 2
    assert "run `peftcli --version --verbose`" in capsys.readouterr().err
    assert main(["--"]) == 2
    assert "no command given" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=["peftcli", *COMMANDS])
def test_h_is_help_everywhere(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main([*words, "-h"]) == 0
    short = capsys.readouterr().out
    assert main([*words, "--help"]) == 0
    assert short == capsys.readouterr().out and short.startswith("Usage: peftcli")
