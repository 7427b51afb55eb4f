"""The tuners of ours: in their place, of the size of the paper, no effect at first, saved and loaded like PEFT's."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comparisons import without_repacking
from peft import PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from peftcli.adapters.bottleneck import BottleneckConfig, BottleneckLayer
from peftcli.adapters.full import WholeConfig, WholeLayer
from peftcli.adapters.module_layout import all_widths, hidden_width, read_layout
from peftcli.adapters.register import register
from peftcli.merge.fold import fold
from peftcli.model.files import loaded_weights
from peftcli.plan.module_layout import bottleneck_targets
from peftcli.run_dir import read_json

IDS = torch.arange(24).reshape(2, 12) % 60 + 3
FAMILIES = {
    "llama": (["self_attn.o_proj", "mlp.down_proj"], {}),
    "qwen3": (["self_attn.o_proj", "mlp.down_proj"], {"head_dim": 16}),
    "gpt2": (["attn.c_proj", "mlp.c_proj"], {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64}),
    "opt": (["self_attn.out_proj", "fc2"], {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt_neox": (["attention.dense", "mlp.dense_4h_to_h"], {}),
    "phi": (["self_attn.dense", "mlp.fc2"], {}),
    "phi3": (["self_attn.o_proj", "mlp.down_proj"], {"pad_token_id": 0}),
    "gemma2": (["self_attn.o_proj", "mlp.down_proj"], {"head_dim": 16, "num_key_value_heads": 1}),
    "falcon": (["self_attention.dense", "mlp.dense_4h_to_h"], {}),
    "bert": (["attention.output.dense", "output.dense"], {}),
    "roberta": (["attention.output.dense", "output.dense"], {}),
    "distilbert": (["attention.out_lin", "ffn.lin2"], {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 48}),
    "deberta-v2": (["attention.output.dense", "output.dense"], {}),
    "electra": (["attention.output.dense", "output.dense"], {"embedding_size": 32}),
    "modernbert": (["attn.Wo", "mlp.Wo"], {"pad_token_id": 0}),
}
ENCODERS = ("bert", "roberta", "distilbert", "deberta-v2", "electra", "modernbert")
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def registered() -> None:
    register()
    torch.manual_seed(0)


def small(family: str = "llama", **more: object) -> PreTrainedModel:
    """A random model of three blocks, 32 wide."""
    own = FAMILIES[family][1]
    config = AutoConfig.for_model(family, **{**SMALL, **own, **more})
    kind = AutoModelForSequenceClassification if family in ENCODERS else AutoModelForCausalLM
    model: PreTrainedModel = kind.from_config(config).eval()
    return model


def places(model: PreTrainedModel, placement: str) -> list[str]:
    return bottleneck_targets(all_widths(model), hidden_width(model), placement)


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def train_a_little(model: nn.Module, rate: float = 0.05) -> None:
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=rate)
    for _ in range(3):
        output = model(input_ids=IDS).logits
        output.float().pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def trainable(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bottleneck_stands_behind_attention_and_feed_forward_of_each_block(family: str) -> None:
    found = places(small(family), "houlsby")
    assert len(found) == 6
    for place, leaf in zip(found, FAMILIES[family][0] * 3, strict=True):
        assert place.endswith("." + leaf), (place, leaf)


@pytest.mark.parametrize("family", FAMILIES)
def test_pfeiffer_stands_behind_the_feed_forward_alone(family: str) -> None:
    found = places(small(family), "pfeiffer")
    assert len(found) == 3 and all(place.endswith("." + FAMILIES[family][0][1]) for place in found)


@pytest.mark.numeric
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("placement", "count"), [("houlsby", 6), ("pfeiffer", 3)])
def test_a_bottleneck_has_the_parameters_of_the_paper_and_changes_nothing_at_first(
    family: str, placement: str, count: int
) -> None:
    model = small(family)
    before = logits(model)
    tuned = get_peft_model(model, BottleneckConfig(placement=placement, reduction_factor=4))
    width, hidden = 32, 8
    assert trainable(tuned) == count * (2 * hidden * width + width + hidden)
    assert torch.equal(logits(tuned), before)


@pytest.mark.numeric
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_trained_bottleneck_reloads_to_the_same_bits_and_off_is_the_base(family: str, tmp_path: Path) -> None:
    model = small(family)
    before = logits(model)
    model.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(model, BottleneckConfig(placement="houlsby", reduction_factor=4, non_linearity="gelu"))
    train_a_little(tuned)
    after = logits(tuned)
    assert not torch.allclose(after, before)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), before)
    tuned.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again), after)
    assert again.active_peft_config.non_linearity == "gelu"


RELOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from peftcli.adapters.register import register
register()
for adapter in sys.argv[2:]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), adapter).eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.arange(24).reshape(2, 12) % 60 + 3).logits, f"{adapter}/logits.pt")
"""


