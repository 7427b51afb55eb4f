"""The modules and parameters that an adapter trains, by PEFT's rules: patterns, fused experts and towers.

A pattern that matches nothing is an error, because PEFT only warns about it and trains something else.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peftcli.errors import RecipeError
from peftcli.methods.registry import METHODS
from peftcli.nearest import nearest_names
from peftcli.plan.machine import ModelFacts
from peftcli.plan.plan import DTYPE_BYTES, Decision
from peftcli.plan.targets import ALL_LINEAR, is_within, match_targets, matches, named_targets, of_head, without_numbers
from peftcli.recipe.library_args import method_arguments
from peftcli.recipe.schema import AdapterSection, Recipe

PLAIN_INITS = ("gaussian", "orthogonal")
"""Initializations of LoRA that read no base weight."""
PATTERNS = ("rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class AdapterTargets:
    """What an adapter trains.

    Attributes:
        counts: number of modules and parameters by name.
        parameters: number of parameters among them that are adapted directly (`target_parameters`).
        experts: the fused expert parameters among them.
        displaced: modules of a target's name that PEFT leaves out, because it reads the name as that of the experts.
        excluded: modules that `exclude_modules` keeps out.
    """

    counts: dict[str, int]
    parameters: int = 0
    experts: tuple[str, ...] = ()
    displaced: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()


def find_targets(adapter: AdapterSection, facts: ModelFacts) -> AdapterTargets:
    """Match the targets of a resolved adapter against a model.

    Raises:
        RecipeError: a name or pattern matches nothing.
    """
    wanted = named_targets(adapter)
    if METHODS[adapter.method].prompts or METHODS[adapter.method].targets == "whole":
        return AdapterTargets(match_targets(wanted, facts))
    rest, renamed = _split_moved(wanted, _moved(adapter, facts))
    asked = tuple(adapter.arguments.get("target_parameters") or ())
    if facts.weights:
        _refuse("target_parameters", _without_match(asked, facts.weights), facts.weights, facts)
    parameters = tuple(one for one in facts.weights if any(matches(one, name) for name in (*asked, *renamed.values())))
    try:
        counts = match_targets(rest, facts) if rest else {}
    except RecipeError as problem:
        raise RecipeError(f"{problem}{_about_experts(wanted, facts)}") from problem
    modules = _modules(rest, facts)
    all_named = modules if rest == ALL_LINEAR else facts.modules
    displaced = tuple(one for one in all_named if renamed and one.rpartition(".")[2] in renamed)
    excluded = _excluded(adapter, modules, facts)
    modules = tuple(name for name in modules if name not in excluded and name not in displaced)
    if not modules and not parameters:
        what = "exclude_modules leaves" if excluded else "target_modules matches"
        raise RecipeError(f"adapter.{what} no target in {facts.architecture}; change it")
    if parameters:
        _refuse_beside_parameters(adapter)
    _check_patterns(adapter, (*modules, *parameters), facts)
    if excluded or displaced:
        counts = _counted(modules, rest)
    return AdapterTargets(
        counts | without_numbers(dict.fromkeys(parameters, 1)),
        len(parameters),
        tuple(one for one in parameters if one in facts.experts),
        displaced,
        excluded,
    )


def _moved(adapter: AdapterSection, facts: ModelFacts) -> Mapping[str, str]:
    """Names of modules that PEFT turns into parameters of this model, which it does for LoRA only."""
    return facts.fused if METHODS[adapter.method].config == "LoraConfig" else {}


def _split_moved(
    wanted: tuple[str, ...] | str | None, moved: Mapping[str, str]
) -> tuple[tuple[str, ...] | str | None, dict[str, str]]:
    """The targets that stay modules, and the parameters of the others by the last part of the target's name."""
    if wanted == ALL_LINEAR:
        return wanted, dict(moved)
    leaves = {name: name.rpartition(".")[2] for name in wanted or ()}
    renamed = {leaf: moved[leaf] for leaf in leaves.values() if leaf in moved}
    return tuple(name for name, leaf in leaves.items() if leaf not in renamed), renamed


def _without_match(wanted: Iterable[str], known: Collection[str]) -> list[str]:
    return [name for name in wanted if not any(matches(one, name) for one in known)]


def _modules(wanted: tuple[str, ...] | str | None, facts: ModelFacts) -> tuple[str, ...]:
    if wanted == ALL_LINEAR:
        return facts.linear
    return tuple(one for one in facts.modules if any(matches(one, name) for name in wanted or ()))


