"""Real data sets, each by a fragment of a recipe: the rows that their pages state are the rows that are counted."""

import re
from pathlib import Path

import pytest

from peftcli.cli.pipeline import inspect_data
from peftcli.data.prepare import PreparedData
from peftcli.progress import Silent
from peftcli.recipe.load import load_recipe

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")

# Name: the keys of the dataset section, rows in all, and the kind of the examples.
FRAGMENTS: dict[str, tuple[str, int, str]] = {
    "instacart": (
        """
        path: instacart-products/products.csv
        join: [{path: instacart-products/departments.csv, on: department_id},
               {path: instacart-products/aisles.csv, on: aisle_id}]
        prompt: "{product_name} ->:"
        completion: " {department}, {aisle}"
        """,
        49_688,
        "prompt_completion",
    ),
    "gsm8k": ("path: gsm8k/train.jsonl\ntest: {path: gsm8k/test.jsonl}", 7_473 + 1_319, "messages"),
    "instruct": ("path: instruct-llmfs/instruction-data.json", 1_100, "messages"),
    "seed-tasks": (
        """
        path: seed-tasks/seed_tasks.jsonl
        prompt: "{instruction}\\n{instances.0.input}\\n"
        completion: "{instances.0.output}"
        """,
        175,
        "prompt_completion",
    ),
    "sgd": ("path: sgd-chat/train.messages.jsonl\ntest: {path: sgd-chat/test.messages.jsonl}", 1_128, "messages"),
    "sharegpt": ("path: sgd-chat/sample200.sharegpt.json", 200, "messages"),
    "sms-spam": (
        """
        path: sms-spam/SMSSpamCollection
        file_format: tsv
        csv: {column_names: [label, text], quote: none}
        prompt: "{text}\\nlabel:"
        completion: " {label}"
        """,
        5_574,
        "prompt_completion",
    ),
    "sst2": (
        """
        path: sst2/train_6000.tsv
        test: {path: sst2/dev.tsv}
        prompt: "{sentence} ->"
        completion: " {label}"
        """,
        6_872,
        "prompt_completion",
    ),
    "superbowl": (
        "path: superbowl-prompt-completion/train.jsonl\ntest: {path: superbowl-prompt-completion/valid.jsonl}",
        1_944,
        "prompt_completion",
    ),
    "the-verdict": ("path: the-verdict/the-verdict.txt", 1, "text"),
    "tinyshakespeare": ("path: tinyshakespeare/input.txt", 18, "text"),
    "tinystories-list": ("path: tinystories/tinystories_1000.json", 1_000, "text"),
    "tinystories": ("path: tinystories/tinystories_clean.jsonl", 917, "text"),
    "wikisql": ("path: wikisql-text/train.jsonl\ntest: {path: wikisql-text/test.jsonl}", 1_100, "text"),
    "wikitext-2": ("path: wikitext-2/valid.txt\ntest: {path: wikitext-2/test.txt}", 38, "text"),
    "wnut17": (
        """
        path: wnut17/wnut17train.conll
        test: {path: wnut17/emerging.dev.conll}
        prompt: "{tokens} ->"
        completion: " {tags}"
        """,
        4_403,
        "prompt_completion",
    ),
}


def look(folder: Path, fragment: str, model: Path, more: str = "") -> PreparedData:
    lines = [line.strip() for line in f"{fragment}\nmax_length: 512\n{more}".strip().splitlines()]
    dataset = re.sub(r"\bpath: ([\w-]+/)", rf"path: {SHARED}/\1", "\n".join(f"  {line}" for line in lines))
    path = folder / "recipe.yaml"
    path.write_text(f"model: {{name: {model}}}\ndataset:\n{dataset}\n")
    return inspect_data(load_recipe(path).recipe, Silent(), smoke=False, preview=1)


@pytest.mark.parametrize("name", FRAGMENTS)
def test_the_rows_of_a_real_data_set_are_those_that_it_states(name: str, tmp_path: Path, tiny_llama: Path) -> None:
    fragment, rows, kind = FRAGMENTS[name]
    data = look(tmp_path, fragment, tiny_llama)
    facts = data.facts
    assert (facts["rows"], facts["format"]) == (rows, kind)
    if kind != "text":
        assert facts["train_rows"] + facts["test_rows"] + facts["dropped_rows"] == rows
    assert facts["eos_trained_rows"] == facts["eos_expected_rows"]
    assert sum(part["kind"] == "trained" for part in facts["preview"][0]["parts"]) >= 1
    assert not any(check["result"] == "fail" for check in facts["checks"])


def test_what_is_wrong_with_real_data_is_found(tmp_path: Path, tiny_llama: Path) -> None:
    spam = look(tmp_path, FRAGMENTS["sms-spam"][0], tiny_llama)
    assert spam.facts["leaked_rows"] > 0.05 * spam.facts["test_rows"]  # hundreds of its messages stand there twice
    assert any("dataset.deduplicate" in line for line in spam.crossed)
    assert spam.facts["labels"]["train"].keys() == {"ham", "spam"}
    clean = look(tmp_path, FRAGMENTS["sms-spam"][0], tiny_llama, "deduplicate: true")
    assert clean.facts["leaked_rows"] == 0 and not clean.crossed
    stories = look(tmp_path, FRAGMENTS["tinystories-list"][0], tiny_llama)
    assert any("wrongly decoded" in line for line in stories.facts["warnings"])
    products = look(tmp_path, FRAGMENTS["instacart"][0], tiny_llama)
    assert products.facts["labels"] is None or "missing" not in products.facts["dropped"]
    assert products.facts["dropped_rows"] == 0  # the department that is called missing is a name as any other
