"""Identity: an adapter is used on the base, with the tokenizer and the tensors that it was trained with, or not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peftcli.cli.main import main
from peftcli.errors import MachineError
from peftcli.model.files import base_facts
from peftcli.model.manifest import BaseLocation, base_of
from peftcli.model.target import open_target
from peftcli.run_dir import read_json, write_json

Cli = Callable[..., int]
WEIGHTS = Path("run") / "adapter" / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with its base, data, recipe and run, all with relative paths; tests copy it."""
    project = tmp_path_factory.mktemp("identity") / "project"
    shutil.copytree(tiny_llama, project / "base")
    rows = [
        f"{size} {fruit} {n},{fruit} kind" for n in range(6) for size in ("big", "old") for fruit in ("fig", "pear")
    ]
    (project / "things.csv").write_text("\n".join(["thing,kind", *rows]))
    recipe = {
        "model": {"name": "./base"},
        "quantization": {"bits": 4},
        "adapter": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "dataset": {"path": "things.csv", "prompt": "{thing} ->:", "completion": " {kind}", "max_length": 32},
        "trainer": {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 5e-3},
        "evaluation": {"max_new_tokens": 2, "samples": 1, "baseline": False},
    }
    (project / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(project / "recipe.yaml"), "--output-dir", str(project / "run")]) == 0
    assert main(["merge", str(project / "run")]) == 0
    return project


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained project, with the original out of reach."""
    copy = tmp_path / "moved" / "project"
    shutil.copytree(trained, copy)
    identity = copy / "run" / "adapter" / "peftcli.json"
    found = read_json(identity)
    assert found["base"]["path"] == str(trained / "base") and found["base"]["beside"] == "../../base"
    # As if the project had been moved: what the recorded path held is gone.
    write_json(identity, found | {"base": found["base"] | {"path": str(tmp_path / "gone" / "base")}})
    return copy


def random_base(seed: int, like: Path, folder: Path, **changes: int) -> Path:
    """A random model of the same shape, beside the same tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(like)
    for name, value in changes.items():
        setattr(config, name, value)
    if folder != like:
        shutil.copytree(like, folder)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def refusal(run_cli: Cli, capfd: Any, run: Path) -> str:
    """The one sentence with which all three commands refuse a run."""
    said = set()
    for words in (("eval", run), ("merge", run), ("generate", run, "x")):
        capfd.readouterr()
        assert run_cli(*words) == 4, words
        error = capfd.readouterr().err
        assert len(error.splitlines()) == 1 and "Traceback" not in error and error.startswith("error: "), error
        said.add(error)
    assert len(said) == 1
    return str(said.pop())


def said_of(path: Path) -> str:
    """The sentence with which a target is refused when it is opened."""
    with pytest.raises(MachineError) as caught:
        open_target(str(path))
    return str(caught.value)


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.numeric
def test_a_moved_project_evaluates_merges_and_generates(project: Path, run_cli: Cli, capfd: Any) -> None:
    before = read_json(project / "run" / "metrics.json")["adapter"]["loss"]
    capfd.readouterr()
    assert run_cli("eval", project / "run", "--json") == 0
    assert json.loads(capfd.readouterr().out)["adapter"]["loss"] == pytest.approx(before, abs=1e-6)
    assert run_cli("merge", project / "run") == 0
    assert run_cli("eval", project / "run" / "merged") == 0
    for target in ("run", "run/adapter", "run/merged"):
        assert run_cli("generate", project / target, "big fig 7") == 0


def test_a_base_that_moved_alone_is_found_by_the_recipe(project: Path, run_cli: Cli, capfd: Any) -> None:
    shutil.move(project / "base", project / "models" / "base")
    run = project / "run"
    assert "no longer there; put it back, or pass its new location with --model" in said_of(run)
    text = (run / "recipe.yaml").read_text()
    assert "../base" in text
    (run / "recipe.yaml").write_text(text.replace("../base", "../models/base"))
    assert run_cli("generate", run, "x") == 0
    again = (project / "recipe.yaml").read_text().replace("./base", "./models/base")
    (project / "recipe.yaml").write_text(again)
    shutil.move(run / "adapter", project / "alone")
    assert run_cli("eval", project / "alone", "--recipe", project / "recipe.yaml", "--no-base") == 0


def test_two_random_bases_of_one_shape_are_told_apart(tiny_llama: Path, tmp_path: Path) -> None:
    found = [base_facts(str(random_base(seed, tiny_llama, tmp_path / str(seed))), None) for seed in (1, 2)]
    assert found[0].config_sha256 == found[1].config_sha256 is not None
    assert found[0].embedding_rows == found[1].embedding_rows == 1024
    assert found[0].weights_sha256 != found[1].weights_sha256
    assert base_facts(str(random_base(1, tiny_llama, tmp_path / "again")), None) == found[0]