@pytest.mark.numeric
def test_adapters_of_ours_reload_in_a_fresh_process(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path / "base")
    expected = {}
    for name, config in (("bottleneck", BottleneckConfig()), ("freeze", WholeConfig(last_layers=1, head=True))):
        tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
        train_a_little(tuned)
        tuned.save_pretrained(tmp_path / name)
        expected[name] = logits(tuned)
    script = [sys.executable, "-c", RELOAD, tmp_path / "base", *(tmp_path / name for name in expected)]
    subprocess.run(script, check=True)
    for name, answer in expected.items():
        assert torch.equal(torch.load(tmp_path / name / "logits.pt"), answer), name


def test_a_bottleneck_cannot_be_merged_and_says_why() -> None:
    tuned = get_peft_model(small(), BottleneckConfig())
    with pytest.raises(ValueError, match="not linear"):
        tuned.merge_and_unload()
    layer = next(module for module in tuned.modules() if isinstance(module, BottleneckLayer))
    with pytest.raises(NotImplementedError, match="not linear"):
        layer.merge()


def test_a_bottleneck_stands_in_the_blocks_that_are_asked_for() -> None:
    tuned = get_peft_model(small(), BottleneckConfig(layers=[2]))
    names = [name for name, module in tuned.named_modules() if isinstance(module, BottleneckLayer)]
    assert names == [f"base_model.model.model.layers.2.{leaf}" for leaf in FAMILIES["llama"][0]]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"placement": "parallel"}, "must be houlsby or pfeiffer"),
        ({"layers": [3]}, r"layers \[3\]: this model has 3 blocks, numbered 0 to 2"),
        ({"non_linearity": "rellu"}, "non_linearity rellu"),
        ({"reduction_factor": 0}, "must be above 0"),
    ],
)
def test_a_bottleneck_that_cannot_be_is_refused(config: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        get_peft_model(small(), BottleneckConfig(**config))


def test_a_model_whose_feed_forward_is_made_of_experts_is_refused_with_the_mend() -> None:
    config = AutoConfig.for_model("mixtral", **SMALL, num_local_experts=2)
    with pytest.raises(ValueError, match=r"feed-forward part of model\.layers\.0\..* adapter\.target_modules"):
        places(AutoModelForCausalLM.from_config(config), "houlsby")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
def test_the_parts_of_a_model_are_told_apart(family: str) -> None:
    model = small(family)
    parts = read_layout(model)
    assert len(parts.blocks) == 3
    found = {*parts.ends, *parts.before, *parts.after, *(name for block in parts.blocks for name in block)}
    owned = {name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
    assert found == owned
    assert any("norm" in name.lower() or "ln_f" in name or "pooler" in name for name in parts.after)
    assert all("embed" in name or "wpe" in name for name in parts.before)


FREEZES: dict[str, Callable[[], WholeConfig]] = {
    "last two": lambda: WholeConfig(last_layers=2),
    "one in the middle": lambda: WholeConfig(layers=[1]),
    "head": lambda: WholeConfig(head=True),
    "embeddings": lambda: WholeConfig(embeddings=True),
    "full": lambda: WholeConfig(everything=True),
}


@pytest.mark.numeric
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", FREEZES)
def test_whole_modules_train_reload_and_merge_exactly(family: str, kind: str, tied: bool, tmp_path: Path) -> None:
    model = small(family, tie_word_embeddings=tied)
    before = logits(model)
    model.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(model, FREEZES[kind]())
    assert torch.equal(logits(tuned), before)
    train_a_little(tuned)
    after = logits(tuned)
    assert not torch.allclose(after, before)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), before)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again), after)
    if not tied:
        assert torch.equal(logits(again.merge_and_unload()), after)


