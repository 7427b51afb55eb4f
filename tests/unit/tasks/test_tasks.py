"""The table of tasks: complete, the only place that knows their names, and enough to add a task."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from peft import TaskType

import peftcli
from peftcli.methods.registry import METHODS
from peftcli.tasks.base import Task, implementation
from peftcli.tasks.registry import TASKS, find_task

PACKAGE = Path(peftcli.__file__).parent
REFERENCES = ("row_format", "arguments", "trainer", "batches", "predict")
DUMMY = '''
"""A task of its own in one file: the sentiment of a text as a number, with a loss title of its own."""
from dataclasses import replace
from peftcli.tasks import registry
from peftcli.tasks.sequence_classification import SEQUENCE_CLASSIFICATION

registry.TASKS["sentiment"] = replace(
    SEQUENCE_CLASSIFICATION, name="sentiment", short="sentiment", aliases=("mood",), loss_title="Loss per review"
)

if __name__ == "__main__":
    from peftcli.cli.main import main
    main()
'''
RECIPE = """\
name: sentiment
model: {name: "tiny:llama", task: TASK}
dataset: {path: rows.csv, split: {test_size: 8}}
adapter: {r: 2}
trainer: {max_steps: 2, per_device_train_batch_size: 4}
"""


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_all_that_a_task_refers_to_exists(task: Task) -> None:
    for reference in filter(None, (getattr(task, name) for name in REFERENCES)):
        assert callable(implementation(reference)), reference
    assert hasattr(transformers, task.auto_class)
    assert task.peft_type is None or task.peft_type in TaskType.__members__
    assert bool(task.predict) != task.generates
    assert bool(task.baseline) != task.generates


@pytest.mark.parametrize("name", [None, "causal-lm", "causal", 3, [], {}])
def test_a_task_is_found_by_what_a_recipe_says_also_where_that_is_wrong(name: object) -> None:
    found = find_task(name)
    assert (found is not None) == (name in (None, "causal-lm"))


def compared_names(tree: ast.AST, names: frozenset[str]) -> Iterator[int]:
    """Lines of comparisons and match cases in which a name is written out."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Compare, ast.MatchValue)):
            written = {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)} & names
            yield from [node.lineno] * bool(written)


def test_the_search_for_compared_names_finds_one() -> None:
    tree = ast.parse('if plan.task == "causal-lm" or method.name in ("lora", "full"):\n    pass')
    assert list(compared_names(tree, frozenset({"causal-lm"}))) == [1]
    assert list(compared_names(tree, frozenset({"lora"}))) == [1]
    assert not list(compared_names(ast.parse('given.get("method", "lora")'), frozenset({"lora"})))


def test_no_module_outside_their_tables_compares_the_name_of_a_task_or_a_method() -> None:
    names = frozenset(TASKS) | frozenset(METHODS) - {"full", "prompt"}  # also words of recipes and rows
    found = [
        f"{file.relative_to(PACKAGE)}:{line}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if file.relative_to(PACKAGE).parts[0] not in ("tasks", "methods")
        for line in compared_names(ast.parse(file.read_text(encoding="utf-8")), names)
    ]
    assert not found


def test_a_task_is_added_in_one_file(tmp_path: Path) -> None:
    (tmp_path / "sentiment.py").write_text(DUMMY)
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"row {n} is {'good' if n % 2 else 'bad'},{n % 2}\n" for n in range(40))
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("TASK", "sentiment"))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "sentiment.py", *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    done = run("train", "recipe.yaml", "--output-dir", "run")
    assert done.returncode == 0, done.stderr
    assert "Loss per review" in (tmp_path / "run" / "report.md").read_text()
    labeled = run("generate", "run", "row 3 is good")
    assert labeled.returncode == 0, labeled.stderr
    assert labeled.stdout.split()[0] in ("0", "1")
    recipe.write_text(RECIPE.replace("TASK", "mood"))
    assert "did you mean sentiment?" in run("validate", "recipe.yaml").stderr
