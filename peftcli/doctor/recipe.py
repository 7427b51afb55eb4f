"""What one recipe asks, against this machine: its model, the plan, the room on the disk, and packages."""

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
    """Where the model of a recipe is.

    Attributes:
        path: what its configuration is loaded from, None where it cannot be had.
        revision: of the Hub, None for a folder.
    """

    verdict: Check
    path: str | None = None
    revision: str | None = None


def check_recipe(recipe: Recipe, machine: Machine, hub: Hub) -> list[Check]:
    """Hold a recipe against this machine; no weight is loaded.

    Args:
        machine: with the memory that this process may have.
    """
    found = find_model(recipe, hub)
    verdicts = [found.verdict, *check_trackers(recipe.report.trackers, get_available_reporting_integrations())]
    if found.path is None:
        return verdicts
    try:
        check_packages(recipe.model_copy(update={"report": type(recipe.report)()}))  # trackers have their own verdict
        check_hardware(recipe, machine)
        plan = plan_for(recipe, machine, found.path, found.revision)
    except PeftcliError as problem:
        return [*verdicts, refused("plan", problem)]
    return [*verdicts, check_plan(plan), check_disk_space_for(plan, recipe)]


def find_model(recipe: Recipe, hub: Hub) -> FoundModel:
    """Look for the model: made here, a folder, the cache, the Hub, in this order."""
    model = recipe.model
    if model.name.startswith(TINY):
        try:
            path = resolve_model(model, smoke=False).path
        except PeftcliError as problem:
            return FoundModel(refused("model", problem))
        return FoundModel(Check("model", OK, f"{model.name}, made here"), path)
    folder = local_folder(model.name, model.revision)
    if folder is not None:
        is_local = Path(model.name).is_dir()
        damage = weights_damage(folder)
        if damage is not None:
            return FoundModel(refused("model", MachineError(damage)))
        # A folder without safetensors has its own message, which the plan gives.
        if is_local or base_facts(str(folder), None).weights_sha256 is not None:
            place = "a local folder" if is_local else "in the model cache, whole"
            return FoundModel(Check("model", OK, f"{model.name}: {place}"), str(folder))
    if model.name.startswith(LOCAL_SIGNS) or not hub.answers:
        return FoundModel(_unreachable(model.name, hub, partly=folder is not None))
    said = model_on_hub(model.name, model.revision)
    try:
        room = free_bytes(Path(constants.HF_HUB_CACHE))
    except PeftcliError as problem:
        return FoundModel(refused("model", problem))
    verdict = check_download(model.name, said, has_token=get_token() is not None, room=room)
    return FoundModel(verdict, model.name if verdict.result == OK else None, model.revision)


def _unreachable(name: str, hub: Hub, *, partly: bool) -> Check:
    if name.startswith(LOCAL_SIGNS):
        return refused("model", MachineError(explain_missing(name, FileNotFoundError(name))))
    there = f"{name}: " + ("only a part of it is in the model cache" if partly else "not in the model cache")
    why = "HF_HUB_OFFLINE is set" if hub.offline else f"{hub.name} does not answer"
    fix = "download it once with a network, give a local folder, or rehearse with --smoke"
    return Check("model", FAIL, f"{there}, and {why}", fix)


def check_download(name: str, said: HubModel | None, *, has_token: bool, room: int) -> Check:
    """Whether a model of the Hub can be downloaded.

    Args:
        said: by the Hub, None for nothing in time.
        room: bytes free where it would go.
    """
    if said is None:
        return Check("model", OK, f"{name}: not here yet, and the Hub did not say how large it is")
    if not said.found:
        there = f"{name}: the Hub shows none of that name and revision"
        return Check("model", FAIL, there, "check model.name and model.revision and, for a private one, HF_TOKEN")
    if said.gated and not has_token:
        fix = "accept its terms on its page on the Hub, and set HF_TOKEN"
        return Check("model", FAIL, f"{name}: gated, and no token is set", fix)
    needs = f"{name}: {size(said.weights_bytes)} to download" + (", gated; a token is set" if said.gated else "")
    if said.weights_bytes > room:
        there = f"{needs}, and the model cache has {size(room)} free"
        return Check("model", FAIL, there, "free some space, or name another disk in HF_HOME")
    return Check("model", OK, needs)


def plan_for(recipe: Recipe, machine: Machine, path: str, revision: str | None) -> Plan:
    """The plan of a recipe on a machine, which need not be this one.

    Raises:
        MachineError: the machine cannot do it, or the model cannot be used.
        RecipeError: an adapter target matches nothing, or the rows are too long.
    """
    trust = recipe.model.trust_remote_code
    config = load_config(path, revision, trust_remote_code=trust)
    task, labels = recipe.model.task, first_labels(recipe)
    facts = inspect_model(path, config, task, labels=labels, trust_remote_code=trust)
    return make_plan(
        recipe, machine, facts, trainable_counter(path, config, task, labels=labels, trust_remote_code=trust)
    )


def check_plan(plan: Plan) -> Check:
    """What would be trained here, in a line; `peftcli plan` says it with all reasons."""
    chosen = {decision.key: decision.value for decision in plan.decisions}
    bits = "" if plan.base.quantization is None else f", {plan.base.quantization['bits']} bit"
    there = f"{chosen['adapter']}, {plan.architecture} in {plan.base.dtype}{bits} on the {plan.base.device}"
    return Check("plan", OK, f"{there}, {plan.batch.effective} rows a step")


def check_disk_space_for(plan: Plan, recipe: Recipe) -> Check:
    """Whether the run folder can be written and holds the run to its end."""
    run = Path(recipe.output_dir or Path("runs") / recipe.name)
    try:
        needs = run_forecast(plan, recipe.trainer)
        if not run.is_file():
            check_writable(run)
        check_disk_space(run, needs)
        free = free_bytes(run)
    except PeftcliError as problem:
        return refused("room", problem)
    left = "the disk does not say what is free" if free == sys.maxsize else f"{size(free)} are free"
    return Check("room", OK, f"the run keeps {size(needs.total)} on the disk at most, and {left}")


def check_trackers(asked: Collection[str], installed: Collection[str]) -> list[Check]:
    """Whether the packages of the recipe's trackers are here; nothing where it has none."""
    if not asked:
        return []
    missing = [name for name in asked if name not in installed]
    if missing:
        there = f"report.trackers: {', '.join(missing)} not installed"
        return [Check("trackers", FAIL, there, f"pip install {' '.join(missing)}, or leave out report.trackers")]
    return [Check("trackers", OK, ", ".join(asked))]
