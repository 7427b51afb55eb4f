"""Helpers that several test modules use."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from comparisons import assert_same_adapter, assert_same_losses
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from peftcli.cli.pipeline import plan_recipe, plan_with_labels, prepare_data
from peftcli.data.prepare import PreparedData
from peftcli.model.load import load_base
from peftcli.plan.memory.model_shape import Linear, ModelDimensions
from peftcli.plan.memory.training_setup import TrainingSetup
from peftcli.plan.plan import Base, Plan
from peftcli.progress import Silent
from peftcli.recipe.load import load_recipe
from peftcli.run_dir import read_json, read_log
from peftcli.train.step import TrainerSetup
from peftcli.train.trainers import Trainer, make_trainer

Cli = Callable[..., int]

GOOD, BAD = ("good", "warm", "fresh", "kind"), ("bad", "cold", "stale", "rude")

VOCABULARY = 512

NF4 = {"bits": 4, "type": "nf4", "double_quant": True, "compute_dtype": "float32"}

RATE, STEPS = 0.01, 12

ROWS = torch.arange(5, 53).reshape(3, 16)

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def train_twice(run_cli: Cli, recipe: Path, tmp_path: Path, *words: str) -> tuple[Path, Path]:
    for name in ("padding_free", "padded"):
        assert run_cli("train", recipe, "--output-dir", name, "--set", f"performance.batching={name}", *words) == 0
    return tmp_path / "padding_free", tmp_path / "padded"


UNEVEN = {"max_steps": 5, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
"""Trainer arguments under which the last micro-batch of a step is smaller than the others."""


def logged_losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_log(run / "log.jsonl") if "loss" in row]


def assert_same_result(one: Path, other: Path) -> None:
    """Two runs have the losses and the adapter of one and the same training."""
    losses = [logged_losses(run) for run in (one, other)]
    assert len(losses[0]) > 3
    assert_same_losses(*losses)
    assert_same_adapter(*(load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other)))


def same_training(padding_free: Path, padded: Path) -> None:
    assert_same_result(padding_free, padded)
    facts = [read_json(run / "train.json") for run in (padding_free, padded)]
    for key in ("tokens", "trained_tokens", "rows", "steps"):
        assert facts[0][key] == facts[1][key], key
    assert facts[0]["batching"]["kind"] == "padding_free" and facts[1]["batching"]["kind"] == "padded"
    assert [one["batching"]["attention"] for one in facts] == [["side by side"], None]
    assert facts[0]["batching"]["real_tokens"] < facts[0]["batching"]["padded_tokens"]


def rows_of_reviews(count: int = 64) -> list[dict[str, Any]]:
    """Texts whose class one word tells, as a class, a list of classes, a number, and words with tags."""
    rows = []
    for number in range(count):
        good, word = number % 2 == 0, number // 2 % 4
        text = f"the {['soup', 'room', 'bread', 'staff'][number // 8 % 4]} was {(GOOD if good else BAD)[word]}"
        words = [*text.split(), str(number), "in", ["Paris", "Rome"][number % 2]]
        rows.append(
            {
                "text": f"{number}" + " again" * (number % 5) + f" {text}",
                "label": "good" if good else "bad",
                "kinds": ["good"] * good + ["even"] * (number % 4 == 0),
                "stars": 4.5 if good else 1.5,
                "tokens": words,
                "tags": ["O"] * (len(words) - 1) + ["B-place"],
            }
        )
    return rows


def named(shape: ModelDimensions, *leaves: str) -> tuple[Linear, ...]:
    return tuple(linear for linear in shape.linears if not leaves or linear.leaf in leaves)


def lora(shape: ModelDimensions, r: int, *leaves: str, **settings: Any) -> TrainingSetup:
    """A setting on a card, bfloat16, AdamW, LoRA on the layers named or on all."""
    targets = named(shape, *leaves)
    trainable = sum(r * (linear.inputs + linear.outputs) * linear.count for linear in targets)
    given = {"on_gpu": True, "base_bytes": 2, "weight_bits": None, "autocast": True, "state_bytes": 8.0} | settings
    return TrainingSetup(targets=targets, r=r, trainable=trainable, **given)


def kept_bytes(model: Any, *, autocast: bool, padded: bool) -> int:
    """Bytes of all tensors that a forward pass of the blocks keeps for its backward pass, parameters aside."""
    owned = {part.untyped_storage().data_ptr() for part in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in owned:
            kept[place] = tensor  # held, so that no other tensor takes its place
        return tensor

    ids = torch.randint(3, VOCABULARY, (2, 64))
    mask = torch.ones_like(ids)
    mask[0, 32:] = 0 if padded else 1
    base = model.get_base_model()
    precision = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), precision:
        getattr(base, base.base_model_prefix)(input_ids=ids, attention_mask=mask)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def base_of(path: Path, quantization: dict[str, Any] | None) -> Base:
    return Base(str(path), str(path), None, "float32", "sdpa", "cpu", quantization, None, False)


def logits_of(model: torch.nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=ROWS, use_cache=False).logits
    return logits[:, -ROWS.shape[1] :]


def learn(model: torch.nn.Module, rate: float) -> list[float]:
    """Losses of a few steps on three rows."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.Adam(trained, lr=rate)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ROWS, labels=ROWS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adapter(model: Any, folder: Path, *targets: str) -> torch.Tensor:
    """Save an adapter of random weights and return the logits of the model with it."""
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=list(targets)))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(str(folder))
    return logits(wrapped)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return found


def merge_sections(recipe: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe with keys added to its sections, with sections replaced, and without those that are None."""
    merged = dict(recipe)
    for name, value in sections.items():
        if isinstance(value, dict) and isinstance(recipe.get(name), dict):
            merged[name] = recipe[name] | value
        elif value is None:
            merged.pop(name, None)
        else:
            merged[name] = value
    return merged


def write_yaml(folder: Path, recipe: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def write_chats(folder: Path, model: Path, chats: list[dict[str, Any]], **trainer: Any) -> Path:
    """Write chats and a recipe that trains a few steps on them; keyword arguments are arguments of the trainer."""
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    steps = {"max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
    recipe = {
        "model": {"name": str(model)},
        "dataset": {"path": "chats.jsonl", "max_length": 128},
        "trainer": steps | trainer,
        "evaluation": {"rows": 2, "max_new_tokens": 2},
    }
    return write_yaml(folder, recipe)


def prepare_labels(recipe: Path) -> tuple[Plan, PreparedData, Any]:
    """The plan of a recipe with the labels that its data hold, the data, and the tokenizer or image processor."""
    planned = plan_recipe(load_recipe(recipe))
    processor, data = prepare_data(planned.plan, Silent())
    return plan_with_labels(planned, data).plan, data, processor


def trainer_of(recipe: Path, folder: Path) -> Trainer:
    """The trainer as `train` builds it."""
    plan = plan_recipe(load_recipe(recipe)).plan
    tokenizer, data = prepare_data(plan, Silent())
    return make_trainer(TrainerSetup(plan, data, tokenizer), folder / "checkpoints", load_base(plan.base))
