"""The plan knows which models cannot train rows in flat lines, as training itself finds out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, FalconConfig, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from peftcli.model.flat_rows import why_not_flat
from peftcli.model.padding_free import check_rows, enable_padding_free
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
    assert "FalconForCausalLM has its own attention" in capfd.readouterr().out
    assert run_cli("train", recipe, "--output-dir", tmp_path / "run") == 0
    assert "flat line" not in capfd.readouterr().err
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    train = json.loads((tmp_path / "run" / "train.json").read_text())
    assert plan["batching"]["kind"] == train["batching"]["kind"] == "padded"
    assert run_cli("plan", recipe, "--set", "performance.batching=padding_free") == 2
    assert "set padded or auto" in capfd.readouterr().err