@pytest.mark.numeric
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_full_tuning_trains_every_parameter_and_ties_what_the_base_ties(family: str) -> None:
    for tied in (True, False):
        model = small(family, tie_word_embeddings=tied)
        total = model.num_parameters()
        tuned = get_peft_model(model, WholeConfig(everything=True))
        assert trainable(tuned) == total
        train_a_little(tuned)
        ends = tuned.get_input_embeddings().weight, tuned.get_output_embeddings().weight
        assert torch.equal(*ends) == tied


def test_freezing_trains_the_last_blocks_and_nothing_else() -> None:
    model = small()
    block = sum(weight.numel() for weight in model.model.layers[2].parameters())
    tuned = get_peft_model(model, WholeConfig(last_layers=2))
    assert trainable(tuned) == 2 * block
    touched = {name for name, weight in tuned.named_parameters() if weight.requires_grad}
    assert all(".layers.1." in name or ".layers.2." in name for name in touched)


@pytest.mark.numeric
def test_the_head_of_a_classifier_is_trained_beside_the_frozen_blocks(tmp_path: Path) -> None:
    model = small("bert")
    before = logits(model)
    tuned = get_peft_model(model, WholeConfig(last_layers=1, head=True, task_type=TaskType.SEQ_CLS))
    train_a_little(tuned)
    after = logits(tuned)
    assert any("classifier.modules_to_save" in name for name, one in tuned.named_parameters() if one.requires_grad)
    assert not any("whole_copy" in name and "classifier" in name for name, _ in tuned.named_parameters())
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), before)
    tuned.save_pretrained(tmp_path)
    torch.manual_seed(0)
    assert torch.equal(logits(PeftModel.from_pretrained(small("bert"), tmp_path)), after)


@pytest.mark.numeric
def test_what_a_batch_norm_counts_in_training_is_saved_and_merged_too(tmp_path: Path) -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 6 * 6, 2))

    images = torch.randn(8, 3, 8, 8)
    tuned = get_peft_model(net(), WholeConfig(target_modules=["0", "1"]))
    before = net().eval()(images)
    tuned.train()
    optimizer = torch.optim.SGD([weight for weight in tuned.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(3):
        tuned(images).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = tuned.eval()(images)
    with tuned.disable_adapter():
        assert torch.equal(tuned(images), before)
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path).eval()
    assert torch.equal(again(images), after)
    assert torch.equal(again.merge_and_unload().eval()(images), after)


def test_rows_of_the_embedding_can_be_trained_beside_frozen_blocks() -> None:
    model = small(tie_word_embeddings=False)
    tuned = get_peft_model(model, WholeConfig(last_layers=1, trainable_token_indices=[5, 7]))
    block = sum(weight.numel() for weight in model.model.layers[2].parameters() if weight.requires_grad)
    assert trainable(tuned) == block + 2 * 32


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"last_layers": 4}, "last_layers 4: this model has 3"),
        ({"layers": [0, 7]}, r"layers \[7\]: this model has 3 blocks, numbered 0 to 2"),
        ({}, "no module is trained; set last_layers"),
    ],
)
def test_a_freezing_that_cannot_be_is_refused(config: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        get_peft_model(small(), WholeConfig(**config))


@pytest.fixture(params=["llama", "gpt2"])
def quantized(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    """A small model in NF4."""
    from transformers import BitsAndBytesConfig

    wide = {"n_embd": 64} if request.param == "gpt2" else {"hidden_size": 64, "intermediate_size": 128}
    small(request.param, **wide).save_pretrained(tmp_path / "base")
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=packing)
    without_repacking(model)
    return model


@pytest.mark.numeric
@pytest.mark.parametrize("config", [lambda: BottleneckConfig(), lambda: WholeConfig(last_layers=1)])
def test_over_4_bit_weights_the_first_logits_are_the_base_s_and_training_goes_on_in_float32(
    quantized: PreTrainedModel, config: Callable[[], BottleneckConfig]
) -> None:
    before = logits(quantized)
    tuned = get_peft_model(quantized, config())
    assert (logits(tuned) - before).abs().max() < 1e-5
    assert {weight.dtype for weight in tuned.parameters() if weight.requires_grad} == {torch.float32}
    train_a_little(tuned)
    assert (logits(tuned) - before).abs().max() > 1e-3
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), before)