def _counted(modules: Iterable[str], wanted: tuple[str, ...] | str | None) -> dict[str, int]:
    counts: dict[str, int] = {}
    for module in modules:
        found = None if wanted == ALL_LINEAR else next(name for name in wanted or () if matches(module, name))
        leaf = found or module.rpartition(".")[2]
        counts[leaf] = counts.get(leaf, 0) + 1
    return without_numbers(counts)


def resolve_pattern(adapter: AdapterSection, facts: ModelFacts) -> AdapterSection:
    """The adapter with a regular expression in `target_modules` replaced by the full names that it matches.

    Raises:
        RecipeError: it matches no module.
    """
    pattern = named_targets(adapter)
    if not isinstance(pattern, str) or pattern == ALL_LINEAR:
        return adapter
    expression, moved = re.compile(pattern), _moved(adapter, facts)
    names = [one for one in facts.modules if expression.fullmatch(one) and not of_head(one, facts)]
    # PEFT tests the earlier names of fused experts too, in the place of the parameter that replaced them.
    for weight in facts.experts:
        holder, _, leaf = weight.rpartition(".")
        names += [
            f"{holder}.{old}" for old, new in moved.items() if new == leaf and expression.fullmatch(f"{holder}.{old}")
        ]
    if not names:
        leaves = sorted({one.rpartition(".")[2] for one in facts.linear})
        raise RecipeError(
            f"adapter.target_modules: the regular expression {pattern} matches the full name of no module of "
            f"{facts.architecture}, such as {_example(facts)}; its linear layers are {', '.join(leaves[:12])}"
        )
    return adapter.model_copy(update={"target_modules": tuple(names)})


def exclude_towers(adapter: AdapterSection, facts: ModelFacts) -> AdapterSection:
    """The adapter without modules of towers that rows of text do not pass, which would get no gradient.

    Raises:
        RecipeError: all targets are in a tower.
    """
    targets, method = named_targets(adapter), METHODS[adapter.method]
    if not facts.towers or targets is None or method.prompts or method.targets == "whole":
        return adapter
    inside = [one for one in facts.modules if in_towers(one, facts)]
    if targets != ALL_LINEAR:
        names = [one for one in _modules(targets, facts) if not of_head(one, facts)]
        if not any(one in inside for one in names):
            return adapter
        if all(one in inside for one in names):
            raise RecipeError(
                f"adapter.target_modules: all of its modules are in {', '.join(facts.towers)}, which rows of text do "
                "not pass, so they would get no gradient; name modules of the text model"
            )
    if "exclude_modules" not in (method_arguments(adapter.method) or ()):
        text = [one for one in (facts.linear if targets == ALL_LINEAR else names) if one not in inside]
        return adapter.model_copy(update={"target_modules": tuple(text)})
    towers = rf"({'|'.join(re.escape(name) for name in facts.towers)})(\..*)?"
    asked = adapter.arguments.get("exclude_modules")
    parts = [asked] if isinstance(asked, str) else [rf"(.*\.)?{re.escape(name)}" for name in asked or ()]
    both = "|".join(f"({part})" for part in (*parts, towers)) if parts else towers
    return adapter.model_copy(update={"arguments": {**adapter.arguments, "exclude_modules": both}})


def in_towers(module: str, facts: ModelFacts) -> bool:
    """Whether a module is in a tower that rows of text do not pass."""
    return is_within(module, facts.towers)


def _excluded(adapter: AdapterSection, modules: Collection[str], facts: ModelFacts) -> tuple[str, ...]:
    asked = adapter.arguments.get("exclude_modules")
    if not asked:
        return ()
    if isinstance(asked, str):
        found = tuple(one for one in facts.modules if re.fullmatch(asked, one))
        unused = [] if found else [asked]
    else:
        found = tuple(one for one in facts.modules if any(matches(one, name) for name in asked))
        unused = _without_match(asked, facts.modules)
    _refuse("exclude_modules", unused, facts.modules, facts)
    return tuple(one for one in found if one in modules)


def _refuse_beside_parameters(adapter: AdapterSection) -> None:
    """Refuse what PEFT's adapters on parameters do not support, with the key to change."""
    init = adapter.arguments.get("init_lora_weights")
    unsupported = {
        "dropout": (adapter.dropout, "set it to 0"),
        "use_dora": (adapter.use_dora, "remove it"),
        "init_lora_weights": (init not in (None, True, False, *PLAIN_INITS), "remove it"),
    }
    for key, (given, fix) in unsupported.items():
        if given:
            raise RecipeError(
                f"adapter.{key} excludes adapters on parameters, such as those on fused experts; {fix}, or list "
                "adapter.target_modules without the experts"
            )


def _check_patterns(adapter: AdapterSection, trained: tuple[str, ...], facts: ModelFacts) -> None:
    for key in PATTERNS:
        given = adapter.arguments.get(key)
        if isinstance(given, Mapping):
            unused = [one for one in given if not any(re.match(rf"(.*\.)?({one})$", name) for name in trained)]
            _refuse(key, unused, trained, facts)