def test_one_changed_projection_of_a_base_shows_in_its_hash(tiny_llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama, copy)
    assert base_facts(str(copy), None) == base_facts(str(tiny_llama), None)
    edit_tensors(copy / "model.safetensors", lambda all: all["model.layers.0.self_attn.v_proj.weight"].mul_(1.5))
    assert base_facts(str(copy), None).weights_sha256 != base_facts(str(tiny_llama), None).weights_sha256


def test_another_base_of_the_same_shape_is_refused(project: Path, run_cli: Cli, capfd: Any) -> None:
    random_base(3, project / "base", project / "base")
    said = refusal(run_cli, capfd, project / "run")
    assert f"{project / 'base'}: has the same shape, but its weights differ from those at training" in said


def test_another_base_in_the_recipe_for_an_adapter_is_refused(project: Path, run_cli: Cli, capfd: Any) -> None:
    random_base(4, project / "base", project / "other")
    recipe = project / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("./base", "./other"))
    capfd.readouterr()
    assert run_cli("eval", project / "run" / "adapter", "--recipe", recipe) == 4
    assert f"{project / 'other'}: has the same shape, but its weights differ" in capfd.readouterr().err


def test_a_config_written_anew_passes_and_a_changed_one_does_not(project: Path, run_cli: Cli, capfd: Any) -> None:
    file = project / "base" / "config.json"
    config = json.loads(file.read_text())
    unsaid = {"transformers_version": "4.0.0", "_name_or_path": "elsewhere"}
    file.write_text(json.dumps(unsaid | dict(reversed((config | unsaid).items()))))
    open_target(str(project / "run"))
    file.write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert "its config.json differs from the one at training" in refusal(run_cli, capfd, project / "run")


def test_a_resized_vocabulary_is_refused_with_both_numbers(project: Path, run_cli: Cli, capfd: Any) -> None:
    random_base(5, project / "base", project / "base", vocab_size=1000)
    said = refusal(run_cli, capfd, project / "run")
    assert "its embedding has 1000 rows, but the base that the adapter was trained on had 1024" in said


def test_a_tokenizer_that_outgrew_the_embedding_is_refused_with_both_numbers(
    project: Path, run_cli: Cli, capfd: Any
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(project / "run" / "adapter")
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(project / "run" / "adapter")
    said = refusal(run_cli, capfd, project / "run")
    assert "its embedding has 1024 rows, but the adapter's tokenizer needs 1026" in said


@pytest.mark.parametrize("target", ["run", "run/adapter", "run/merged"])
def test_one_changed_character_of_the_chat_template_is_refused(project: Path, target: str) -> None:
    folder = project / "run" / ("merged" if target == "run/merged" else "adapter")
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("'<|'", "'<!'", 1))
    expected = "the chat template was changed after training (chat_template.jinja); restore what training wrote"
    assert said_of(project / target) == f"{folder}: {expected}"


@pytest.mark.parametrize("target", ["run", "run/merged"])
def test_one_changed_character_of_the_tokenizer_is_refused(project: Path, target: str) -> None:
    folder = project / "run" / ("merged" if target == "run/merged" else "adapter")
    file = folder / "tokenizer.json"
    text = file.read_text()
    token = next(name for name in reversed(json.loads(text)["model"]["vocab"]) if name.isalpha() and len(name) > 3)
    file.write_text(text.replace(f'"{token}":', f'"{token[:-1]}#":', 1))
    said = said_of(project / target)
    assert f"{folder}: the tokenizer was changed after training (tokenizer.json); restore" in said
    file.write_text(text[: len(text) // 2])
    assert f"{folder}: the tokenizer was changed after training (tokenizer.json); restore" in said_of(project / target)
    file.unlink()
    assert "the tokenizer" in said_of(project / target)


def test_all_three_commands_refuse_a_changed_template(project: Path, run_cli: Cli, capfd: Any) -> None:
    (project / "run" / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    assert "the chat template was changed after training" in refusal(run_cli, capfd, project / "run")


def test_tokenizer_files_that_were_only_written_anew_pass(project: Path) -> None:
    file = project / "run" / "adapter" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    (project / "run" / "adapter" / "notes.txt").write_text("mine")
    open_target(str(project / "run"))


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in sorted(tensors) if "lora_B" in name)]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.stray.lora_A.weight"] = torch.ones(2, 2)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in sorted(tensors) if "lora_A" in name)
    tensors[name] = tensors[name][:2].clone()


def poison(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop, ("lacks base_model.model.model.layers.0.", "tensors that training wrote; restore the file")),
        (add, ("contains base_model.model.stray.lora_A.weight, which training did not write",)),
        (reshape, ("lora_A.weight is F32 2x128, but training wrote F32 4x128",)),
        (poison, ("has values that are not finite",)),
    ],
)
def test_a_tensor_that_was_changed_is_refused(
    project: Path, run_cli: Cli, capfd: Any, change: Callable[..., object], said: tuple[str, ...]
) -> None:
    edit_tensors(project / WEIGHTS, change)
    error = refusal(run_cli, capfd, project / "run")
    assert str(WEIGHTS) in error and all(part in error for part in said), error


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_a_file_that_was_cut_off_is_refused(project: Path, run_cli: Cli, capfd: Any, keep: int) -> None:
    file = project / WEIGHTS
    content = file.read_bytes()[:keep]
    file.write_bytes(content)
    assert f"truncated or damaged, {len(content)} bytes" in refusal(run_cli, capfd, project / "run")


