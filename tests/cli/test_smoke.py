"""Smoke runs: any recipe, on a CPU, without network, saying what they are."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from safetensors import safe_open

from peftcli.run_dir import read_json

Cli = Callable[..., int]


@pytest.mark.parametrize(
    ("model", "dataset", "adapter", "architecture"),
    [
        ("meta-llama/Llama-3.1-70B", {"name": "org/data", "text": "{title}: {body}"}, {}, "LlamaForCausalLM"),
        ("Qwen/Qwen3-32B", {"name": "org/chats"}, {"use_dora": True}, "Qwen3ForCausalLM"),
        (
            "google/gemma-2-27b",
            {"name": "org/qa", "prompt": "{q}", "completion": " {a}"},
            {"r": 64},
            "Gemma2ForCausalLM",
        ),
        ("openai-community/gpt2-xl", {"name": "org/t", "columns": {"text": "body"}}, {}, "GPT2LMHeadModel"),
    ],
)
def test_any_model_and_a_hub_data_set_are_rehearsed_offline(
    run_cli: Cli,
    tmp_path: Path,
    capfd: Any,
    model: str,
    dataset: dict[str, Any],
    adapter: dict[str, Any],
    architecture: str,
) -> None:
    recipe = {
        "name": "large",
        "model": {"name": model, "dtype": "bfloat16", "attention": "flash_attention_2"},
        "quantization": {"bits": 4},
        "adapter": adapter,
        "dataset": dataset | {"max_length": 8192},
        "trainer": {"num_train_epochs": 3, "gradient_accumulation_steps": 16, "optim": "paged_adamw_8bit"},
        "gates": {"exact_match": ">= 0.99"},
    }
    (tmp_path / "large.yaml").write_text(yaml.safe_dump(recipe))
    assert run_cli("train", "large.yaml", "--smoke") == 0
    said = capfd.readouterr()
    assert f"smoke: {model} is replaced by a tiny random" in said.err
    assert "the metrics do not predict those of the real model" in said.out
    run = tmp_path / "runs" / "large-smoke"
    assert read_json(run / "plan.json")["model"]["architecture"] == architecture
    assert "synthetic rows" in read_json(run / "data.json")["sources"][0]["path"]
    assert read_json(run / "metrics.json")["smoke"] is True
    assert "SMOKE" in (run / "report.md").read_text().upper()
    assert not (tmp_path / "runs" / "large").exists()


def test_the_stand_in_has_the_module_names_of_a_config_at_hand(run_cli: Cli, tmp_path: Path, tiny_llama: Path) -> None:
    from transformers import MistralConfig

    folder = tmp_path / "real"
    MistralConfig(hidden_size=4096, num_hidden_layers=40).save_pretrained(folder)
    recipe = {
        "model": {"name": str(folder)},
        "dataset": {"name": "org/data", "text": "{body}"},
        "adapter": {"target_modules": ["gate_proj", "o_proj"]},
    }
    (tmp_path / "mistral.yaml").write_text(yaml.safe_dump(recipe))
    assert run_cli("train", "mistral.yaml", "--smoke") == 0
    plan = read_json(tmp_path / "runs" / "mistral-smoke" / "plan.json")
    assert plan["model"]["architecture"] == "MistralForCausalLM"
    assert {target["name"] for target in plan["targets"]} == {"gate_proj", "o_proj"}


def test_a_wrong_target_is_found_by_a_smoke_run(run_cli: Cli, tmp_path: Path, capfd: Any) -> None:
    recipe = {
        "model": {"name": "meta-llama/Llama-3.1-70B"},
        "dataset": {"name": "org/data", "text": "{body}"},
        "adapter": {"target_modules": ["q_proj", "vproj"]},
    }
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(recipe))
    assert run_cli("train", "wrong.yaml", "--smoke") == 2
    assert "[vproj]; nearest names: v_proj" in capfd.readouterr().err


TEMPLATE = """{%- for message in messages -%}
<<{{ message['role'] }}>> {% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}
{%- endfor -%}{% if add_generation_prompt %}<<assistant>> {% endif %}"""


@pytest.fixture
def real(tmp_path: Path, tiny_llama: Path) -> Path:
    """A model on this disk with a chat template of its own and a longer vocabulary than that of a stand-in."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "real"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens([f"<extra_{number}>" for number in range(300)])
    tokenizer.chat_template = TEMPLATE
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """100 short chats."""
    turns = [
        [{"role": "user", "content": f"Say {number}."}, {"role": "assistant", "content": f"It is {number}."}]
        for number in range(100)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    return path


def written(tmp_path: Path, **sections: Any) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "r", "trainer": {"max_steps": 2}} | sections))
    return path


