"""Evaluation: a loss that no batch size changes, answers that stop, and targets of every kind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftcli.data.tokenize import IGNORED
from peftcli.metrics.language import chrf, exact_match
from peftcli.model.generation import Decoding, generate_answers
from peftcli.model.scoring import completion_nll, score
from peftcli.model.target import open_target
from peftcli.progress import Silent
from peftcli.run_dir import read_json, write_json

Cli = Callable[..., int]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One trained run for the module."""
    import yaml

    from peftcli.cli.main import main

    folder = tmp_path_factory.mktemp("evaluated")
    lines = ["thing,kind"] + [
        f"{size} {fruit} {n},{fruit} kind"
        for n in range(12)
        for size in ("big", "small")
        for fruit in ("apple", "pear")
    ]
    (folder / "things.csv").write_text("\n".join(lines))
    recipe = {
        "model": {"name": str(tiny_llama)},
        "quantization": {"bits": 4},
        "dataset": {"path": "things.csv", "prompt": "{thing} ->:", "completion": " {kind}", "max_length": 64},
        "trainer": {"max_steps": 40, "per_device_train_batch_size": 8, "learning_rate": 5e-3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(folder / "recipe.yaml"), "--output-dir", str(folder / "run")]) == 0
    return folder / "run"


def evaluated(capfd: Any, run_cli: Cli, *words: object) -> dict[str, Any]:
    capfd.readouterr()
    assert run_cli("eval", *words, "--json") == 0
    value: dict[str, Any] = json.loads(capfd.readouterr().out)
    return value


@pytest.mark.numeric
def test_the_loss_is_the_same_for_every_batch_size(run: Path, run_cli: Cli, capfd: Any) -> None:
    found = [evaluated(capfd, run_cli, run, "--set", f"evaluation.batch_size={rows}") for rows in (1, 3, 8)]
    for name in ("base", "adapter"):
        values = [value[name]["loss"] for value in found]
        assert values[1] == pytest.approx(values[0], abs=1e-6) and values[2] == pytest.approx(values[0], abs=1e-6)
        assert len({value[name]["exact_match"] for value in found}) == 1


@pytest.mark.numeric
def test_eval_of_a_fresh_process_repeats_what_train_measured(run: Path, run_cli: Cli, capfd: Any) -> None:
    before = read_json(run / "metrics.json")
    value = evaluated(capfd, run_cli, run)
    assert value["adapter"]["loss"] == pytest.approx(before["adapter"]["loss"], abs=1e-6)
    assert value["base"]["loss"] == pytest.approx(before["base"]["loss"], abs=1e-6)
    assert value["adapter"]["exact_match"] == before["adapter"]["exact_match"]


@pytest.mark.numeric
def test_an_adapter_a_merged_model_and_a_base_can_be_measured(
    run: Path, run_cli: Cli, capfd: Any, tiny_llama: Path
) -> None:
    assert run_cli("merge", run) == 0
    adapter = evaluated(capfd, run_cli, run / "adapter", "--no-base")
    merged = evaluated(capfd, run_cli, run / "merged")
    base = evaluated(capfd, run_cli, tiny_llama, "--recipe", run / "recipe.yaml")
    assert adapter["base"] is None or adapter["base"]["loss"] > adapter["adapter"]["loss"]
    assert merged["merged"]["loss"] == pytest.approx(adapter["adapter"]["loss"], abs=1e-4)
    assert base["base"]["loss"] == pytest.approx(read_json(run / "metrics.json")["base"]["loss"], abs=1e-6)


@pytest.mark.numeric
def test_the_loss_is_the_mean_over_trained_tokens(run: Path) -> None:
    from peftcli.cli.pipeline import plan_recipe, prepare_data
    from peftcli.recipe.load import load_recipe

    plan = plan_recipe(load_recipe(run / "recipe.yaml")).plan
    model, tokenizer = open_target(str(run)).load()
    _, data = prepare_data(plan, Silent())
    rows = data.test.select(["input_ids", "labels"])
    sums = score(model, rows, pad_id=tokenizer.pad_token_id, batch_rows=5, progress=Silent(), what="")
    total, count = 0.0, 0
    for row in rows.to_pylist():
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        chosen = labels[1:] != IGNORED
        total += torch.nn.functional.cross_entropy(logits[chosen], labels[1:][chosen], reduction="sum").item()
        count += int(chosen.sum())
    assert sums.tokens == count
    assert sums.nll / sums.tokens == pytest.approx(total / count, abs=1e-6)


