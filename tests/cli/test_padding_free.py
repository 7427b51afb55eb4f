"""Flat lines of rows: what each row gives alone, what a padded step gives, and when they are not used."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_kernels import flash
from comparisons import assert_same_adapter, assert_same_losses
from helpers import UNEVEN, Cli, logged_losses, same_training, train_twice, write_chats
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
)

from peftcli.model import varlen_attention
from peftcli.model.load import load_base
from peftcli.model.padding_free import SequenceLayout, check_rows, enable_padding_free, use_layout
from peftcli.run_dir import read_json
from peftcli.train.micro_batch import MicroBatches, flatten_rows, parts_that_fit, split_evenly
from peftcli.train.step import StepTrainer

Write = Callable[..., Path]


SMALL = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
FAMILIES = {
    "llama": LlamaConfig(**SMALL, **HEADS, eos_token_id=2),
    "qwen3": Qwen3Config(**SMALL, **HEADS, head_dim=16, eos_token_id=2),
    "gemma": GemmaConfig(**SMALL, **HEADS, head_dim=16, eos_token_id=2),
    "phi3": Phi3Config(**SMALL, **HEADS, eos_token_id=2),
    "mistral": MistralConfig(**SMALL, **HEADS, eos_token_id=2, sliding_window=9),
    "gpt2": GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=4, eos_token_id=2, attn_pdrop=0.0, resid_pdrop=0.0),
}


def rows(*lengths: int) -> list[dict[str, Any]]:
    drawn = torch.Generator().manual_seed(0)
    made = [torch.randint(3, 200, (length,), generator=drawn) for length in lengths]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in made]


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="sdpa").eval()


@pytest.mark.numeric
@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_in_a_line_gives_what_it_gives_alone_and_the_same_gradient(
    family: str, repeated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftcli.model.padding_free.repeats_heads", lambda device: repeated)  # as on a T4
    model = model_of(family)
    texts = rows(5, 30, 17, 17, 2, 400, 290, 41)
    lengths = [len(row["input_ids"]) for row in texts]
    alone = [model(input_ids=row["input_ids"][None], use_cache=False).logits[0] for row in texts]
    weights = torch.linspace(-1, 1, 200)
    sum((logits * weights).sum() for logits in alone).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert enable_padding_free(model)
    line, layout = flatten_rows(texts)
    with use_layout(layout):
        found = model(input_ids=line["input_ids"], position_ids=line["position_ids"], use_cache=False).logits[0]
    assert [len(part) for part in found.split(lengths)] == lengths
    for one, other in zip(found.split(lengths), alone, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    (found * weights).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = expected[name].abs().max().clamp(min=1e-6)
            assert ((parameter.grad - expected[name]).abs().max() / scale) < 1e-4, name
    # Outside of a line it is the attention of sdpa, padding included.
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    ids = torch.arange(18).reshape(2, 9) + 5
    assert torch.allclose(
        model(input_ids=ids, attention_mask=mask).logits[1, :4], model(input_ids=ids[1:, :4]).logits[0], atol=1e-5
    )


@pytest.mark.numeric
def test_without_keeping_rows_apart_the_same_line_gives_something_else() -> None:
    model = model_of("llama")
    line, _ = flatten_rows(rows(9, 12))
    mixed = model(input_ids=line["input_ids"], use_cache=False).logits[0, 9:]
    alone = model(input_ids=line["input_ids"][:, 9:], use_cache=False).logits[0]
    assert (mixed - alone).abs().max() > 1e-3  # so the test above can fail


def test_code_is_compiled_for_the_first_batches_and_not_for_each_length() -> None:
    model = model_of("llama").train()
    assert enable_padding_free(model)
    graphs = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled, after = torch.compile(model, backend=compiler), []
    # One number of tokens, any number of them, and a single row, of which transformers makes another mask.
    first = ((5, 30, 17), (9, 12), (40,))
    for lengths in (*first, (3, 44, 7, 21), (6, 6, 6, 6, 6), (33,), (2, 50)):
        line, layout = flatten_rows(rows(*lengths))
        with use_layout(layout):
            found, expected = (one(**line, use_cache=False).loss for one in (compiled, model))
        found.backward()
        assert torch.allclose(found, expected, atol=1e-5)
        after.append(len(graphs))
    torch.compiler.reset()
    assert 0 < after[0] < after[1] and after[len(first) - 1] == after[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_proof_on_the_model_itself_passes_for_attention(family: str) -> None:
    model = model_of(family)
    assert enable_padding_free(model) and check_rows(model).problem is None


def test_a_model_that_carries_a_state_from_row_to_row_is_found_out() -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=200, hidden_size=32, num_hidden_layers=2, state_size=8)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not enable_padding_free(model) or check_rows(model).problem is not None


def test_rows_of_a_group_are_of_similar_length() -> None:
    groups, back = SequenceLayout((1000, 900, 300, 290, 3, 2), torch.device("cpu")).sides
    assert [(group.rows, group.length) for group in groups] == [(2, 1000), (2, 300), (2, 3)]
    assert sorted(back.tolist()) == sorted(set(back.tolist())) and len(back) == 2495
    assert SequenceLayout((7, 7, 7), torch.device("cpu")).whole


def test_parts_of_a_step_are_even_and_in_order() -> None:
    lengths = [100, 3, 3, 3, 90, 50, 50]
    for parts in range(1, len(lengths) + 1):
        slices = split_evenly(lengths, parts)
        assert [row for part in slices for row in range(len(lengths))[part]] == list(range(len(lengths)))
        assert len(slices) == parts and all(part.stop > part.start for part in slices)
    count = parts_that_fit(lengths, 120)
    assert all(sum(lengths[part]) <= 120 for part in split_evenly(lengths, count)) and count < len(lengths)


def test_rows_of_one_length_stay_padded_since_a_line_would_gain_nothing() -> None:
    seen: list[tuple[int, ...]] = []

    def one(piece: dict[str, Any]) -> torch.Tensor:
        seen.append(tuple(piece["input_ids"].shape))
        return torch.zeros(())

    full = torch.ones(4, 10, dtype=torch.int64)
    half = full.clone()
    half[1:, 5:] = 0
    for mask in (full, half):
        batch = {"input_ids": full, "labels": full, "attention_mask": mask}
        MicroBatches(tokens=100).run([batch], one, lambda: None, nullcontext, 1)
    assert seen == [(4, 10), (1, 25)]


@pytest.mark.parametrize(("most", "shapes"), [(None, [(4, 10)]), (25, [(2, 10), (2, 10)]), (3, [(1, 10)] * 4)])
def test_a_padded_micro_batch_is_cut_to_the_tokens_of_the_recipe(
    most: int | None, shapes: list[tuple[int, int]]
) -> None:
    for tokens in (None, 1000):  # rows of one length stay padded where lines are asked for too
        seen: list[tuple[int, ...]] = []

        def one(piece: dict[str, Any], seen: list[tuple[int, ...]] = seen) -> torch.Tensor:
            seen.append(tuple(piece["input_ids"].shape))
            return torch.ones(())

        full = torch.ones(4, 10, dtype=torch.int64)
        batch = {"input_ids": full, "labels": full, "attention_mask": full}
        loss = MicroBatches(tokens=tokens, most=most).run([batch], one, lambda: None, nullcontext, 1)
        assert seen == shapes and loss == len(shapes)


@pytest.mark.numeric
def test_the_tokens_of_a_recipe_hold_for_padded_rows_and_their_forecast(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, capfd: Any
) -> None:
    recipe = write_recipe(trainer={"max_steps": 5, "per_device_train_batch_size": 8})
    forecasts, weights = [], []
    for name, words in (("whole", ()), ("cut", ("--set", "performance.tokens_per_micro_batch=40"))):
        assert run_cli("train", recipe, "--output-dir", name, "--set", "performance.batching=padded", *words) == 0
        plan = read_json(tmp_path / name / "plan.json")
        forecasts.append(plan["forecast"]["micro_batch"]["tokens"])
        weights.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
        decision = next(one for one in plan["decisions"] if one["key"] == "batching")
        assert decision["value"] == ("padded, up to 40 tokens at once" if words else "padded")
    assert forecasts[1] == 40 < forecasts[0]
    assert_same_losses(*(logged_losses(tmp_path / name) for name in ("whole", "cut")))
    assert_same_adapter(*weights)


@pytest.mark.numeric
@pytest.mark.parametrize("quantization", [{"bits": 4}, None], ids=["nf4", "whole"])
def test_pairs_learn_the_same_in_lines_and_padded(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, quantization: dict[str, Any] | None
) -> None:
    recipe = write_recipe(quantization=quantization, trainer=UNEVEN)
    same_training(*train_twice(run_cli, recipe, tmp_path))


@pytest.mark.numeric
def test_chats_learn_the_same_in_lines_and_padded_with_checkpointed_layers_too(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, tiny_llama: Path
) -> None:
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"Say {'many ' * (number % 7)}words"},
                {"role": "assistant", "content": "word " * (1 + number * 5 % 11) + str(number)},
            ]
        }
        for number in range(30)
    ]
    recipe = write_chats(tmp_path, tiny_llama, chats, activation_checkpointing=True)
    same_training(*train_twice(run_cli, recipe, tmp_path))


@pytest.mark.parametrize(
    ("trainer", "why"),
    [({"packing": True}, "packing builds its own batches"), ({"neftune_noise_alpha": 5.0}, "NEFTune")],
)
def test_where_lines_cannot_keep_the_loss_rows_stay_padded_and_the_plan_says_why(
    write_recipe: Write, run_cli: Cli, capfd: Any, trainer: dict[str, Any], why: str
) -> None:
    recipe = write_recipe(trainer=trainer)
    assert run_cli("plan", recipe, "--json") == 0
    plan = json.loads(capfd.readouterr().out)
    decision = next(one for one in plan["decisions"] if one["key"] == "batching")
    assert decision["value"] == "padded" and why in decision["reason"]
    assert run_cli("plan", recipe, "--set", "performance.batching=padding_free") == 2
    assert "performance.batching: padding_free is not supported here" in capfd.readouterr().err


@pytest.fixture
def without_checks() -> Iterator[None]:
    """Forget what was found of kernels, before a test and after it."""
    varlen_attention._chosen.cache_clear()
    yield
    varlen_attention._chosen.cache_clear()
    varlen_attention.rejected.clear()


def test_a_recipe_that_asks_for_padding_free_gets_it_where_no_kernel_works_and_a_note_says_which_failed(
    write_recipe: Write,
    run_cli: Cli,
    tmp_path: Path,
    capfd: Any,
    monkeypatch: pytest.MonkeyPatch,
    without_checks: None,
) -> None:
    def other_arguments(query: Any, key: Any, value: Any, *, scale: float) -> Any:
        raise AssertionError("never called")

    monkeypatch.setattr(varlen_attention, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", other_arguments)
    recipe = write_recipe(trainer={"max_steps": 2}, performance={"batching": "padding_free"})
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    found = read_json(tmp_path / "run" / "train.json")["batching"]
    assert found["kind"] == "padding_free" and found["attention"] == ["side by side"]
    assert found["rejected_kernels"]["efficient (float32)"].startswith("TypeError: ")
    assert 0 <= found["row_difference"] < 1e-3  # float32
    said = capfd.readouterr().err
    assert "the attention kernel efficient (float32) failed its check on this machine: TypeError: " in said
    assert "rows of similar length are batched together instead" in said and "padded batches are used" not in said


def test_full_determinism_begins_before_the_first_product(
    write_recipe: Write, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuBLAS reads its configuration once, and kernels are checked before the trainer is made."""
    seen = []

    def record(*given: Any, **more: Any) -> Any:
        seen.append((torch.are_deterministic_algorithms_enabled(), "CUBLAS_WORKSPACE_CONFIG" in os.environ))
        return load_base(*given, **more)

    kernels = ("CUDA_LAUNCH_BLOCKING", "FLASH_ATTENTION_DETERMINISTIC", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC")
    for name in ("CUBLAS_WORKSPACE_CONFIG", *kernels):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("peftcli.train.run.load_base", record)
    try:
        assert run_cli("train", write_recipe(trainer={"max_steps": 2, "full_determinism": True})) == 0
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    assert seen == [(True, True)]


def test_on_a_gpu_of_sm_80_rows_are_trained_by_a_kernel_that_was_checked_before(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_checks: None
) -> None:
    """The CPU is taken for such a GPU; the kernel computes what FlashAttention does."""
    monkeypatch.setattr(varlen_attention, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    checked: list[str] = []
    check, trained = varlen_attention.kernel_problem, StepTrainer.train

    def record(kernel: Any, *given: Any, **more: Any) -> str | None:
        checked.append(kernel)
        return check(kernel, *given, **more)

    def train(self: StepTrainer, *given: Any, **more: Any) -> Any:
        checked.append("training")
        return trained(self, *given, **more)

    monkeypatch.setattr(varlen_attention, "kernel_problem", record)
    monkeypatch.setattr(StepTrainer, "train", train)
    recipe = write_recipe(
        model={"dtype": "bfloat16"},
        quantization=None,
        trainer={"max_steps": 2, "activation_checkpointing": True},
        performance={"batching": "padding_free"},
    )
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    found = read_json(tmp_path / "run" / "train.json")["batching"]
    assert found["kind"] == "padding_free" and found["attention"] == ["flash"] and not found["rejected_kernels"]
    assert checked == ["flash", "training"]
