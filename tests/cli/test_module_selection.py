"""The choice by gradient: its norms are autograd's, its budget holds, planted modules are found, a run keeps it."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import without_repacking
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from peftcli.adapters.module_layout import all_widths
from peftcli.errors import Diverged, RecipeError
from peftcli.methods.registry import METHODS
from peftcli.model.gradients import gradient_matrices, gradient_norms, squared_norm
from peftcli.model.inspect import count_on_layer, count_trainable
from peftcli.plan.module_selection import Selection, choose_layers, choose_modules
from peftcli.recipe.schema import AdapterSection
from peftcli.run_dir import read_json

Cli = Callable[..., int]
Write = Callable[..., Path]


def small(family: str = "llama", layers: int = 4) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers}
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": layers, "n_head": 2, "n_positions": 64}
    else:
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, vocab_size=64, tie_word_embeddings=False, **sizes)
    )
    return model


def batches(count: int = 3, rows: int = 4, tokens: int = 12) -> list[dict[str, torch.Tensor]]:
    drawn = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 64, (rows, tokens), generator=drawn) for _ in range(count)]
    return [{"input_ids": one, "labels": one} for one in ids]


def loss(model: Any, batch: Any) -> torch.Tensor:
    found: torch.Tensor = model(**batch).loss
    return found


def linear_names(model: PreTrainedModel) -> list[str]:
    return [name for name in all_widths(model) if name != "lm_head"]


@pytest.mark.numeric
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tokens", [4, 40])
def test_the_norms_are_those_of_the_gradients_that_autograd_makes(family: str, tokens: int) -> None:
    model, data = small(family, 2).eval(), batches(tokens=tokens)
    names = linear_names(model)
    wanted = dict.fromkeys(names, 0.0)
    for batch in data:
        model.zero_grad()
        loss(model, batch).backward()
        for name in names:
            gradient = model.get_submodule(name).weight.grad
            wanted[name] += float(gradient.norm()) / len(data) / math.sqrt(gradient.numel())
    model.zero_grad()
    found = gradient_norms(model, names, data, loss)
    assert list(found) == names
    assert found == pytest.approx(wanted, rel=1e-4)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = small(layers=1).train()
    model.lm_head.weight.requires_grad_(False)
    gradient_norms(model, linear_names(model), batches(1), loss)
    assert model.training
    assert all(weight.grad is None for weight in model.parameters())
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == ["lm_head.weight"]
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.numeric
def test_the_gradients_themselves_are_those_of_autograd() -> None:
    model, data = small(layers=1).eval(), batches(2)
    found = gradient_matrices(model, linear_names(model), data, loss)
    for batch in data:
        loss(model, batch).backward()
    for name, gradient in found.items():
        assert torch.allclose(gradient, model.get_submodule(name).weight.grad, atol=1e-6)


@pytest.mark.numeric
def test_both_ways_of_the_norm_agree() -> None:
    torch.manual_seed(0)
    for tokens in (3, 60):
        x, g = torch.randn(2, tokens, 8), torch.randn(2, tokens, 6)
        direct = (g.flatten(0, 1).t() @ x.flatten(0, 1)).pow(2).sum()
        assert squared_norm(x, g) == pytest.approx(float(direct), rel=1e-4)


@pytest.mark.numeric
def test_4_bit_layers_are_measured_by_the_weights_that_they_compute_with(tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from transformers import BitsAndBytesConfig

    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=packing)
    without_repacking(packed)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    names = linear_names(plain)
    for name in names:
        weight = packed.get_submodule(name).weight
        plain.get_submodule(name).weight.data = dequantize_4bit(weight.data, weight.quant_state).float()
    found, wanted = (gradient_norms(model, names, batches(2), loss) for model in (packed, plain))
    assert found == pytest.approx(wanted, rel=1e-3)


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    model = small(layers=1)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(Diverged, match="not finite before training"):
        gradient_norms(model, linear_names(model), batches(1), loss)


def plant(model: PreTrainedModel, live: dict[int, tuple[str, ...]]) -> set[str]:
    """Cut all parts but the live ones off their inputs, so that no adapter there can change anything.

    Returns:
        Names of the linear layers that still can.
    """
    useful = set()
    for number, layer in enumerate(model.model.layers):
        parts = {"self_attn": layer.input_layernorm, "mlp": layer.post_attention_layernorm}
        for part, norm in parts.items():
            if part not in live.get(number, ()):
                norm.weight.data.zero_()
            else:
                prefix = f"model.layers.{number}.{part}."
                useful |= {name for name in linear_names(model) if name.startswith(prefix)}
    return useful


def choose(model: PreTrainedModel, kind: str, budget_of: set[str]) -> Selection:
    widths = {name: pair for name, pair in all_widths(model).items() if name != "lm_head"}
    costs = {name: count_on_layer(AdapterSection(r=4), "causal-lm", *pair, bias=False) for name, pair in widths.items()}
    total = model.num_parameters()
    budget = sum(costs[name] for name in budget_of) / total + 1e-9
    norms = gradient_norms(model, list(widths), batches(4), loss)
    if kind == "modules":
        return choose_modules(norms, costs, total, budget, 4)
    sizes = {name: inputs * outputs for name, (inputs, outputs) in widths.items()}
    return choose_layers(norms, costs, sizes, total, budget, 4)


@pytest.mark.parametrize("seed", range(4))
def test_planted_modules_are_found_and_nothing_else(seed: int) -> None:
    model = small()
    torch.manual_seed(seed)
    first, second = torch.randperm(4)[:2].tolist()
    useful = plant(model, {first: ("self_attn",), second: ("mlp",)})
    selection = choose(model, "modules", useful)
    assert set(selection.modules) == useful
    assert selection.used_parameters == selection.budget_parameters
    left = {one.score for one in selection.scored if not one.chosen}
    assert left == {0.0}


@pytest.mark.parametrize("planted", [(0, 2), (1, 3), (3,)])
def test_planted_layers_are_found_and_nothing_else(planted: tuple[int, ...]) -> None:
    model = small()
    useful = plant(model, {number: ("self_attn", "mlp") for number in planted})
    selection = choose(model, "layers", useful)
    assert {one.name for one in selection.scored if one.chosen} == {str(number) for number in planted}
    assert set(selection.modules) == useful and list(selection.modules) == [
        name for name in linear_names(model) if name in useful
    ]


def test_modules_are_taken_by_score_and_one_that_does_not_fit_is_passed_over() -> None:
    scores, costs = {"a": 1.0, "b": 5.0, "c": 4.0, "d": 2.0}, {"a": 10, "b": 60, "c": 50, "d": 30}
    selection = choose_modules(scores, costs, 1000, 0.1, 8)
    assert selection.modules == ("a", "b", "d") and selection.used_parameters == 100
    assert [one.chosen for one in selection.scored] == [True, True, False, True]
    assert Selection.from_json(selection.as_json()) == selection


def test_equal_scores_keep_the_order_of_the_model() -> None:
    names = [f"m{number}" for number in range(9)]
    selection = choose_modules(dict.fromkeys(names, 1.0), dict.fromkeys(names, 10), 100, 0.3, 1)
    assert selection.modules == ("m0", "m1", "m2")


def test_a_budget_for_nothing_is_refused_with_the_one_that_would_do() -> None:
    said = r"adapter.target_modules.budget = 0.1000% of 10,000 .* allows 10 .* has 20; raise the budget to 0.2000%"
    with pytest.raises(RecipeError, match=said):
        choose_modules({"a": 1.0}, {"a": 20}, 10_000, 0.001, 8)


LINEAR = [name for name, row in METHODS.items() if row.targets == "linear"]
SHARING = ("vblora", "unilora", "lily", "frod", "adamss", "tinylora", "randlora", "vera", "pvera")
"""Methods whose modules share weights, or depend on the widths of the others."""


@pytest.mark.parametrize("name", [name for name in LINEAR if name not in SHARING])
def test_the_cost_of_a_module_is_what_its_adapter_has_in_the_model(name: str) -> None:
    method = METHODS[name]
    size = {"r": 4} if "r" in method.argument_names and not method.must_divide else {}
    sizes = dict.fromkeys(method.must_divide, 4) | ({"n_frequency": 16} if name == "waveft" else {})
    adapter = AdapterSection(method=name, target_modules=("q_proj",), arguments=sizes, **size)
    model = small(layers=2)
    assert count_trainable(model, adapter, "causal-lm").parameters == 2 * count_on_layer(
        adapter, "causal-lm", 32, 32, bias=False
    )


def forget_the_end(run: Path, step: int) -> None:
    """Take a finished run back to its checkpoint before the last step, as if it had been stopped there."""
    for name in ("train.json", "metrics.json", "eval.json"):
        (run / name).unlink()
    for folder in ("adapter", f"checkpoints/checkpoint-{step}"):
        shutil.rmtree(run / folder)


SELECT = {"select": "gradient", "batches": 3, "budget": "1%"}


def test_a_run_trains_what_the_gradient_has_chosen_and_says_so(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(adapter={"r": 4, "target_modules": SELECT})
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    run = tmp_path / "run"
    found, plan, metrics = (read_json(run / name) for name in ("selection.json", "plan.json", "metrics.json"))
    assert 0 < found["used_parameters"] <= found["budget_parameters"]
    assert metrics["parameters"]["trainable"] == found["used_parameters"] == plan["parameters"]["trainable"]
    assert sorted(read_json(run / "adapter" / "adapter_config.json")["target_modules"]) == sorted(found["modules"])
    assert f"selected by gradient: {len(found['modules'])} of 14 modules" in capfd.readouterr().err
    assert run_cli("eval", "run") == 0
    assert run_cli("merge", "run") == 0
    assert read_json(run / "merge.json")["top1_agreement"] >= 0.98
    page, words = (run / "report.html").read_text(), (run / "report.md").read_text()
    assert page.count('aria-label="Gradient by modules"') == 2  # a wide drawing and a narrow one
    assert f"- Selected: {len(found['modules'])} of 14 modules" in words
    for one in found["scored"]:
        assert f"| {one['name']} |" in words


def test_a_run_may_choose_layers_over_4_bit_weights(write_recipe: Write, run_cli: Cli, tmp_path: Path) -> None:
    recipe = write_recipe(adapter={"r": 4, "layers": SELECT | {"budget": 0.02}})
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    found = read_json(tmp_path / "run" / "selection.json")
    assert found["kind"] == "layers" and [one["chosen"] for one in found["scored"]].count(True) == 1
    assert len({name.split(".")[2] for name in found["modules"]}) == 1 and len(found["modules"]) == 7


@pytest.mark.numeric
def test_a_run_that_goes_on_keeps_its_choice(write_recipe: Write, run_cli: Cli, tmp_path: Path) -> None:
    recipe = write_recipe(adapter={"r": 4, "target_modules": SELECT}, trainer={"max_steps": 6, "save_steps": 3})
    assert run_cli("train", recipe, "--output-dir", "whole") == 0
    run = Path(shutil.copytree(tmp_path / "whole", tmp_path / "run"))
    forget_the_end(run, 6)
    before = (run / "selection.json").read_bytes()
    assert run_cli("train", recipe, "--output-dir", "run", "--resume") == 0
    assert (run / "selection.json").read_bytes() == before
    weights = "adapter/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"target_modules": {"select": "gradient"}}, "needs a budget"),
        ({"target_modules": SELECT | {"budget": "0%"}}, "has budget: 0%; it must be a share"),
        ({"target_modules": SELECT | {"budget": 20}}, "has budget: 20; it must be a share"),
        ({"layers": SELECT | {"batches": 0}}, "has batches: 0; it must be a whole number"),
        ({"layers": SELECT | {"batch": 4}}, "has no key batch; did you mean batches?"),
        ({"layers": SELECT | {"select": "random"}}, "needs `select: gradient`"),
        ({"layers": [0, -1]}, "must be a list of layer indices"),
        ({"layers": SELECT, "target_modules": dict(SELECT)}, "only one of them can be selected by gradient; keep one"),
        ({"method": "ia3", "target_modules": SELECT}, "only linear layers can be selected by gradient, and ia3"),
        ({"method": "prompt", "layers": [0]}, "adapter.layers has no effect with prompt"),
        ({"method": "full", "layers": [0]}, "adapter.layers has no effect with full"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused_before_anything_is_loaded(
    write_recipe: Write, run_cli: Cli, adapter: dict[str, Any], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(adapter={**dict.fromkeys(["r"]), **adapter}, quantization=None)
    assert run_cli("validate", recipe) == 2
    assert said in capfd.readouterr().err


@pytest.mark.parametrize("method", ["lora", "ln_tuning", "bottleneck", "freeze"])
def test_layers_that_are_named_are_those_that_are_trained(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, method: str
) -> None:
    recipe = write_recipe(adapter={"method": method, "r": None, "layers": [1]}, trainer={"max_steps": 2})
    assert run_cli("train", recipe, "--output-dir", "run") == 0
    from safetensors import safe_open

    with safe_open(str(tmp_path / "run" / "adapter" / "adapter_model.safetensors"), framework="pt") as stream:
        names = list(stream.keys())
    assert names and all(".layers.1." in name for name in names)


def test_a_layer_that_is_not_there_is_named_with_those_that_are(
    write_recipe: Write, run_cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("plan", write_recipe(adapter={"layers": [0, 9]})) == 2
    assert "adapter.layers [9]: this model has 2 blocks, numbered 0 to 1" in capfd.readouterr().err


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "adapter" / "adapter_model.safetensors")


BEGINNINGS = {
    "lora_ga": {"r": 4, "init_lora_weights": "lora_ga", "gradient_batches": 2},
    "shira": {"method": "shira", "r": 2, "mask": "gradient", "gradient_batches": 2},
}


@pytest.fixture(scope="module")
def plain_bases(recipe_in: Write, cli_in: Cli, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    """The figures of the base beside plain LoRA; under True of the quantized one."""
    folder = tmp_path_factory.mktemp("plain")
    found = {}
    for quantized in (True, False):
        recipe = recipe_in(folder, trainer={"max_steps": 1}, **({} if quantized else {"quantization": None}))
        assert cli_in(folder, "train", recipe, "--output-dir", str(quantized)) == 0
        found[quantized] = read_json(folder / str(quantized) / "metrics.json")["base"]
    return found


@pytest.mark.numeric
@pytest.mark.xdist_group("begun by the gradient")
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("name", BEGINNINGS)
def test_an_adapter_that_begins_by_the_gradient_leaves_the_base_as_it_is_and_merges(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, plain_bases: dict[bool, Any], name: str, quantized: bool
) -> None:
    more = {} if quantized else {"quantization": None}
    assert run_cli("train", write_recipe(adapter=BEGINNINGS[name], **more), "--output-dir", "run") == 0
    run = tmp_path / "run"
    metrics = read_json(run / "metrics.json")
    assert metrics["base"] == plain_bases[quantized]
    assert metrics["adapter"]["loss"] < metrics["base"]["loss"] - 0.5
    assert run_cli("eval", "run") == 0
    assert read_json(run / "metrics.json")["adapter"]["loss"] == pytest.approx(metrics["adapter"]["loss"], abs=1e-4)
    assert run_cli("merge", "run") == 0


@pytest.mark.numeric
@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_run_that_began_by_the_gradient_goes_on_to_the_same_bits(
    write_recipe: Write, run_cli: Cli, tmp_path: Path, name: str
) -> None:
    recipe = write_recipe(adapter=BEGINNINGS[name], trainer={"max_steps": 4, "save_steps": 2})
    assert run_cli("train", recipe, "--output-dir", "whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    forget_the_end(tmp_path / "run", 4)
    assert run_cli("train", recipe, "--output-dir", "run", "--resume") == 0
    first, second = (weights_of(tmp_path / one) for one in ("whole", "run"))
    assert list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.numeric
def test_lora_begins_along_the_leading_directions_of_the_gradient() -> None:
    from peftcli.train.adapter_init import lora_ga_weights

    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(48, 48))[0] for _ in range(2))
    gradient = u @ torch.diag(torch.logspace(3, -3, 48)) @ v.T
    down, up = lora_ga_weights(gradient, 4, 2.0, "layer")
    assert down.shape == (4, 48) and up.shape == (48, 4)
    size = (48**0.25) / 8
    assert torch.allclose((down / size @ v[:, :4]).abs(), torch.eye(4), atol=1e-3)
    assert torch.allclose((u[:, 4:8].T @ up * 2.0 / size).abs(), torch.eye(4), atol=1e-3)
    with pytest.raises(RecipeError, match=r"lower adapter\.r to 24"):
        lora_ga_weights(gradient, 25, 2.0, "layer")


@pytest.mark.numeric
def test_shira_takes_the_entries_with_the_largest_gradient() -> None:
    from peft import ShiraConfig, get_peft_model

    from peftcli.train.adapter_init import select_largest_entries, shira_layers

    model = get_peft_model(small(layers=1), ShiraConfig(r=1, target_modules=["up_proj"]))
    name, layer = next(shira_layers(model))
    gradient = torch.randn(64, 32)
    select_largest_entries(layer, gradient)
    rows, columns = layer.shira_indices["default"].long()
    assert name == "model.layers.0.mlp.up_proj" and rows.shape == (96,)
    taken = torch.zeros(64, 32, dtype=torch.bool)
    taken[rows, columns] = True
    assert gradient[taken].abs().min() >= gradient[~taken].abs().max()


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"gradient_batches": 4}, "has no effect without `mask: gradient` or lora_ga"),
        ({"init_lora_weights": "lora_ga", "gradient_batches": 0}, "must be at least 1"),
        ({"init_lora_weights": "lora_ga", "use_dora": True}, "excludes adapter.use_dora"),
        ({"method": "shira", "mask": "largest"}, "must be random or gradient"),
    ],
)
def test_a_beginning_that_cannot_be_is_refused_before_anything_is_loaded(
    write_recipe: Write, run_cli: Cli, adapter: dict[str, Any], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("validate", write_recipe(adapter=adapter)) == 2
    assert said in capfd.readouterr().err


def test_a_rehearsal_chooses_among_the_layers_of_the_stand_in(write_recipe: Write) -> None:
    from peftcli.plan.smoke import stand_in_adapter
    from peftcli.recipe.load import load_recipe
    from peftcli.recipe.schema import SelectSection

    def rehearsed(**adapter: Any) -> Any:
        return stand_in_adapter(load_recipe(write_recipe(adapter=adapter, quantization=None)).recipe.adapter)

    assert rehearsed(layers=[6, 30, 31]).layers == (0, 1)
    chosen = rehearsed(target_modules=SELECT).target_modules
    assert isinstance(chosen, SelectSection) and (chosen.budget, chosen.batches) == (0.5, 3)
    assert rehearsed(method="freeze", r=None, last_layers=8).arguments["last_layers"] == 2


def test_a_recipe_with_a_choice_is_written_so_that_it_reads_the_same(write_recipe: Write, tmp_path: Path) -> None:
    from peftcli.recipe.dump import changed_keys, dump_recipe
    from peftcli.recipe.load import load_recipe

    recipe = load_recipe(write_recipe(adapter={"target_modules": SELECT, "layers": [0, 1]})).recipe
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe, again))
    assert changed_keys(recipe, load_recipe(again).recipe) == []
    other = load_recipe(write_recipe(adapter={"target_modules": SELECT | {"budget": "2%"}, "layers": [0, 1]})).recipe
    assert changed_keys(recipe, other) == ["adapter.target_modules.budget: 0.01 -> 0.02"]
