"""The forecast of the optimizer's state is compared with the state that the real optimizers make."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, _get_bitsandbytes_optimizer

from peftcli.adapters.build import peft_config
from peftcli.model.heads import build_empty
from peftcli.model.inspect import count_trainable, sort_trained
from peftcli.plan.optimizer import Trained, is_bitsandbytes, optimizer_bytes
from peftcli.recipe.schema import AdapterSection
from peftcli.train.precision import upcast_trainable

WIDTHS = {"float32": 4, "bfloat16": 2}
CASES = {
    "full": AdapterSection(method="full"),
    "lora": AdapterSection(r=8),
    "embeddings": AdapterSection(r=8, modules_to_save=("embed_tokens",)),
    "both ends": AdapterSection(r=8, modules_to_save=("embed_tokens", "lm_head")),
    "both ends, tied": AdapterSection(
        r=8, modules_to_save=("embed_tokens", "lm_head"), arguments={"ensure_weight_tying": True}
    ),
    "head alone": AdapterSection(r=8, modules_to_save=("lm_head",)),
    "last block and ends": AdapterSection(
        method="freeze", arguments={"last_layers": 1, "head": True, "embeddings": True}
    ),
    "prompt": AdapterSection(method="prompt", arguments={"num_virtual_tokens": 80}),
}


@pytest.fixture(autouse=True)
def no_overrides_left() -> Iterator[None]:
    """bitsandbytes remembers the parameters of `nn.Embedding` modules by their ids, which later ones may have again."""
    GlobalOptimManager.get_instance().initialize()
    yield
    GlobalOptimManager.get_instance().initialize()


def tied_config(*, tied: bool = True) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=tied,
    )


def adapted(adapter: AdapterSection, *, tied: bool = True) -> Any:
    """The real model, with its weights, as PEFT wraps it for training."""
    return get_peft_model(LlamaForCausalLM(tied_config(tied=tied)), peft_config(adapter, "causal-lm"))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("case", CASES)
def test_each_stored_parameter_is_counted_once(case: str, tied: bool) -> None:
    counted = count_trainable(build_empty("tiny", tied_config(tied=tied)), CASES[case], "causal-lm")
    assert counted == sort_trained(adapted(CASES[case], tied=tied))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_full_tuning_trains_as_many_weights_as_the_model_has(tied: bool) -> None:
    model = build_empty("tiny", tied_config(tied=tied))
    parameters = model.num_parameters()
    assert count_trainable(model, CASES["full"], "causal-lm").parameters == parameters


def state_of(model: Any, optimizer: str, folder: Path) -> tuple[int, int]:
    """Bytes of the state after one step as `Trainer` makes it, and the number of trained tensors.

    The table of the 256 values that a byte stands for is shared by all tensors, and left out.
    """
    arguments = TrainingArguments(output_dir=str(folder), optim=optimizer, use_cpu=True, report_to=[])
    trainer = Trainer(model=model, args=arguments)
    made = trainer.create_optimizer()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    made.step()
    kept = 0
    for state in made.state.values():
        kept += sum(
            value.numel() * value.element_size()
            for name, value in state.items()
            if torch.is_tensor(value) and not name.startswith("qmap")
        )
    return kept, len(trained)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize(
    "optimizer",
    [
        *("adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "rmsprop"),
        *("adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "lion_32bit"),
        *("ademamix", "ademamix_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit"),
    ],
)
@pytest.mark.parametrize("case", ["full", "embeddings"])
def test_the_forecast_of_the_state_is_what_the_optimizer_keeps(
    case: str, optimizer: str, dtype: str, tmp_path: Path
) -> None:
    model = adapted(CASES[case])
    upcast_trainable(model, dtype)
    kept, tensors = state_of(model, optimizer, tmp_path)
    forecast = optimizer_bytes(optimizer, sort_trained(model), WIDTHS[dtype])
    # Of each tensor: a step count, and for each of up to three states the scale of a block that is not full.
    assert kept == pytest.approx(forecast, abs=16 * tensors)


def test_trained_embeddings_keep_a_wide_state_with_8_bit_adam() -> None:
    trained = count_trainable(build_empty("tiny", tied_config()), CASES["embeddings"], "causal-lm")
    assert trained.embeddings == 512 * 64
    as_if_narrow = optimizer_bytes("adamw_8bit", Trained(trained.parameters, small=trained.small))
    narrow = 2 * (1 + 4 / 256)
    assert optimizer_bytes("adamw_8bit", trained) - as_if_narrow == pytest.approx((8 - narrow) * 512 * 64, abs=1)


def test_bitsandbytes_optimizers_are_told_by_their_names() -> None:
    for name, handler in _OPTIMIZER_HANDLERS.items():
        assert is_bitsandbytes(str(name.value)) == (handler is _get_bitsandbytes_optimizer), name