def test_a_pickled_adapter_is_refused_by_name(project: Path, run_cli: Cli, capfd: Any) -> None:
    torch.save(load_file(project / WEIGHTS), project / "run" / "adapter" / "adapter_model.bin")
    open_target(str(project / "run"))
    (project / WEIGHTS).unlink()
    said = refusal(run_cli, capfd, project / "run")
    assert "adapter_model.bin: a pickle" in said and "only read from safetensors" in said


def test_a_damaged_identity_or_configuration_is_refused(project: Path, run_cli: Cli, capfd: Any) -> None:
    adapter = project / "run" / "adapter"
    for name in ("adapter_config.json", "peftcli.json"):
        text = (adapter / name).read_text()
        (adapter / name).write_text(text[:40])
        assert f"{adapter / name}: damaged" in refusal(run_cli, capfd, project / "run")
        (adapter / name).write_text(text)
    write_json(adapter / "peftcli.json", {"kind": "adapter", "base": {"name": "x"}})
    assert "damaged, lacks attention, " in said_of(adapter)


@pytest.mark.numeric
def test_an_identity_of_the_first_schema_checks_what_it_recorded(project: Path, run_cli: Cli) -> None:
    import hashlib

    file = project / "run" / "adapter" / "peftcli.json"
    found = read_json(file)
    for key in ("tokenizer", "tensors"):
        del found[key]
    for key in ("weights_sha256", "embedding_rows", "commit", "beside"):
        del found["base"][key]
    config = project / "base" / "config.json"
    found["base"] |= {
        "path": str(project / "base"),
        "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest(),
    }
    write_json(file, found | {"schema": 1})
    assert run_cli("generate", project / "run", "x") == 0
    assert run_cli("merge", project / "run") == 0
    config.write_text(config.read_text() + "\n")
    assert "config.json differs" in said_of(project / "run")


def plain(project: Path, name: str = "plain") -> Path:
    """The adapter as PEFT alone would have left it."""
    folder = project / name
    shutil.copytree(project / "run" / "adapter", folder)
    (folder / "peftcli.json").unlink()
    return folder


@pytest.mark.numeric
def test_an_adapter_of_peft_alone_is_measured_on_the_base_of_a_recipe(project: Path, run_cli: Cli, capfd: Any) -> None:
    ours = read_json(project / "run" / "metrics.json")["adapter"]["loss"]
    capfd.readouterr()
    assert run_cli("eval", plain(project), "--recipe", project / "recipe.yaml", "--no-base", "--json") == 0
    assert json.loads(capfd.readouterr().out)["adapter"]["loss"] == pytest.approx(ours, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop, "lacks base_model.model.model.layers.0."),
        (
            add,
            "contains base_model.model.stray.lora_A.weight, which this base with this adapter_config.json does not",
        ),
        (reshape, "size mismatch for base_model.model.model.layers.0."),
        (poison, "not finite"),
    ],
)
def test_an_adapter_of_peft_alone_that_fits_in_part_is_refused(
    project: Path, run_cli: Cli, capfd: Any, change: Callable[..., object], said: str
) -> None:
    folder = plain(project)
    edit_tensors(folder / "adapter_model.safetensors", change)
    capfd.readouterr()
    assert run_cli("eval", folder, "--recipe", project / "recipe.yaml") == 4
    error = capfd.readouterr().err
    assert said in error and "Traceback" not in error and error.splitlines()[-1].startswith("error: "), error


def test_a_configuration_that_asks_for_more_targets_than_the_file_holds_is_refused(
    project: Path, run_cli: Cli, capfd: Any
) -> None:
    file = project / "run" / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    with safe_open(project / WEIGHTS, framework="pt") as stream:
        assert not any("k_proj" in name for name in stream.keys())  # noqa: SIM118
    file.write_text(json.dumps(config | {"target_modules": [*config["target_modules"], "k_proj"]}))
    capfd.readouterr()
    assert run_cli("generate", project / "run", "x") == 4
    assert "adapter_config.json changed after training" in capfd.readouterr().err
    stated = file.with_name("peftcli.json")
    found = read_json(stated)
    write_json(stated, {key: value for key, value in found.items() if key != "files"})  # an older version's
    assert run_cli("generate", project / "run", "x") == 4
    assert "lacks base_model.model.model.layers.0.self_attn.k_proj" in capfd.readouterr().err