def _refuse(key: str, unused: list[str], known: Iterable[str], facts: ModelFacts) -> None:
    if not unused:
        return
    short = without_numbers(dict.fromkeys(known, 1))
    ends = list(
        dict.fromkeys(".".join(parts[i:]) for one in short for parts in [one.split(".")] for i in range(len(parts)))
    )
    leaves = sorted(ends, key=lambda one: one.count("."))
    near = list(dict.fromkeys(one for word in unused for one in nearest_names(word, leaves, most=3, least=0.4)))
    what = {"target_parameters": "parameter", "exclude_modules": "module"}.get(key, "trained module")
    how = (
        "; a key matches the end of a module's full name, so ^ matches nothing" if any("^" in u for u in unused) else ""
    )
    raise RecipeError(
        f"no {what} of {facts.architecture} matches adapter.{key} [{', '.join(unused)}]{how}; nearest names: "
        f"{', '.join(near or leaves[:12])}"
    )


def _example(facts: ModelFacts) -> str:
    return next(iter(facts.linear or facts.modules), "none")


def _about_experts(wanted: Any, facts: ModelFacts) -> str:
    """What to write for experts that are parameters, not modules; empty for a dense model."""
    if not facts.experts or wanted == ALL_LINEAR:
        return ""
    names = ", ".join(_inside_blocks(facts.experts))
    return (
        f"; its experts are fused parameters: name them in adapter.target_parameters [{names}] (adapter.method: lora)"
    )


def _inside_blocks(names: Iterable[str]) -> list[str]:
    return list(without_numbers(dict.fromkeys(names, 1)))


def target_decisions(
    recipe: Recipe, adapter: AdapterSection, found: AdapterTargets, facts: ModelFacts, dtype: str
) -> tuple[Decision, ...]:
    """The decisions to show about experts, towers, excluded modules and weights that are stored quantized."""
    decisions, quantized = [], recipe.quantization is not None
    if facts.stored:
        value = f"{_memory(facts.parameters * DTYPE_BYTES[dtype])} in {dtype}"
        decisions.append(Decision("dequantized base", value, f"its files are {facts.stored}, which cannot be trained"))
    if recipe.model.add_tokens:
        rows = adapter.arguments.get("trainable_token_indices")
        where = " and ".join(rows) if isinstance(rows, dict) else "the embedding"
        what = f"only their rows of {where} are trained" if rows else "the whole embedding is trained"
        decisions.append(Decision("new tokens", ", ".join(recipe.model.add_tokens), what))
    if facts.experts:
        state = "trained" if found.experts else "frozen"
        names = ", ".join(f"{name} x {n}" for name, n in without_numbers(dict.fromkeys(found.experts, 1)).items())
        weights = facts.shape.experts.parameters if facts.shape is not None and facts.shape.experts is not None else 0
        stored = f"{_memory(weights * DTYPE_BYTES[dtype])} in {dtype}" if weights else dtype
        kept = "; bitsandbytes does not quantize fused experts" if quantized else ""
        what = f"adapters on {names}" if names else _how_to_train(adapter, facts)
        decisions.append(Decision("experts", f"{state}, {stored}", f"{what}{kept}"))
    if found.displaced:
        names = ", ".join(f"{name} x {n}" for name, n in _counted(found.displaced, ALL_LINEAR).items())
        why = "PEFT reads their names as those of the experts; to train them, name their weights in target_parameters"
        decisions.append(Decision("frozen beside experts", names, why))
    if facts.towers:
        why = "rows of text do not pass them, so they get no gradient and no adapter"
        decisions.append(Decision("frozen towers", ", ".join(facts.towers), why))
    own = [one for one in found.excluded if not in_towers(one, facts)]
    if own:
        names = ", ".join(f"{name} x {n}" for name, n in _counted(own, ALL_LINEAR).items())
        decisions.append(Decision("excluded", f"{len(own)} modules", f"{names} (adapter.exclude_modules)"))
    return tuple(decisions)


def _memory(size_bytes: int) -> str:
    unit, name = (2**30, "GiB") if size_bytes >= 2**30 else (2**20, "MiB")
    return f"{size_bytes / unit:.1f} {name}"


def _how_to_train(adapter: AdapterSection, facts: ModelFacts) -> str:
    names = ", ".join(_inside_blocks(facts.experts))
    if "target_parameters" in (method_arguments(adapter.method) or ()):
        return f"to train them, set adapter.target_parameters: [{names}]"
    return f"{adapter.method} does not adapt parameters; adapter.method: lora does"
