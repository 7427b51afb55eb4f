"""Padding-free batches with FlashAttention: what it is given, and that each row gives what it gives alone."""

from typing import Any

import pytest
import torch
from attention_kernels import rows_alone
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config, modeling_flash_attention_utils

from peftcli.model.padding_free import SequenceLayout, check_rows, enable_padding_free, kernels_used
from peftcli.train.micro_batch import MicroBatches

SMALL = {
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "mistral": MistralConfig(**SMALL, sliding_window=9),
}
LENGTHS = (3, 14, 1, 11)


class Flash:
    """The functions of the package flash-attn, as it documents them, computed by torch.

    Attributes:
        boundaries: `cu_seqlens_q` of each call for rows of different lengths.
        apart: False lets each token see all before it, whatever row it belongs to.
    """

    def __init__(self) -> None:
        self.boundaries: list[list[int]] = []
        self.apart = True

    def padded(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, causal: bool = False, **given: Any
    ) -> Tensor:
        """`flash_attn_func`: (rows, length, heads, size) each."""
        edges = torch.tensor([0, q.shape[1]], dtype=torch.int32)
        made = [self._rows(*row, edges, causal=causal, **given) for row in zip(q, k, v, strict=True)]
        return torch.stack(made)

    def varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        """`flash_attn_varlen_func`: (tokens, heads, size) each."""
        assert type(max_seqlen_q) is int and max_seqlen_k == max_seqlen_q == int(cu_seqlens_q.diff().max())
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert q.dim() == k.dim() == 3 and int(cu_seqlens_q[-1]) == int(cu_seqlens_k[-1]) == len(q) == len(k)
        self.boundaries.append(cu_seqlens_q.tolist())
        edges = cu_seqlens_q if self.apart else torch.tensor([0, len(q)], dtype=torch.int32)
        return self._rows(q, k, v, edges, softmax_scale=softmax_scale, causal=causal, window_size=window_size)

    def _rows(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        edges: Tensor,
        *,
        causal: bool,
        softmax_scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        assert causal
        return rows_alone(q, k, v, edges, int(edges.diff().max()), scale=softmax_scale, behind=window_size[0])


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Flash:
    """FlashAttention in the place where transformers imports it, without its package and its GPU."""
    made = Flash()
    functions = (made.padded, made.varlen, None, None, None)
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *given, **named: functions)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    return made


def model_of(family: str, attention: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="sdpa")
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = attention
    return model.train()


def padded_batch() -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 200, (len(LENGTHS), max(LENGTHS)), generator=drawn)
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": ids.where(mask, -100)}


def step_of(model: Any, micro_batches: MicroBatches) -> tuple[float, list[Tensor]]:
    """The summed loss of a step and its gradients."""

    def one(piece: dict[str, Any]) -> Tensor:
        given = {name: value for name, value in piece.items() if name != "labels"}
        logits = model(**given, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), piece["labels"][:, 1:].flatten(), reduction="sum"
        )
        loss.backward()
        return loss.detach()

    model.zero_grad()
    loss = micro_batches.run([padded_batch()], one, model.zero_grad, torch.enable_grad, 1)
    return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.numeric
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_flash_attention_without_padding_is_the_padded_step_of_sdpa(
    family: str, checkpointing: bool, flash: Flash
) -> None:
    expected, gradients = step_of(model_of(family, "sdpa"), MicroBatches(tokens=None))
    model = model_of(family, "flash_attention_2")
    assert enable_padding_free(model) and model.config._attn_implementation == "flash_attention_2"
    check = check_rows(model)
    assert check.problem is None and check.boundaries and kernels_used == {"flash_attention_2"}
    assert flash.boundaries == [[0, 6, 15]] * 2  # one call a layer; the rows alone go by the other function
    if checkpointing:
        model.activation_checkpointing_enable()
    flash.boundaries.clear()
    loss, ours = step_of(model, MicroBatches(tokens=100, boundaries=True))
    assert flash.boundaries == [[0, 3, 17, 18, 29]] * (4 if checkpointing else 2)
    # Sums in another order: some 30 tokens and two layers in float32.
    assert loss == pytest.approx(expected, rel=1e-5)
    for one, other in zip(ours, gradients, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()


def test_flash_attention_that_mixes_rows_is_found_before_training(flash: Flash) -> None:
    flash.apart = False
    model = model_of("llama", "flash_attention_3")
    assert enable_padding_free(model)
    assert "differ from those of the row alone" in (check_rows(model).problem or "")


def test_boundaries_are_those_that_trl_gives_its_own_padding_free_batches() -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [{"input_ids": list(range(3, 3 + length))} for length in LENGTHS]
    theirs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    ours = SequenceLayout(LENGTHS, torch.device("cpu")).boundaries()
    given = {name: value for name, value in theirs.items() if name not in ("input_ids", "labels", "position_ids")}
    assert "cu_seq_lens_q" in given and given.keys() <= ours.keys()
    for name, value in given.items():
        if torch.is_tensor(value):
            assert torch.equal(value, ours[name]) and value.dtype == ours[name].dtype, name
        else:
            assert value == ours[name], name


def test_the_stand_in_computes_causal_attention() -> None:
    q, k, v = (torch.randn(2, 7, 4, 8) for _ in range(3))
    wanted = scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)), is_causal=True)
    assert torch.allclose(Flash().padded(q, k, v, causal=True), wanted.transpose(1, 2), atol=1e-6)
