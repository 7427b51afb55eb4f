"""The walk that the heavy commands share: recipe, machine, model structure, plan, tokenizer, data."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from peftcli.data.checks import Check, check_embeddings, check_tokenizer
from peftcli.data.prepare import PreparedData, prepare
from peftcli.data.shown import shown_rows
from peftcli.model.embeddings import embedding_rows
from peftcli.model.inspect import inspect_model, trainable_counter
from peftcli.model.load import load_tokenizer
from peftcli.model.locate import locate
from peftcli.model.probe import probe_machine
from peftcli.plan.decide import label_rule, make_plan
from peftcli.plan.facts import Machine
from peftcli.plan.forecast import OPTIMIZER, Costs, make_forecast, rows_of
from peftcli.plan.plan import LabelRule, Plan, TokenizerChoice
from peftcli.plan.shape import Shape
from peftcli.progress import Progress
from peftcli.recipe.load import Loaded
from peftcli.recipe.schema import AdapterSection, Recipe
from peftcli.train.disk import forecast as disk_forecast
from peftcli.train.disk import state_bytes

SHOWN_ROWS = 3
"""Rows of the preview where nobody asks for another number."""
EMBEDDINGS = {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings"}
"""Names of the modules at both ends of a model."""


@dataclass(frozen=True)
class Planned:
    """A plan, the machine it was made for, and the widths of its model where they can be read."""

    plan: Plan
    machine: Machine
    shape: Shape | None = None


def plan_recipe(loaded: Loaded, progress: Progress, *, smoke: bool = False, machine: Machine | None = None) -> Planned:
    """Make the plan of a recipe; no weight is loaded.

    Args:
        machine: to plan for; the one at hand when None.
    """
    recipe = loaded.recipe
    machine = probe_machine() if machine is None else machine
    path, config, note = locate(recipe.model, progress, smoke=smoke)
    trust = recipe.model.trust_remote_code
    facts = inspect_model(path, config, note=note, trust_remote_code=trust)
    count = trainable_counter(path, config, recipe.model.task, trust_remote_code=trust)
    plan = make_plan(recipe, machine, facts, count, smoke=smoke, notices=loaded.notices)
    return Planned(plan, machine, facts.shape)


def forecast_run(planned: Planned, data: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """What a planned run will need; None where the model's widths cannot be read.

    Args:
        data: the facts of the data, None before they were read.
    """
    plan, given = planned.plan, planned.plan.trainer
    # As the trainer counts them, without importing it for a plan.
    keep = int(given.get("save_total_limit") or 2) + bool(given.get("load_best_model_at_end"))
    needs = disk_forecast(plan.trainable_parameters, optimizer=str(given.get("optim", OPTIMIZER)), keep=keep)
    disk = {
        "adapter": needs.adapter_bytes,
        "checkpoint": needs.checkpoint_bytes,
        "checkpoints_at_once": needs.checkpoints,
        "total": needs.total,
    }
    return make_forecast(plan, planned.shape, planned.machine, rows_of(plan, data), Costs(state_bytes, disk))


def prepare_data(
    plan: Plan, progress: Progress, adapter: Path | None = None
) -> tuple[PreTrainedTokenizerBase, PreparedData]:
    """Load the tokenizer and the rows of a plan.

    Args:
        adapter: folder whose tokenizer and chat template are used, as they were in training.
    """
    tokenizer = load_tokenizer(plan.base.tokenizer, None if adapter is None else str(adapter))
    return tokenizer, prepare(plan.dataset, tokenizer, plan.labels, plan.seed, progress, smoke=plan.smoke)


def look_at_data(recipe: Recipe, progress: Progress, *, smoke: bool, preview: int) -> PreparedData:
    """The data of a recipe with their checks and preview; of the model only the tokenizer and the length are asked."""
    path, config, _ = locate(recipe.model, progress, smoke=smoke)
    rule = label_rule(recipe, getattr(config.get_text_config(), "max_position_embeddings", None))
    model = recipe.model
    choice = TokenizerChoice(path, model.revision, model.chat_template, model.eos_token, model.trust_remote_code)
    tokenizer = load_tokenizer(choice)
    data = prepare(recipe.dataset, tokenizer, rule, recipe.seed, progress, smoke=smoke)
    add_view(data, tokenizer, rule, preview, check_ends(choice, tokenizer, data, recipe.adapter))
    return data


def add_view(
    data: PreparedData, tokenizer: PreTrainedTokenizerBase, rule: LabelRule, preview: int, more: Sequence[Check]
) -> None:
    """Put the checks of the tokenizer and the preview of some rows into the facts of the data.

    Args:
        more: checks that were made already.
    """
    checks = check_tokenizer(
        tokenizer, data.format, sample_chats=data.sample_chats(), assistant_only=rule.assistant_only
    )
    checks += more
    data.facts["checks"] = [asdict(check) for check in checks]
    data.crossed.extend(f"{check.name}: {check.said}" for check in checks if check.result == "fail")
    data.facts["warnings"] = [
        *(f"{check.name}: {check.said}" for check in checks if check.result == "warn"),
        *data.facts["warnings"],
    ]
    data.facts["preview"] = shown_rows(data.train, tokenizer, rule, data.too_long, preview)


def check_ends(
    choice: TokenizerChoice, tokenizer: PreTrainedTokenizerBase, data: PreparedData, adapter: AdapterSection
) -> list[Check]:
    """Ask the base's embedding whether it knows the end tokens and the added tokens; nothing where it is not here."""
    added = set(tokenizer.get_added_vocab().values()) & data.used_ids()
    found = embedding_rows(choice.path, choice.revision, sorted(data.stop_ids | added))
    if found is None:
        return []
    trained = bool(set(adapter.modules_to_save or ()) & EMBEDDINGS)
    return check_embeddings(found, tokenizer, embeddings_trained=trained, ends=data.stop_ids)
