"""How the blocks run: some checkpointed, inputs not cast twice; the losses stay what they were."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from peftcli.train.callbacks import _state_restored, cast_inputs, keep_checkpointed

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