def test_the_real_tokenizer_vocabulary_and_template_are_rehearsed(
    run_cli: Cli, tmp_path: Path, real: Path, chats: Path, capfd: Any
) -> None:
    recipe = written(tmp_path, model={"name": str(real)}, dataset={"path": str(chats)})
    assert run_cli("train", recipe, "--smoke") == 0
    said = capfd.readouterr().err
    assert "made from its own configuration" in said and "was not checked" not in said and "not here" not in said
    run = tmp_path / "runs" / "r-smoke"
    base = Path(read_json(run / "adapter" / "peftcli.json")["base"]["path"])
    assert base.name.startswith("stand-in-llama")
    assert (base / "tokenizer.json").read_bytes() == (real / "tokenizer.json").read_bytes()
    assert read_json(base / "config.json")["vocab_size"] == read_json(real / "config.json")["vocab_size"]
    with safe_open(base / "model.safetensors", "pt") as stream:
        vocabulary = read_json(real / "config.json")["vocab_size"]
        assert stream.get_slice("model.embed_tokens.weight").get_shape() == [vocabulary, 64]
    assert "<<user>> Say" in read_json(run / "eval.json")["samples"][0]["prompt"]
    assert run_cli("merge", run) == 0 and run_cli("eval", run) == 0


@pytest.mark.parametrize(
    ("model", "dataset", "adapter", "code"),
    [
        ({"eos_token": "<|im_end|>"}, {}, {}, 2),
        ({}, {"max_length": 4096}, {}, 2),
        ({}, {}, {"layers": [7]}, 2),
        ({}, {}, {"target_modules": ["model.layers.7.mlp.up_proj"]}, 2),
        ({"chat_template": "endless.jinja"}, {}, {}, 3),
        ({"name": "without-template"}, {}, {}, 3),
        ({"name": "quantized"}, {}, {}, 2),
        ({"name": "pickled"}, {}, {}, 4),
    ],
)
def test_a_rehearsal_is_refused_for_what_the_real_run_is_refused_for(
    run_cli: Cli,
    tmp_path: Path,
    real: Path,
    chats: Path,
    capfd: Any,
    model: dict[str, Any],
    dataset: dict[str, Any],
    adapter: dict[str, Any],
    code: int,
) -> None:
    (tmp_path / "endless.jinja").write_text(TEMPLATE.replace("{{ eos_token }}", ""))
    if model.get("name") is not None:
        shutil.copytree(real, tmp_path / model["name"])
        _spoil(tmp_path / model["name"])
    sections = {
        "model": {"name": str(real)}
        | {key: str(tmp_path / one) if key == "name" else one for key, one in model.items()},
        "dataset": {"path": str(chats)} | dataset,
        "adapter": adapter,
    }
    recipe = written(tmp_path, **sections)
    assert run_cli("train", recipe) == code
    for_real = [line for line in capfd.readouterr().err.splitlines() if "error" in line or line.startswith("  the")]
    assert run_cli("train", recipe, "--smoke") == code
    rehearsed = [line for line in capfd.readouterr().err.splitlines() if "error" in line or line.startswith("  the")]
    assert for_real and len(for_real) == len(rehearsed)
    for one, other in zip(for_real, rehearsed, strict=True):
        assert one.split(";")[0].split(" in 0 of ")[0] == other.split(";")[0].split(" in 0 of ")[0]