def test_full_tuning_of_4_bit_weights_is_refused(quantized: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="quantized weights, which have no gradient"):
        get_peft_model(quantized, WholeConfig(everything=True))


@pytest.mark.numeric
def test_copies_that_were_rounded_are_made_equal_to_the_base_again(quantized: PreTrainedModel) -> None:
    tuned = get_peft_model(quantized, WholeConfig(last_layers=1))
    before = logits(tuned)
    layers = [module for module in tuned.modules() if isinstance(module, WholeLayer)]
    for layer in layers:  # as TRL does with what is trainable over a quantized base
        for weight in layer.whole_copy.parameters():
            weight.data = weight.data.bfloat16().float()
    assert not torch.equal(logits(tuned), before)
    for layer in layers:
        layer.restore()
    assert torch.equal(logits(tuned), before)


@pytest.mark.numeric
def test_a_copy_in_float32_over_a_bfloat16_base_answers_in_bfloat16_and_narrows_to_it() -> None:
    model = small().bfloat16()
    before = logits(model)
    tuned = get_peft_model(model, WholeConfig(last_layers=2))
    for weight in tuned.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    assert logits(tuned).dtype == torch.bfloat16 and (logits(tuned) - before).abs().max() < 0.05
    for module in tuned.modules():
        if isinstance(module, WholeLayer):
            module.narrow()
    assert torch.equal(logits(tuned), before)


Cli = Callable[..., int]
Write = Callable[..., Path]
METHODS_OF_OURS: dict[str, dict[str, object]] = {
    "bottleneck": {"method": "bottleneck", "r": None, "reduction_factor": 8, "placement": "pfeiffer"},
    "freeze": {"method": "freeze", "r": None, "last_layers": 1, "head": True},
}


@pytest.mark.numeric
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("name", METHODS_OF_OURS)
def test_a_run_trains_saves_and_is_evaluated_again_to_the_same_loss(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, name: str, quantized: bool
) -> None:
    more = {} if quantized else {"quantization": None}
    assert run_cli("train", write_recipe(adapter=METHODS_OF_OURS[name], **more), "--output-dir", "run") == 0
    before = read_json(tmp_path / "run" / "metrics.json")
    assert before["adapter"]["loss"] < before["base"]["loss"] - 0.05
    assert run_cli("eval", "run") == 0
    again = read_json(tmp_path / "run" / "metrics.json")
    assert again["adapter"]["loss"] == pytest.approx(before["adapter"]["loss"], abs=1e-5)
    assert again["base"]["loss"] == pytest.approx(before["base"]["loss"], abs=1e-5)