def test_answers_do_not_depend_on_the_batch_and_keep_the_order(run: Path) -> None:
    model, tokenizer = open_target(str(run)).load()
    prompts = tokenizer(["big apple 3 ->:", "small pear 10 ->:", "a ->:"])["input_ids"]
    ends = frozenset({tokenizer.eos_token_id})
    made = [
        generate_answers(
            model, tokenizer, prompts, stop_ids=ends, decoding=Decoding(8), batch_rows=rows, progress=Silent(), what=""
        )
        for rows in (1, 3)
    ]
    assert made[0] == made[1]
    assert [one.text.strip() for one in made[0]][:2] == ["apple kind", "pear kind"]
    assert all(one.finished for one in made[0])


@pytest.mark.numeric
def test_an_answer_that_is_cut_off_is_unfinished(run: Path) -> None:
    model, tokenizer = open_target(str(run)).load()
    prompts = tokenizer(["big apple 3 ->:"])["input_ids"]
    state = torch.get_rng_state()
    one = generate_answers(
        model,
        tokenizer,
        prompts,
        stop_ids=frozenset({tokenizer.eos_token_id}),
        decoding=Decoding(1, temperature=1.0),
        batch_rows=1,
        progress=Silent(),
        what="",
    )[0]
    assert not one.finished
    assert torch.equal(state, torch.get_rng_state()), "sampling must not move the training's random state"


@pytest.mark.numeric
def test_sums_count_only_trained_tokens() -> None:
    logits = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 9.0]])
    nll, tokens, correct = completion_nll(logits, torch.tensor([0, 0, IGNORED]))
    assert (int(tokens), int(correct)) == (2, 2)
    assert float(nll) == pytest.approx(0.6931472 + 0.0067153, abs=1e-6)


@pytest.mark.numeric
def test_metrics_of_answers() -> None:
    assert exact_match(["a", "b ", "c"], [" a", "b", "d"]) == pytest.approx(2 / 3)
    assert chrf(["dairy"], ["frozen"]) < chrf(["froze"], ["frozen"]) < 100


def test_generate_writes_prompts_as_training_did(run: Path, run_cli: Cli, capfd: Any, tmp_path: Path) -> None:
    capfd.readouterr()
    assert run_cli("generate", run, "big apple 77", "--json") == 0
    made = json.loads(capfd.readouterr().out)
    assert made["prompt"] == "big apple 77 ->:" and made["answer"].strip() == "apple kind" and made["finished"]
    (tmp_path / "prompts.txt").write_text('small pear 5\n\n{"thing": "big pear 6"}\n')
    assert run_cli("generate", run / "adapter", "--file", tmp_path / "prompts.txt") == 0
    assert capfd.readouterr().out.splitlines() == ["small pear 5\tpear kind", '{"thing": "big pear 6"}\tpear kind']
    assert run_cli("generate", run, '{"name": "x"}') == 2
    assert "give a JSON object such as" in capfd.readouterr().err
    assert run_cli("generate", run, "--file", tmp_path / "none.txt") == 2
    (tmp_path / "empty.txt").write_text("\n")
    assert run_cli("generate", run, "--file", tmp_path / "empty.txt") == 3


def test_targets_that_are_nothing_name_the_mend(run_cli: Cli, capfd: Any, tmp_path: Path, tiny_llama: Path) -> None:
    assert run_cli("eval", "nowhere") == 2
    assert "no such folder; for a base model, pass --recipe" in capfd.readouterr().err
    assert run_cli("eval", tiny_llama) == 2
    assert "for a base model, pass --recipe" in capfd.readouterr().err
    assert run_cli("generate", tmp_path, "x") == 2
    assert "not a run folder" in capfd.readouterr().err


def test_an_adapter_on_another_base_is_refused(run: Path, run_cli: Cli, capfd: Any, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    identity = copy / "adapter" / "peftcli.json"
    value = read_json(identity)
    value["base"]["config_sha256"] = "0" * 64
    write_json(identity, value)
    assert run_cli("generate", copy, "x") == 4
    assert "differs from the one at" in capfd.readouterr().err
