"""The plan knows which models cannot train rows in flat lines, as training itself finds out."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, FalconConfig, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from peftcli.model.flat_rows import why_not_flat
from peftcli.model.padding_free import CHECKED_ROWS, check_rows, enable_padding_free, takes_boundaries
from peftcli.tiny.build import stand_in
from peftcli.tiny.shrink import FAMILIES

FOUND = dict.fromkeys(name for _, name in FAMILIES)
CAUSAL = [family for family in FOUND if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
ATTENTION_OF_ITS_OWN = ("falcon",)
"""Families whose attention modules are chosen by name from a table of their own, which has no room for another."""
BOTH_WAYS = ("bert", "roberta", "xlm-roberta", "electra")
"""Encoders, where a token sees those behind it too."""
NO_SDPA = ("gptj", "gpt_neo", "bloom", "gemma2")
"""Families that the plan pads since they have no `sdpa`, which lines take the place of."""


@pytest.mark.parametrize("family", CAUSAL)
def test_a_plan_says_of_a_family_what_its_architecture_allows(family: str) -> None:
    said = why_not_flat(AutoConfig.for_model(family))
    if family in ATTENTION_OF_ITS_OWN:
        assert "its own attention" in said
    elif family in BOTH_WAYS:
        assert "mixes the rows of a padding-free batch" in said
    else:
        assert said == ""


@pytest.mark.parametrize("family", [family for family in CAUSAL if family not in NO_SDPA])
def test_a_plan_says_what_training_finds_on_the_model(family: str) -> None:
    folder = stand_in(AutoConfig.for_model(family))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    trains_flat = enable_padding_free(model) and check_rows(model).problem is None
    assert trains_flat == (why_not_flat(AutoConfig.from_pretrained(folder)) == "")


@pytest.mark.parametrize("alibi", [True, False])
def test_falcon_is_padded_with_and_without_alibi(alibi: bool) -> None:
    assert "FalconForCausalLM" in why_not_flat(FalconConfig(alibi=alibi))


HYBRID = {
    "qwen3_5_text": {},
    "qwen3_5_moe_text": {},
    "qwen3_next": {},
    "olmo_hybrid": {},
    "granitemoehybrid": {},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
}
"""Model types with layers that carry something from token to token, and settings where they have none by default."""


def known(families: Iterable[str]) -> list[str]:
    """Those that the installed transformers has."""
    return [family for family in families if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]


@pytest.mark.parametrize("family", known(HYBRID))
def test_without_kernels_that_keep_rows_apart_hybrid_models_are_padded(family: str) -> None:
    said = why_not_flat(AutoConfig.for_model(family, **HYBRID[family]))
    assert "would carry their state from row to row" in said and "flash-linear-attention" in said


@pytest.mark.parametrize("family", known(["qwen3_next", "lfm2"]))
def test_with_kernels_for_it_the_model_itself_is_asked_before_training(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AutoConfig.for_model(family, **HYBRID[family])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert why_not_flat(config) == ""
    model = AutoModelForCausalLM.from_pretrained(stand_in(config), attn_implementation="sdpa", dtype=torch.float32)
    assert takes_boundaries(model) and enable_padding_free(model)
    # Here the kernels are missing in truth, which transformers says, however little the random model carries over.
    assert "can't keep packed sequences apart" in (check_rows(model).problem or "")


def test_a_kernel_of_linear_attention_gets_the_boundaries_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    conv, rule = modeling.causal_conv1d_fn.__wrapped__, modeling.torch_chunk_gated_delta_rule.__wrapped__
    seen: list[list[int]] = []

    def conv_of_rows(hidden: Tensor, *given: Any, seq_idx: Tensor | None = None, **named: Any) -> Tensor:
        parts = [hidden] if seq_idx is None else hidden.split(seq_idx[0].bincount().tolist(), 2)
        return torch.cat([conv(part, *given, activation=named["activation"]) for part in parts], 2)

    def rule_of_rows(*parts: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor | None = None, **named: Any) -> Any:
        lengths = [g.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()
        seen.append(lengths)
        kept = {name: named[name] for name in ("output_final_state", "use_qk_l2norm_in_kernel")}
        rows = zip(*(part.split(lengths, 1) for part in (*parts, g, beta)), strict=True)
        return torch.cat([rule(*row[:3], g=row[3], beta=row[4], **kept)[0] for row in rows], 1), None

    monkeypatch.setattr(modeling, "causal_conv1d_fn", conv_of_rows)
    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", rule_of_rows)
    folder = stand_in(AutoConfig.for_model("qwen3_next"))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    assert enable_padding_free(model)
    check = check_rows(model)
    assert check.problem is None and check.boundaries
    assert seen[0] == [6] and seen[-1] == list(CHECKED_ROWS)


def test_a_plan_draws_no_random_number_and_changes_no_configuration() -> None:
    config = LlamaConfig()
    before = config.to_dict()
    state = torch.get_rng_state()
    why_not_flat(config)
    assert torch.equal(torch.get_rng_state(), state)
    assert config.to_dict() == before


def test_training_does_what_the_plan_of_falcon_says(
    write_recipe: Callable[..., Path], run_cli: Callable[..., int], tmp_path: Path, capfd: Any
) -> None:
    folder = stand_in(AutoConfig.for_model("falcon"))
    recipe = write_recipe(model={"name": str(folder)}, quantization=None, trainer={"max_steps": 2})
    assert run_cli("plan", recipe) == 0
    assert "has its own attention" in " ".join(capfd.readouterr().out.split())
    assert run_cli("train", recipe, "--output-dir", tmp_path / "run") == 0
    assert "flat line" not in capfd.readouterr().err
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    train = json.loads((tmp_path / "run" / "train.json").read_text())
    assert plan["batching"]["kind"] == train["batching"]["kind"] == "padded"
    assert run_cli("plan", recipe, "--set", "performance.batching=padding_free") == 2
    assert "set padded or auto" in capfd.readouterr().err
