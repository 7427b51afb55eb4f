"""Helpers that several test modules use."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from peftcli.cli.pipeline import plan_recipe, prepare_data
from peftcli.model.load import load_base
from peftcli.plan.memory.model_shape import Linear, ModelDimensions
from peftcli.plan.memory.training_setup import TrainingSetup
from peftcli.plan.plan import Base
from peftcli.progress import Silent
from peftcli.recipe.load import load_recipe
from peftcli.run_dir import RunDir, read_json, read_log
from peftcli.train.run import make_trainer
from peftcli.train.trainers import Trainer

LOSS_TOLERANCE = 1e-5
"""Nats by which the losses of two equal trainings may differ, per step.

A loss of a few nats is a mean of float32 log-probabilities, each rounded at 2^-24 of its size and summed over at most a
few hundred products: about 1e-6. The weights that follow differ too (see `UPDATE_TOLERANCE`), but mostly where the
gradient is near zero, which hardly moves the loss. Measured on four CPUs: at most 1.4e-6 in 24 steps.
"""
UPDATE_TOLERANCE = 0.02
"""Largest root mean square of the difference of two equal trainings' weights, as a share of that of their update.

Adam divides each gradient by its own size, so a weight whose gradient is smaller than its rounding error d moves by up
to the learning rate in either direction, whatever the two paths agree on elsewhere. Among gradients of scale s about
d/s of the weights are so close to zero; with d/s = 1e-5 to 1e-4 in float32, the root mean square is sqrt(d/s), 0.3 % to
1 %. A row left out, counted twice or scaled wrongly gives more than 10 %.
"""

Cli = Callable[..., int]

GOOD, BAD = ("good", "warm", "fresh", "kind"), ("bad", "cold", "stale", "rude")

VOCABULARY = 512

NF4 = {"bits": 4, "type": "nf4", "double_quant": True, "compute_dtype": "float32"}

RATE, STEPS = 0.01, 12

ROWS = torch.arange(5, 53).reshape(3, 16)

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def without_repacking(model: torch.nn.Module) -> torch.nn.Module:
    """The model, its 4-bit layers kept from the kernel that rounds to bfloat16.

    On a CPU with AVX512_BF16, bitsandbytes 0.50 packs the weights of a 4-bit layer again in its first evaluation, for a
    kernel whose products are rounded to bfloat16 (logits are up to 3e-2 off) and which fails on widths below 64.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def update_distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """Root mean square of `found - expected`, as a share of that of `expected - start`, over all tensors.

    Args:
        start: tensors before the training; a name that it lacks started at zero, as LoRA's B matrices do.
    """
    assert found.keys() == expected.keys()
    off = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected)
    moved = sum(float((expected[name] - start.get(name, 0.0)).double().square().sum()) for name in expected)
    assert moved > 0, "nothing was trained"
    return float((off / moved) ** 0.5)


def assert_same_adapter(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Two adapters of LoRA are results of the same training, by their B matrices, which start at zero."""
    found, expected = ({name: value for name, value in one.items() if "lora_B" in name} for one in (found, expected))
    distance = update_distance(found, expected, {})
    assert distance <= UPDATE_TOLERANCE, f"the updates differ by {distance:.2%}"


def assert_same_losses(found: Sequence[float], expected: Sequence[float]) -> None:
    """Two trainings had the same loss at every step."""
    assert found == pytest.approx(expected, abs=LOSS_TOLERANCE)


def assert_same_effect(found: Tensor, expected: Tensor, base: Tensor) -> None:
    """Two trained models answer alike: their logits differ by little of what the training changed in the base's."""
    distance = update_distance({"logits": found}, {"logits": expected}, {"logits": base})
    assert distance <= UPDATE_TOLERANCE, f"the effects of the adapters differ by {distance:.2%}"


def assert_close_logits(found: Tensor, expected: Tensor, **tolerance: Any) -> None:
    """Two float32 computations of the same logits agree.

    Logits of the tiny models are sums of at most 1,000 products, about 10 in all: 10 x 2^-24 x sqrt(1000) is 2e-5, and
    each of a few layers adds its own. The default of 1e-4 is five times that.
    """
    torch.testing.assert_close(found, expected, **({"atol": 1e-4, "rtol": 1e-4} | tolerance))


def train_twice(run_cli: Cli, recipe: Path, tmp_path: Path, *words: str) -> tuple[Path, Path]:
    for name in ("padding_free", "padded"):
        assert run_cli("train", recipe, "--output-dir", name, "--set", f"performance.batching={name}", *words) == 0
    return tmp_path / "padding_free", tmp_path / "padded"


def logged_losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_log(run / "log.jsonl") if "loss" in row]


def same_training(padding_free: Path, padded: Path) -> None:
    losses = [logged_losses(run) for run in (padding_free, padded)]
    assert len(losses[0]) > 3
    assert_same_losses(*losses)
    assert_same_adapter(*(load_file(run / "adapter" / "adapter_model.safetensors") for run in (padding_free, padded)))
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


def trainer_of(recipe: Path, folder: Path) -> Trainer:
    """The trainer as `train` builds it."""
    plan = plan_recipe(load_recipe(recipe)).plan
    tokenizer, data = prepare_data(plan, Silent())
    return make_trainer(plan, RunDir(folder), data, tokenizer, load_base(plan.base))
