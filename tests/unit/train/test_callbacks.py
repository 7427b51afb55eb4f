"""How the blocks run: some checkpointed, inputs not cast twice; the losses stay what they were."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from peftcli.model.checkpoint_random import RandomStateCheckpoint, save_random_states, skip_random_states
from peftcli.train.callbacks import ForwardCallback, _state_restored, cast_inputs, keep_checkpointed

FUNCTION = "_gradient_checkpointing_func"
"""Attribute of transformers' layers."""

LLAMA = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=128,
)


def adapted(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LLAMA).to(dtype)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def gradients(model: Any, *, autocast: bool = False) -> tuple[float, list[torch.Tensor], int]:
    """The loss, the gradients, and the bytes that the forward pass keeps."""
    kept: dict[int, torch.Tensor] = {}
    owned = {part.untyped_storage().data_ptr() for part in (*model.parameters(), *model.buffers())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in owned:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(96).reshape(2, 48) % 250
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    loss.backward()
    return loss.item(), [part.grad for part in model.parameters() if part.requires_grad], size


@pytest.mark.numeric
def test_the_first_blocks_stay_checkpointed_and_loss_and_gradients_stay_the_same() -> None:
    plain = gradients(adapted(lora_dropout=0.1))
    sizes = []
    for blocks in (4, 2):
        model = adapted(lora_dropout=0.1)
        model.enable_input_require_grads()
        model.activation_checkpointing_enable()
        assert keep_checkpointed(model, blocks) == blocks
        layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
        assert [layer.gradient_checkpointing for layer in layers] == [number < blocks for number in range(4)]
        loss, grads, size = gradients(model)
        assert loss == plain[0]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads, plain[1], strict=True))
        sizes.append(size)
    assert sizes[0] < sizes[1] < plain[2]


@pytest.mark.numeric
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.1}, {"use_dora": True}], ids=["lora", "dropout", "dora"])
def test_without_casts_loss_and_gradients_are_the_same_and_less_is_kept(settings: dict[str, Any]) -> None:
    before = gradients(adapted(torch.bfloat16, **settings), autocast=True)
    model = adapted(torch.bfloat16, **settings)
    cast_inputs(model, False)
    loss, grads, size = gradients(model, autocast=True)
    assert loss == before[0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads, before[1], strict=True))
    # Where the cast would change more than memory, it stays.
    assert size == before[2] if settings else size < 0.95 * before[2]


def test_adapters_cast_again_after_training() -> None:
    model = adapted(torch.bfloat16)
    cast_inputs(model, False)
    cast_inputs(model, True)
    with torch.no_grad():  # without autocast, as an evaluation runs
        assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_taking_a_pass_back_asks_no_other_gpu_for_its_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several GPUs torch saves the states of all, with a warning, unless it is told which; here it cannot."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    pieces = SimpleNamespace(real=1, padded=2)
    trainer: Any = SimpleNamespace(args=SimpleNamespace(device=torch.device("cpu")), micro_batches=pieces)
    model, before = torch.nn.Linear(2, 2), torch.get_rng_state()
    with _state_restored(trainer, model):
        torch.rand(3)
        pieces.real = 7
    assert torch.equal(torch.get_rng_state(), before) and pieces.real == 1


def checkpointed(**settings: Any) -> Any:
    model = adapted(**settings)
    model.enable_input_require_grads()
    model.activation_checkpointing_enable()
    return model


class Drawing(torch.nn.Module):
    """A layer with noise of its own, which no setting of dropout tells of."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + 0.1 * torch.randn_like(inputs)


def add_noise(model: Any, block: int) -> None:
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    layers[block].mlp = torch.nn.Sequential(layers[block].mlp, Drawing())


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("dropout", "noisy", "saving"),
    [(0.0, (), 0), (0.0, (1,), 1), (0.1, (), 4)],
    ids=["plain", "noise in one layer", "dropout"],
)
def test_only_layers_that_draw_random_numbers_save_their_state_and_the_bits_are_the_same(
    dropout: float, noisy: tuple[int, ...], saving: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for skips in (False, True):
        model = checkpointed(lora_dropout=dropout)
        for block in noisy:
            add_noise(model, block)
        assert not skips or skip_random_states(model, torch.device("cpu")) == 4
        passes = []
        for _ in range(2):  # the first finds out, the second makes use of it
            model.zero_grad()
            loss, grads, _ = gradients(model)
            passes.append((loss, [grad.clone() for grad in grads]))
        results.append(passes)
    for plain, ours in zip(*results, strict=True):
        assert plain[0] == ours[0]
        assert all(torch.equal(one, other) for one, other in zip(plain[1], ours[1], strict=True))
    saved, get = [], torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: saved.append(1) or get())
    ids = torch.arange(96).reshape(2, 48) % 250
    model(input_ids=ids, use_cache=False)
    assert len(saved) == saving
    save_random_states(model)
    model(input_ids=ids, use_cache=False)
    assert len(saved) == saving + 4


def test_a_setting_of_the_recipe_for_random_states_is_left_alone() -> None:
    model = adapted()
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": True})
    assert skip_random_states(model, torch.device("cpu")) == 0


@pytest.mark.parametrize(("checkpoints", "used"), [(True, {"skip_rng_state"}), (False, set())])
def test_training_skips_random_states_where_layers_are_checkpointed(checkpoints: bool, used: set[str]) -> None:
    model = checkpointed() if checkpoints else adapted()
    callback = ForwardCallback(None, frozenset({"skip_rng_state"}), lambda line: None)
    arguments: Any = SimpleNamespace(bf16=False, fp16=False, device=torch.device("cpu"))
    callback.on_train_begin(arguments, None, None, model=model)  # type: ignore[arg-type]  # it reads neither
    assert callback.optimizations == used
    wrapped = [part for part in model.modules() if isinstance(part.__dict__.get(FUNCTION), RandomStateCheckpoint)]
    assert len(wrapped) == (4 if checkpoints else 0)
    callback.on_train_end(arguments, None, None, model=model)  # type: ignore[arg-type]
    assert not any(isinstance(part.__dict__.get(FUNCTION), RandomStateCheckpoint) for part in model.modules())
