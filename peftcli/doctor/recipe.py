"""What one recipe asks, against this machine: its model, the plan, the room on the disk, and packages."""

import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, get_token
from transformers.integrations import get_available_reporting_integrations

from peftcli.doctor.check import FAIL, OK, Verdict, refused
from peftcli.doctor.hub import Hub, HubModel, model_on_hub
from peftcli.errors import MachineError, PeftcliError
from peftcli.model.files import base_facts, local_folder
from peftcli.model.hub import explain_missing
from peftcli.model.inspect import TINY, inspect_model, load_config, locate, trainable_counter
from peftcli.plan.heads import first_labels
from peftcli.plan.machine import Machine
from peftcli.plan.plan import Plan
from peftcli.plan.planner import make_plan
from peftcli.plan.requirements import check_hardware, check_packages
from peftcli.recipe.schema import Recipe
from peftcli.report.format import size
from peftcli.train.disk import check_room, check_writable, free_bytes
from peftcli.train.run import run_forecast

LOCAL_SIGNS = ("/", "./", "../", "~")


@dataclass(frozen=True)
class Found:
    """Where the model of a recipe is.

    Attributes:
        path: what its configuration is loaded from, None where it cannot be had.
        revision: of the Hub, None for a folder.
    """

    verdict: Verdict
    path: str | None = None
    revision: str | None = None


def recipe_verdicts(recipe: Recipe, machine: Machine, hub: Hub) -> list[Verdict]:
    """Hold a recipe against this machine; no weight is loaded.

    Args:
        machine: with the memory that this process may have.
    """
    found = find_model(recipe, hub)
    verdicts = [found.verdict, *judge_trackers(recipe.report.trackers, get_available_reporting_integrations())]
    if found.path is None:
        return verdicts
    try:
        check_packages(recipe.model_copy(update={"report": type(recipe.report)()}))  # trackers have their own verdict
        check_hardware(recipe, machine)
        plan = plan_for(recipe, machine, found.path, found.revision)
    except PeftcliError as problem:
        return [*verdicts, refused("plan", problem)]
    return [*verdicts, judge_plan(plan), judge_room(plan, recipe)]


def find_model(recipe: Recipe, hub: Hub) -> Found:
    """Look for the model: made here, a folder, the cache, the Hub, in this order."""
    model = recipe.model
    if model.name.startswith(TINY):
        try:
            path = locate(model, smoke=False).path
        except PeftcliError as problem:
            return Found(refused("model", problem))
        return Found(Verdict("model", OK, f"{model.name}, made here"), path)
    folder = local_folder(model.name, model.revision)
    if folder is not None:
        is_local = Path(model.name).is_dir()
        # A folder without safetensors has its own message, which the plan gives.
        if is_local or base_facts(str(folder), None).weights_sha256 is not None:
            place = "a local folder" if is_local else "in the model cache, whole"
            return Found(Verdict("model", OK, f"{model.name}: {place}"), str(folder))
    if model.name.startswith(LOCAL_SIGNS) or not hub.answers:
        return Found(_unreachable(model.name, hub, partly=folder is not None))
    said = model_on_hub(model.name, model.revision)
    try:
        room = free_bytes(Path(constants.HF_HUB_CACHE))
    except PeftcliError as problem:
        return Found(refused("model", problem))
    verdict = judge_download(model.name, said, has_token=get_token() is not None, room=room)
    return Found(verdict, model.name if verdict.result == OK else None, model.revision)


def _unreachable(name: str, hub: Hub, *, partly: bool) -> Verdict:
    if name.startswith(LOCAL_SIGNS):
        return refused("model", MachineError(explain_missing(name, FileNotFoundError(name))))
    there = f"{name}: " + ("only a part of it is in the model cache" if partly else "not in the model cache")
    why = "HF_HUB_OFFLINE is set" if hub.offline else f"{hub.name} does not answer"
    mend = "download it once with a network, give a local folder, or rehearse with --smoke"
    return Verdict("model", FAIL, f"{there}, and {why}", mend)


def judge_download(name: str, said: HubModel | None, *, has_token: bool, room: int) -> Verdict:
    """Whether a model of the Hub can be downloaded.

    Args:
        said: by the Hub, None for nothing in time.
        room: bytes free where it would go.
    """
    if said is None:
        return Verdict("model", OK, f"{name}: not here yet, and the Hub did not say how large it is")
    if not said.found:
        there = f"{name}: the Hub shows none of that name and revision"
        return Verdict("model", FAIL, there, "check model.name and model.revision and, for a private one, HF_TOKEN")
    if said.gated and not has_token:
        mend = "accept its terms on its page on the Hub, and set HF_TOKEN"
        return Verdict("model", FAIL, f"{name}: gated, and no token is set", mend)
    needs = f"{name}: {size(said.weights_bytes)} to download" + (", gated; a token is set" if said.gated else "")
    if said.weights_bytes > room:
        there = f"{needs}, and the model cache has {size(room)} free"
        return Verdict("model", FAIL, there, "free some space, or name another disk in HF_HOME")
    return Verdict("model", OK, needs)


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


def judge_plan(plan: Plan) -> Verdict:
    """What would be trained here, in a line; `peftcli plan` says it with all reasons."""
    chosen = {decision.key: decision.value for decision in plan.decisions}
    bits = "" if plan.base.quantization is None else f", {plan.base.quantization['bits']} bit"
    there = f"{chosen['adapter']}, {plan.architecture} in {plan.base.dtype}{bits} on the {plan.base.device}"
    return Verdict("plan", OK, f"{there}, {plan.batch.effective} rows a step")


def judge_room(plan: Plan, recipe: Recipe) -> Verdict:
    """Whether the run folder can be written and holds the run to its end."""
    run = Path(recipe.output_dir or Path("runs") / recipe.name)
    try:
        needs = run_forecast(plan, recipe.trainer)
        if not run.is_file():
            check_writable(run)
        check_room(run, needs)
        free = free_bytes(run)
    except PeftcliError as problem:
        return refused("room", problem)
    left = "the disk does not say what is free" if free == sys.maxsize else f"{size(free)} are free"
    return Verdict("room", OK, f"the run keeps {size(needs.total)} on the disk at most, and {left}")


def judge_trackers(asked: Collection[str], installed: Collection[str]) -> list[Verdict]:
    """Whether the packages of the recipe's trackers are here; nothing where it has none."""
    if not asked:
        return []
    missing = [name for name in asked if name not in installed]
    if missing:
        there = f"report.trackers: {', '.join(missing)} not installed"
        return [Verdict("trackers", FAIL, there, f"pip install {' '.join(missing)}, or leave out report.trackers")]
    return [Verdict("trackers", OK, ", ".join(asked))]
