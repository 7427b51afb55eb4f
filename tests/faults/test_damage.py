"""Damage to the files that commands read: it is named, the exit code is one of the documented ones, nothing differs
silently."""

import random
from pathlib import Path

import pytest
from damage import HARMS, READERS, Healthy, Reader, harm_and_play
from workspace import Workspace

pytestmark = [
    pytest.mark.xdist_group("damage"),
    pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning"),
]
BY_NAME = {reader.name if reader.words[0] != "train" else reader.words[3]: reader for reader in READERS}
CHOSEN = [
    ("run", "run/eval.json", "remove", 3),
    ("run", "run/log.jsonl", "cut", 0),
    ("run", "run/metrics.json", "folder", 3),
    ("stopped", "stopped/rows.npz", "cut", 4),
    ("stopped", "stopped/eval.json", "folder", 4),
    ("stopped", "stopped/checkpoints/checkpoint-4/optimizer.pt", "flip", 0),
    ("unmeasured", "unmeasured/adapter/adapter_model.safetensors", "flip", 4),
    ("next", "run/adapter/adapter_config.json", "cut", 4),
    ("next", "run/adapter/adapter_model.safetensors", "flip", 4),
    ("eval run", "run/adapter/peftcli.json", "flip", 4),
    ("generate run/merged", "run/merged/model.safetensors", "flip", 4),
    ("report run", "run/eval.json", "flip", 3),
    ("report run", "run/plan.json", "unreadable", 4),
    ("compare run", "run/train.json", "cut", 3),
    ("compare run", "run/metrics.json", "remove", 0),
    ("data recipe.yaml", "base/model.safetensors", "folder", 4),
]
"""A reader, a file that it opens, a damage, and the exit code."""


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Healthy:
    """Runs in every state, and the figures that each command makes of them."""
    return Healthy(Workspace(tmp_path_factory.mktemp("damage") / "ground", tiny_llama))


@pytest.mark.parametrize(("name", "file", "harm", "code"), CHOSEN)
def test_damage_is_named_and_changes_no_figure_silently(
    healthy: Healthy, name: str, file: str, harm: str, code: int
) -> None:
    reader = BY_NAME[name]
    assert file in healthy.outcome(reader)[1]
    outcome, wrong = harm_and_play(healthy, reader, file, harm)
    assert wrong == [] and outcome.ended.code == code, outcome.ended.err


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: " ".join(reader.words))
def test_every_damage_to_every_file_is_noticed(healthy: Healthy, reader: Reader, harm: str) -> None:
    files = healthy.outcome(reader)[1]
    assert files
    wrong = {}
    for file in files:
        _, found = harm_and_play(healthy, reader, file, harm, random.Random(file + harm).random())
        if found:
            wrong[file] = found
    assert wrong == {}