def test_one_bit_of_the_adapter_is_noticed(project: Path, run_cli: Cli, capfd: Any) -> None:
    data = bytearray((project / WEIGHTS).read_bytes())
    data[-3] ^= 1
    (project / WEIGHTS).write_bytes(data)
    capfd.readouterr()
    assert run_cli("merge", project / "run") == 4
    assert "adapter_model.safetensors changed after training; restore it" in capfd.readouterr().err


def test_an_adapter_of_peft_alone_needs_a_row_for_every_token(project: Path, run_cli: Cli, capfd: Any) -> None:
    random_base(6, project / "base", project / "base", vocab_size=1000)
    capfd.readouterr()
    assert run_cli("eval", plain(project), "--recipe", project / "recipe.yaml") == 4
    assert "its embedding has 1000 rows, but the adapter's tokenizer needs 1024" in capfd.readouterr().err


def test_a_path_that_is_nothing_is_not_taken_for_the_base_of_the_recipe(
    project: Path, run_cli: Cli, capfd: Any
) -> None:
    recipe = project / "recipe.yaml"
    capfd.readouterr()
    for path in (project / "run" / "adaptor", random_base(7, project / "base", project / "other")):
        assert run_cli("eval", path, "--recipe", recipe) == 4
        assert f"{path}: not written by peftcli, and not the base of the recipe" in capfd.readouterr().err
    assert open_target(str(project / "base"), open_target(str(project / "run")).base).kind == "base"


def on_the_hub(cache: Path, commit: str, base: Path) -> None:
    """Put a base into a cache of the Hub, as the main branch of org/base."""
    held = cache / "models--org--base"
    shutil.copytree(base, held / "snapshots" / commit)
    (held / "refs").mkdir(exist_ok=True)
    (held / "refs" / "main").write_text(commit)


def test_a_base_of_the_hub_is_held_to_its_commit(
    trained: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    first, second = "a" * 40, "b" * 40
    place = BaseLocation("org/base", None)
    on_the_hub(tmp_path / "hub", first, tiny_llama)
    facts = base_facts("org/base", None)
    assert (facts.commit, facts.embedding_rows) == (first, 1024) and facts.weights_sha256 is not None
    found = read_json(trained / "run" / "adapter" / "peftcli.json")
    found["base"] |= {"name": "org/base", "path": "org/base", **vars(facts)}
    assert base_of(found, "cpu", [place]).revision == first
    on_the_hub(tmp_path / "hub", second, random_base(7, tiny_llama, tmp_path / "random"))
    assert base_of(found, "cpu", [place]).revision == first, "the branch moved, the commit is still here"
    shutil.rmtree(tmp_path / "hub" / "models--org--base" / "snapshots" / first)
    with pytest.raises(MachineError, match=f"commit {first} of org/base, which is not in the local cache"):
        base_of(found, "cpu", [place])
    shutil.copytree(tmp_path / "hub" / "models--org--base", tmp_path / "hub" / "models--org--other")
    with pytest.raises(MachineError, match="org/other: has the same shape, but its weights differ"):
        base_of(found, "cpu", [BaseLocation("org/other", None)])
    found["base"]["commit"] = None
    with pytest.raises(MachineError, match="org/base: has the same shape, but its weights differ"):
        base_of(found, "cpu", [place])


def test_a_base_that_is_not_here_is_not_compared() -> None:
    assert set(vars(base_facts("org/never-downloaded", None)).values()) == {None}
    assert set(vars(base_facts("no id of the Hub/at/all", None)).values()) == {None}


def test_a_tiny_model_made_anew_passes(trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    anew = random_base(8, tiny_llama, tmp_path / tiny_llama.name)
    found = read_json(trained / "run" / "adapter" / "peftcli.json")
    found["base"] |= {"name": "tiny:llama", "path": str(tmp_path / "emptied" / tiny_llama.name)}
    gone = BaseLocation(found["base"]["path"], None)
    assert base_of(found, "cpu", [gone]).path == str(tiny_llama)
    assert base_of(found, "cpu", [BaseLocation(str(anew), None)]).path == str(anew)
    with pytest.raises(MachineError, match="weights differ"):
        base_of(found, "cpu", [BaseLocation(str(random_base(9, tiny_llama, tmp_path / "tiny-llama-other")), None)])
