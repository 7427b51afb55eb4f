"""Checks one recipe against this machine: the model, the plan, the disk space and the packages."""

import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, get_token
from transformers.integrations import get_available_reporting_integrations

from peftcli.doctor.check import FAIL, OK, Check, refused
from peftcli.doctor.hub import Hub, HubModel, model_on_hub
from peftcli.errors import MachineError, PeftcliError
from peftcli.model.files import base_facts, local_folder, weights_damage
from peftcli.model.hub import explain_missing
from peftcli.model.inspect import TINY, inspect_model, load_config, resolve_model, trainable_counter
from peftcli.plan.heads import first_labels
from peftcli.plan.machine import Machine
from peftcli.plan.plan import Plan
from peftcli.plan.planner import make_plan
from peftcli.plan.requirements import check_hardware, check_packages
from peftcli.recipe.schema import Recipe
from peftcli.report.format import size
from peftcli.train.disk import check_disk_space, check_writable, free_bytes
from peftcli.train.run import run_forecast

LOCAL_SIGNS = ("/", "./", "../", "~")


@dataclass(frozen=True)
class FoundModel:
    """The location of the model of a recipe.

    Attributes:
        check: the result of looking for it.
        path: path or Hub id to load its configuration from, None if it is not available.
        revision: on the Hub, None for a folder.
    """

    check: Check
    path: str | None = None
    revision: str | None = None


def check_recipe(recipe: Recipe, machine: Machine, hub: Hub) -> list[Check]:
    """Check a recipe against this machine, without loading weights.

    Args:
        machine: with the memory that this process can use.
    """
    found = find_model(recipe, hub)
    checks = [found.check, *check_trackers(recipe.report.trackers, get_available_reporting_integrations())]
    if found.path is None:
        return checks
    try:
        check_packages(recipe.model_copy(update={"report": type(recipe.report)()}))  # trackers have their own check
        check_hardware(recipe, machine)
        plan = plan_for(recipe, machine, found.path, found.revision)
    except PeftcliError as problem:
        return [*checks, refused("plan", problem)]
    return [*checks, check_plan(plan), check_disk_space_for(plan, recipe)]


def find_model(recipe: Recipe, hub: Hub) -> FoundModel:
    """Look for the model: a built-in tiny model, a folder, the cache, the Hub, in this order."""
    model = recipe.model
    if model.name.startswith(TINY):
        try:
            path = resolve_model(model, smoke=False).path
        except PeftcliError as problem:
            return FoundModel(refused("model", problem))
        return FoundModel(Check("model", OK, f"{model.name}, built locally"), path)
    folder = local_folder(model.name, model.revision)
    if folder is not None:
        is_local = Path(model.name).is_dir()
        damage = weights_damage(folder)
        if damage is not None:
            return FoundModel(refused("model", MachineError(damage)))
        # The plan has a message of its own for a folder without safetensors.
        if is_local or base_facts(str(folder), None).weights_sha256 is not None:
            location = "a local folder" if is_local else "complete in the model cache"
            return FoundModel(Check("model", OK, f"{model.name}: {location}"), str(folder))
    if model.name.startswith(LOCAL_SIGNS) or not hub.answers:
        return FoundModel(_unreachable(model.name, hub, partly=folder is not None))
    on_hub = model_on_hub(model.name, model.revision)
    try:
        free = free_bytes(Path(constants.HF_HUB_CACHE))
    except PeftcliError as problem:
        return FoundModel(refused("model", problem))
    check = check_download(model.name, on_hub, has_token=get_token() is not None, free=free)
    return FoundModel(check, model.name if check.result == OK else None, model.revision)


def _unreachable(name: str, hub: Hub, *, partly: bool) -> Check:
    if name.startswith(LOCAL_SIGNS):
        return refused("model", MachineError(explain_missing(name, FileNotFoundError(name))))
    found = f"{name}: " + ("incomplete in the model cache" if partly else "not in the model cache")
    why = "HF_HUB_OFFLINE is set" if hub.offline else f"{hub.name} does not respond"
    fix = "download it where there is a network, use a local folder, or do a smoke run with --smoke"
    return Check("model", FAIL, f"{found}, and {why}", fix)


def check_download(name: str, model: HubModel | None, *, has_token: bool, free: int) -> Check:
    """Whether a model can be downloaded from the Hub.

    Args:
        model: from the Hub, None if there was no response in time.
        free: free bytes on the disk of the model cache.
    """
    if model is None:
        return Check("model", OK, f"{name}: not downloaded yet, and the Hub did not report its size")
    if not model.found:
        found = f"{name}: the Hub has no model with this name and revision"
        return Check("model", FAIL, found, "check model.name, model.revision and, for a private model, HF_TOKEN")
    if model.gated and not has_token:
        fix = "accept its terms on its page on the Hub, and set HF_TOKEN"
        return Check("model", FAIL, f"{name}: gated, and no token is set", fix)
    needs = f"{name}: {size(model.weights_bytes)} to download" + (", gated; a token is set" if model.gated else "")
    if model.weights_bytes > free:
        found = f"{needs}, but the model cache has only {size(free)} free"
        return Check("model", FAIL, found, "free some space, or set HF_HOME to a folder on another disk")
    return Check("model", OK, needs)


def plan_for(recipe: Recipe, machine: Machine, path: str, revision: str | None) -> Plan:
    """The plan of a recipe for a machine, which may be another one.

    Raises:
        MachineError: the machine does not support the recipe, or the model cannot be used.
        RecipeError: an adapter target matches no module, or the rows are too long.
    """
    trust = recipe.model.trust_remote_code
    config = load_config(path, revision, trust_remote_code=trust)
    task, labels = recipe.model.task, first_labels(recipe)
    facts = inspect_model(path, config, task, labels=labels, trust_remote_code=trust)
    return make_plan(
        recipe, machine, facts, trainable_counter(path, config, task, labels=labels, trust_remote_code=trust)
    )


def check_plan(plan: Plan) -> Check:
    """A one-line summary of the plan; `peftcli plan` shows it with all reasons."""
    chosen = {decision.key: decision.value for decision in plan.decisions}
    bits = "" if plan.base.quantization is None else f", {plan.base.quantization['bits']} bit"
    found = f"{chosen['adapter']}, {plan.architecture} in {plan.base.dtype}{bits} on the {plan.base.device}"
    return Check("plan", OK, f"{found}, {plan.batch.effective} rows per step")


def check_disk_space_for(plan: Plan, recipe: Recipe) -> Check:
    """Whether the run folder is writable and the disk has enough space for the run."""
    run = Path(recipe.output_dir or Path("runs") / recipe.name)
    try:
        needs = run_forecast(plan, recipe.trainer)
        if not run.is_file():
            check_writable(run)
        check_disk_space(run, needs)
        free = free_bytes(run)
    except PeftcliError as problem:
        return refused("disk space", problem)
    left = "the free space is unknown" if free == sys.maxsize else f"{size(free)} is free"
    return Check("disk space", OK, f"the run needs at most {size(needs.total)}, and {left}")


def check_trackers(trackers: Collection[str], installed: Collection[str]) -> list[Check]:
    """Whether the packages of the recipe's trackers are installed; no check if it has none."""
    if not trackers:
        return []
    missing = [name for name in trackers if name not in installed]
    if missing:
        found = f"report.trackers: {', '.join(missing)} not installed"
        return [Check("trackers", FAIL, found, f"pip install {' '.join(missing)}, or remove report.trackers")]
    return [Check("trackers", OK, ", ".join(trackers))]
