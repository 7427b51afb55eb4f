"""Attention on GPUs that share keys and values among query heads in no fused kernel, rows in a line or not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import base_of
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peftcli.model import padding_free
from peftcli.model.load import load_base
from peftcli.model.padding_free import enable_padding_free

IDS = torch.arange(5, 25).reshape(2, 10)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each call of torch's attention was left to share keys and values itself."""
    asked: list[bool] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def record(*given: Any, enable_gqa: bool = False, **more: Any) -> torch.Tensor:
        asked.append(enable_gqa)
        return attention(*given, enable_gqa=enable_gqa, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    yield asked
    AttentionInterface.register("sdpa", sdpa_attention_forward)


@pytest.mark.numeric
@pytest.mark.parametrize("padding_free_too", [False, True])
def test_a_gpu_before_sm_80_gets_keys_for_every_query_head(
    tiny_llama: Path, shared: list[bool], monkeypatch: pytest.MonkeyPatch, padding_free_too: bool
) -> None:
    logits = []
    for old_gpu in (False, True):
        monkeypatch.setattr(padding_free, "repeats_heads", lambda device, old_gpu=old_gpu: old_gpu)
        model = load_base(base_of(tiny_llama, None))
        assert not padding_free_too or enable_padding_free(model)
        shared.clear()
        with torch.no_grad():
            logits.append(model(input_ids=IDS, use_cache=False).logits)
        assert shared == [not old_gpu] * model.config.num_hidden_layers
    torch.testing.assert_close(*logits)


def test_only_gpus_before_sm_80_lack_such_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, repeats in (((6, 0), True), ((7, 5), True), ((8, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert padding_free.repeats_heads(torch.device("cuda")) is repeats
    assert not padding_free.repeats_heads(torch.device("cpu"))
