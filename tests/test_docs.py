"""README and docs: current, valid, runnable; what they name exists."""

import ast
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from bench import table
from cli_reference import cli_reference
from methods_table import page as methods_page
from recipe_reference import attribute_docstrings, recipe_reference
from typer.main import get_command

from peftcli.cli.main import app
from peftcli.methods.registry import METHODS
from peftcli.recipe.best_model import EARLY_STOPPING
from peftcli.recipe.library_args import installed_arguments, recipe_arguments
from peftcli.recipe.load import load_recipe
from peftcli.recipe.schema import Recipe

Cli = Callable[..., int]
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
SHIPPED = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
COMMANDS: Any = get_command(app)
GENERATED = ("recipe.md", "cli.md")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), flags=re.M | re.S)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S)


def code_spans(page: Path) -> list[str]:
    """What a page writes between single backticks, line breaks as spaces."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def cells(notebook: Path, kind: str = "code") -> list[str]:
    found = json.loads(text_of(notebook))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def command_lines() -> Iterator[tuple[str, str]]:
    """Every peftcli command of the pages and notebooks: where it is, and its words after `peftcli`."""
    for page in PAGES:
        lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
        found = [match[1] for line in lines if (match := re.match(r"(?:.* -m )?peftcli (.+?)(?:\s+#.*)?$", line))]
        if page.name not in GENERATED:
            found += [span.removeprefix("peftcli ") for span in code_spans(page) if span.startswith("peftcli ")]
        yield from ((page.name, line) for line in found)
    for notebook in NOTEBOOKS:
        lines = [line for cell in cells(notebook) for line in cell.splitlines()]
        yield from ((notebook.name, line.removeprefix("!peftcli ")) for line in lines if line.startswith("!peftcli "))


def slug(heading: str) -> str:
    """The id of a heading, as GitHub and MkDocs make it."""
    plain = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", plain))


def schema_keys(section: type[Any] = Recipe, path: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        whole = f"{path}.{name}" if path else name
        yield whole
        for found in _sections(field.annotation):
            yield from schema_keys(found, whole)


def _sections(annotation: Any) -> Iterator[type[Any]]:
    if hasattr(annotation, "model_fields"):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _sections(inner)


def test_the_readme_has_at_most_150_lines() -> None:
    assert len(text_of(README).splitlines()) <= 150


def test_the_recipe_reference_is_current() -> None:
    assert text_of(DOCS / "recipe.md") == recipe_reference(), "python scripts/recipe_reference.py --write"


def test_the_command_reference_is_current() -> None:
    pinned = re.search(r"^typer==(\S+)$", text_of(ROOT / "constraints.txt"), re.MULTILINE)
    assert pinned is not None
    if version("typer") != pinned[1]:
        pytest.skip("the page has the metavars of the pinned typer")
    assert text_of(DOCS / "cli.md") == cli_reference(), "python scripts/cli_reference.py --write"


def test_the_tables_of_methods_are_current() -> None:
    assert text_of(DOCS / "methods.md") == methods_page(), "python scripts/methods_table.py --write"


def test_the_tables_of_benchmarks_are_current() -> None:
    results = table.HERE / "results"
    expected = table.replaced(table.PAGE, table.BENCHMARKS, table.page_lines(results))
    assert text_of(table.PAGE) == expected, "python scripts/bench/table.py"


def test_the_recipe_reference_gives_every_key_a_meaning() -> None:
    page = text_of(DOCS / "recipe.md")
    for section, field in Recipe.model_fields.items():
        assert f"| `{section}` |" in page, section
        for model in _sections(field.annotation):
            meanings = attribute_docstrings(model)
            for key in model.model_fields:
                assert meanings.get(key) or list(_sections(model.model_fields[key].annotation)), f"{section}.{key}"


def test_the_readme_shows_the_quickstart_as_it_is() -> None:
    shown = re.search(r"<!-- recipe:quickstart -->\n```yaml\n(.*?)```", text_of(README), flags=re.S)
    assert shown is not None
    assert shown[1] == text_of(ROOT / "recipes" / "quickstart.yaml")


def test_every_shipped_recipe_is_named_by_readme_and_quickstart() -> None:
    for name in SHIPPED:
        assert f"`{name}`" in text_of(README) or f"train {name}" in text_of(README), name
        assert f"`{name}`" in text_of(DOCS / "quickstart.md"), name


def test_the_readme_names_every_command() -> None:
    for name in COMMANDS.commands:
        assert re.search(rf"^peftcli {name}\b", text_of(README), flags=re.M), name


@pytest.mark.parametrize(("where", "line"), sorted(set(command_lines())))
def test_a_command_is_understood(where: str, line: str) -> None:
    words = shlex.split(line.replace("…", "x"))
    assert words[0] in COMMANDS.commands, f"{where}: peftcli {line}"
    if len(words) == 1 and where not in [notebook.name for notebook in NOTEBOOKS]:
        return  # a page speaks of the command
    COMMANDS.commands[words[0]].make_context(words[0], words[1:])


@pytest.mark.parametrize(
    ("where", "block"), [(page.name, block) for page in PAGES for block in blocks(page, "yaml")], ids=str
)
def test_a_recipe_is_valid_without_a_notice(where: str, block: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(block, encoding="utf-8")
    assert load_recipe(path).notices == (), where


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_recipe_key_that_a_page_names_exists(page: Path) -> None:
    keys = set(schema_keys())
    arguments = {*(installed_arguments() or ()), *EARLY_STOPPING}
    adapter = {name for method in METHODS for name in recipe_arguments(method)}
    for span in code_spans(page):
        match = re.match(
            r"(model|quantization|adapter|dataset|trainer|performance|evaluation|budget|report)\.[\w.]+", span
        )
        if match is None or match[0].endswith((".json", ".md", ".html", ".txt", ".yaml")):
            continue
        section, _, name = match[0].partition(".")
        known = match[0] in keys or (section, name) in {("trainer", one) for one in arguments}
        assert known or (section == "adapter" and name in adapter), match[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.is_file(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(file), flags=re.M)
            assert anchor in map(slug, headings), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load(text_of(ROOT / "mkdocs.yml"))
    listed = re.findall(r"[\w-]+\.md", json.dumps(config["nav"]))
    assert sorted(listed) == sorted(page.name for page in PAGES if page != README)


def package_texts() -> list[str]:
    """Every string of the package's code, with … for what is filled in."""
    found = []
    for file in (ROOT / "peftcli").rglob("*.py"):
        for node in ast.walk(ast.parse(text_of(file))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return package_texts()


@pytest.mark.parametrize(
    "message", re.findall(r"^### `(.+)`$", text_of(DOCS / "troubleshooting.md"), flags=re.M), ids=lambda text: text[:40]
)
def test_a_message_of_the_troubleshooting_page_is_one_of_the_code(message: str, texts: list[str]) -> None:
    parts = [part.strip() for part in message.split("…") if len(part.strip(" :;,.()[]")) > 3]
    assert parts
    for part in parts:
        assert any(part in text for text in texts), part


def test_the_troubleshooting_page_has_the_likeliest_errors() -> None:
    assert len(re.findall(r"^### ", text_of(DOCS / "troubleshooting.md"), flags=re.M)) >= 30


def test_the_quickstart_commands_run(run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for line in (
        "validate quickstart",
        "methods",
        "methods lora",
        "plan quickstart --gpu t4",
        "data quickstart --smoke",
    ):
        assert run_cli(*line.split()) == 0, line
    assert run_cli("train", "quickstart", "--smoke") == 0
    capfd.readouterr()
    run = tmp_path / "runs" / "quickstart-smoke"
    page = text_of(DOCS / "run-folder.md")
    metrics = json.loads(text_of(run / "metrics.json"))
    section = page.partition("## metrics.json")[2].partition("\n## ")[0]
    for row in re.findall(r"^\| (`.+?) \| (.+) \|$", section, flags=re.M):
        for key in re.findall(r"`(\w+)`", row[0]):
            assert key in metrics, key
            if isinstance(metrics[key], dict) and key not in ("base", "adapter"):
                assert set(re.findall(r"`(\w+)`", row[1])) <= set(metrics[key]), key
    documented = re.findall(r"^  (\S+(?: \S+)?)  ", page, flags=re.M)
    names = {name.split("/")[0] for cell in documented for name in cell.split()}
    assert {path.name for path in run.iterdir()} <= names | {".lock"}
    for name, keys in re.findall(r"^\| `(\w+\.json)` \| (.+) \|$", page, flags=re.M):
        if name != "merge.json":
            found = json.loads(text_of(run / name))
            top = re.sub(r"\([^)]*\)", "", keys)
            assert set(re.findall(r"`(\w+)`", top)) <= set(found), name


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(notebook: Path) -> None:
    for cell in json.loads(text_of(notebook))["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_with_the_tiny_model(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    found = nbformat.read(notebook, as_version=4)
    parameters = next(cell for cell in found.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source += '\nMODEL = "tiny:llama"\nMAX_STEPS = 4\nTIME_BUDGET = "10min"'
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    NotebookClient(found, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in found.cells for output in cell.get("outputs", ()))
    assert "error:" not in printed, printed
    metrics = json.loads(text_of(tmp_path / "runs" / "tickets" / "metrics.json"))
    assert metrics["status"] == "finished" and metrics["train"]["steps"] == 4
    assert metrics["merge"]["top1_agreement"] is not None
    assert (tmp_path / "adapter.zip").is_file()
    assert any("text/html" in output.get("data", {}) for cell in found.cells for output in cell.get("outputs", ()))