@pytest.mark.numeric
@pytest.mark.parametrize("name", METHODS_OF_OURS)
def test_a_stopped_run_goes_on_to_the_same_bits(write_recipe: Write, run_cli: Cli, tmp_path: Path, name: str) -> None:
    recipe = write_recipe(adapter=METHODS_OF_OURS[name], trainer={"max_steps": 4, "save_steps": 2})
    assert run_cli("train", recipe, "--output-dir", "whole") == 0
    run = Path(shutil.copytree(tmp_path / "whole", tmp_path / "run"))
    for file in ("train.json", "metrics.json", "eval.json"):
        (run / file).unlink()
    for folder in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(run / folder)
    assert run_cli("train", recipe, "--output-dir", "run", "--resume") == 0
    weights = "adapter/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_frozen_and_trained_blocks_merge_without_any_drift(write_recipe: Write, run_cli: Cli, tmp_path: Path) -> None:
    assert run_cli("train", write_recipe(adapter=METHODS_OF_OURS["freeze"]), "--output-dir", "run") == 0
    assert run_cli("merge", "run") == 0
    found = read_json(tmp_path / "run" / "merge.json")
    assert found["max_abs_logit_difference"] == 0.0 and found["top1_agreement"] == 1.0


def test_the_merge_of_a_bottleneck_is_refused_with_the_reason(
    write_recipe: Write, run_cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(adapter=METHODS_OF_OURS["bottleneck"], trainer={"max_steps": 1})
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    assert run_cli("merge", "run") in (2, 4)
    assert "is not linear, so it cannot be folded into a weight" in capfd.readouterr().err


def test_a_merged_model_of_tied_ends_that_were_trained_together_stays_tied(tmp_path: Path) -> None:
    small(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    for name, config, unties in (("both", WholeConfig(head=True), False), ("none", WholeConfig(last_layers=1), False)):
        tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
        train_a_little(tuned)
        tuned.save_pretrained(tmp_path / name, save_embedding_layers=False)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        folded = fold(base, tmp_path / name, loaded_weights(base))
        assert folded.unties == unties and "lm_head.weight" not in folded.sizes


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"method": "full", "r": None}, "adapter.method full does not work on 4-bit weights"),
        ({"method": "freeze", "r": 8}, "adapter.r has no effect with freeze, which has no rank"),
        ({"method": "freeze", "r": None, "target_modules": ["q_proj"]}, "has no effect with freeze"),
        ({"method": "freeze", "r": None, "last_layer": 2}, "did you mean adapter.last_layers?"),
        ({"method": "bottleneck", "r": None, "placement": "houlsbi"}, "did you mean houlsby?"),
        ({"method": "bottleneck", "r": None, "non_linearity": "rely"}, "did you mean relu?"),
    ],
)
def test_what_a_method_of_ours_cannot_do_is_said_before_anything_is_loaded(
    write_recipe: Write, run_cli: Cli, adapter: dict[str, object], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("validate", write_recipe(adapter=adapter)) == 2
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"method": "freeze", "r": None, "last_layers": 3}, "last_layers 3: this model has 2"),
        ({"method": "freeze", "r": None, "last_layers": 0}, "no module is trained; set adapter.last_layers"),
        ({"method": "bottleneck", "r": None, "layers": [2]}, "adapter.layers [2]: this model has 2 blocks"),
        ({"method": "bottleneck", "r": None, "reduction_factor": -1}, "must be above 0"),
    ],
)
def test_what_does_not_fit_the_model_is_said_by_the_plan(
    write_recipe: Write, run_cli: Cli, adapter: dict[str, object], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("plan", write_recipe(adapter=adapter)) == 2
    assert said in capfd.readouterr().err


def test_the_plan_counts_what_is_trained_of_the_base(
    write_recipe: Write, run_cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(adapter={"method": "full", "r": None}, quantization=None)
    assert run_cli("plan", recipe) == 0
    said = r"^trainable +656,000 parameters +100\.00% of the 656,000 base"
    assert re.search(said, capfd.readouterr().out, re.M)
