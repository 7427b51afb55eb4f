"""The walk that the heavy commands share: recipe, machine, model structure, plan, tokenizer, data."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from peftcli.data.prepare import PreparedData, load_sides, prepare
from peftcli.model.inspect import inspect_model, trainable_counter
from peftcli.model.load import load_tokenizer
from peftcli.model.locate import locate
from peftcli.model.probe import probe_machine
from peftcli.plan.decide import make_plan
from peftcli.plan.facts import Machine
from peftcli.plan.plan import Plan
from peftcli.progress import Progress
from peftcli.recipe.load import Loaded


@dataclass(frozen=True)
class Planned:
    """A plan, and the machine it was made for."""

    plan: Plan
    machine: Machine


def plan_recipe(loaded: Loaded, progress: Progress, *, smoke: bool = False) -> Planned:
    """Make the plan of a recipe; no weight is loaded."""
    recipe = loaded.recipe
    machine = probe_machine()
    path, config, note = locate(recipe.model, progress, smoke=smoke)
    trust = recipe.model.trust_remote_code
    facts = inspect_model(path, config, note=note, trust_remote_code=trust)
    count = trainable_counter(path, config, recipe.model.task, trust_remote_code=trust)
    return Planned(make_plan(recipe, machine, facts, count, smoke=smoke, notices=loaded.notices), machine)


def prepare_data(plan: Plan, adapter: Path | None = None) -> tuple[PreTrainedTokenizerBase, PreparedData]:
    """Load the tokenizer and the rows of a plan.

    Args:
        adapter: folder whose tokenizer and chat template are used, as they were in training.
    """
    tokenizer = load_tokenizer(plan.base, None if adapter is None else str(adapter))
    sides = load_sides(plan.dataset, plan.seed, smoke=plan.smoke)
    return tokenizer, prepare(sides, tokenizer, plan.labels)