def _spoil(folder: Path) -> None:
    if folder.name == "without-template":
        (folder / "chat_template.jinja").unlink()
    elif folder.name == "quantized":
        config = read_json(folder / "config.json") | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
        (folder / "config.json").write_text(json.dumps(config))
    else:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def test_a_number_of_test_rows_is_scaled_to_the_rows_of_a_rehearsal(
    run_cli: Cli, tmp_path: Path, real: Path, chats: Path, capfd: Any
) -> None:
    dataset = {"path": str(chats), "split": {"test_size": 60}}
    recipe = written(tmp_path, model={"name": str(real)}, dataset=dataset)
    assert run_cli("train", recipe, "--smoke") == 0
    assert "with 48 rows: 12 test rows instead of dataset.split.test_size: 60" in capfd.readouterr().err
    data = read_json(tmp_path / "runs" / "r-smoke" / "data.json")
    assert (data["train_rows"], data["test_rows"]) == (36, 12)


def test_a_file_sorted_by_group_is_rehearsed(run_cli: Cli, tmp_path: Path, real: Path, capfd: Any) -> None:
    lines = [f"row {number},yes,{number // 50}" for number in range(100)]
    (tmp_path / "rows.csv").write_text("\n".join(["q,a,customer", *lines]))
    dataset = {"path": "rows.csv", "prompt": "{q}:", "completion": " {a}", "split": {"group": "customer"}}
    assert run_cli("train", written(tmp_path, model={"name": str(real)}, dataset=dataset), "--smoke") == 0
    assert "dataset.split.group is ignored, because customer" in capfd.readouterr().err


def test_without_the_real_files_a_rehearsal_says_what_it_could_not_check(
    run_cli: Cli, tmp_path: Path, chats: Path, capfd: Any
) -> None:
    recipe = written(
        tmp_path,
        model={"name": "org/llama-9b", "eos_token": "<|im_end|>", "dtype": "bfloat16"},
        dataset={"path": str(chats), "max_length": 8192},
        adapter={"layers": [31], "target_modules": ["model.layers.31.mlp.up_proj"]},
        gates={"loss": "< 1"},
    )
    assert run_cli("train", recipe, "--smoke") == 0
    said = capfd.readouterr().err
    assert "smoke: ignored: model.dtype, gates" in said
    assert "the configuration of org/llama-9b is not local" in said
    assert "the tokenizer of org/llama-9b is not available locally" in said and "hf download org/llama-9b" in said
    assert "rows are truncated at 1,024 tokens; dataset.max_length is 8,192" in said
    run = tmp_path / "runs" / "r-smoke"
    assert read_json(run / "data.json")["eos_trained_rows"] > 0
    assert run_cli("generate", run, "Say 3.") == 0


def test_the_files_in_the_cache_of_the_hub_are_rehearsed_without_the_network(
    run_cli: Cli, tmp_path: Path, real: Path, chats: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    held = tmp_path / "hub" / "models--org--real"
    commit = "1" * 40
    small = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(real, held / "snapshots" / commit, ignore=small)
    (held / "refs").mkdir()
    (held / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a smoke run asked the network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    recipe = written(tmp_path, model={"name": "org/real"}, dataset={"path": str(chats)})
    assert run_cli("train", recipe, "--smoke") == 0
    assert "made from its own configuration" in capfd.readouterr().err
    samples = read_json(tmp_path / "runs" / "r-smoke" / "eval.json")["samples"]
    assert "<<user>> Say" in samples[0]["prompt"]


def test_the_head_of_a_rehearsal_has_the_parts_of_the_real_one(
    run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModel, AutoTokenizer

    from peftcli.tiny.build import tiny_model

    bert = tiny_model("tiny:bert")
    folder = tmp_path / "encoder"
    AutoModel.from_pretrained(bert).save_pretrained(folder)  # with a pooler, which a masked language model lacks
    AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    lines = [f"row {number},{number % 2}" for number in range(100)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]))
    dataset = {"path": "rows.csv", "limits": {"max_leaked": 1}}
    recipe = written(tmp_path, model={"name": str(folder), "task": "sequence-classification"}, dataset=dataset)
    assert run_cli("train", recipe) == 0 and run_cli("train", recipe, "--smoke") == 0
    heads = [
        read_json(tmp_path / "runs" / name / "adapter" / "peftcli.json")["base"]["head"] for name in ("r", "r-smoke")
    ]
    assert heads[0] == heads[1]
