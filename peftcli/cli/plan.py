"""The body of `plan`: what will happen and what it needs, stage by stage."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console

from peftcli.cli.commands import load, print_json, shown_run
from peftcli.cli.console import console
from peftcli.cli.recipes import loaded_stages
from peftcli.plan.choices import processes_that_share
from peftcli.plan.gpus import GPU, find_gpu, machine_with
from peftcli.plan.requirements import check_hardware, check_packages
from peftcli.report.blocks import Notices
from peftcli.report.forecast import forecast_blocks
from peftcli.report.sections import decision_table
from peftcli.report.terminal import print_blocks
from peftcli.results import Forecast

if TYPE_CHECKING:
    from peftcli.cli.pipeline import Planned


def plan_command(name: str, overrides: Sequence[str], *, gpu: str | None, smoke: bool, as_json: bool) -> None:
    """Print the plan of a recipe and what it will need, on this machine or on a card by name."""
    card = None if gpu is None else find_gpu(gpu)
    loaded = load(name, overrides, smoke=smoke)
    if card is None:
        check_packages(loaded.recipe)
    stages = loaded_stages(loaded, smoke=smoke)
    with shown_run(None) as (_, streams):
        from peftcli.cli.pipeline import forecast_run, plan_recipe
        from peftcli.model.hardware import probe_machine

        machine = probe_machine() if card is None else machine_with(card)
        if machine.processes == 1 and not smoke:  # as `train` would use its cards
            trainers = [stage.recipe.trainer for stage in stages]
            processes = processes_that_share(trainers, machine.count)
            machine = replace(machine, processes=processes, shares_batch=True)
        for stage in stages:
            check_hardware(stage.recipe, machine)
        known = [plan_recipe(stage, smoke=smoke, machine=machine) for stage in stages]
        forecasts = [forecast_run(planned) for planned in known]
        if as_json:
            plans = [one.plan.as_json(what) for one, what in zip(known, forecasts, strict=True)]
            print_json(streams, plans[0] if len(plans) == 1 else {"schema": 1, "stages": plans})
            return
        out = console(streams.out)
        for number, (planned, forecast) in enumerate(zip(known, forecasts, strict=True), start=1):
            if len(known) > 1:
                out.print(f"stage {number} of {len(known)}: {planned.plan.name}", style="bold")
            _show(planned, forecast, card, out)


def _show(planned: "Planned", forecast: Forecast | None, card: GPU | None, out: Console) -> None:
    plan = planned.plan
    notes = (*plan.notices, *((card.note,) if card is not None and card.note else ()))
    blocks = [decision_table(plan.decisions), *forecast_blocks(forecast, planned.machine), Notices(notes)]
    print_blocks(blocks, out)
