"""The forecast of a run in words: whether it fits, what to change, how long it takes, and its disk space."""

from peftcli.plan.machine import Machine
from peftcli.plan.memory.forecast import MARGIN
from peftcli.report.blocks import Block, Notices, Table, facts, table
from peftcli.report.format import count, duration, several, size
from peftcli.results import Forecast

PARTS = (
    ("weights", "Base weights"),
    ("gathered", "Gathered shards of other GPUs"),
    ("adapter", "Adapter"),
    ("gradients", "Gradients"),
    ("optimizer", "Optimizer"),
    ("activations", "Activations"),
    ("working", "Temporary: output layer, or backward pass of one block"),
    ("fragmentation", "Fragmentation (assumed)"),
    ("context", "CUDA context (assumed)"),
    ("process", "Process and libraries"),
)


def forecast_blocks(forecast: Forecast | None, machine: Machine) -> list[Block]:
    """The forecast, or a notice if there is none."""
    if forecast is None:
        return [Notices(("no forecast: the dimensions of this model could not be determined from its structure",))]
    blocks: list[Block] = [memory_table(forecast)]
    if changes := suggestion_table(forecast):
        blocks.append(changes)
    in_process = "process" in forecast.memory_bytes.parts
    note = "on a CPU, freed memory may stay with the process, which then uses half as much again or more"
    blocks.append(
        facts(
            (
                ("Memory", verdict(forecast, machine) + (f"; {note}" if in_process else "")),
                ("Time", time_text(forecast)),
                ("Evaluation", evaluation_text(forecast)),
                ("Disk", disk_text(forecast)),
            )
        )
    )
    return blocks


def memory_table(forecast: Forecast) -> Table:
    """Memory by component."""
    parts = forecast.memory_bytes.parts
    rows = [(label, size(parts[name])) for name, label in PARTS if parts.get(name) is not None]
    title = f"Memory at the peak of a step, {count(forecast.micro_batch.tokens)} tokens per micro-batch"
    return table((title, "Bytes"), [*rows, ("Total", size(forecast.memory_bytes.total))], numeric=(1,))


def verdict(forecast: Forecast, machine: Machine) -> str:
    """Whether it fits, as one sentence."""
    memory, rows = forecast.memory_bytes, forecast.rows
    where = "this machine's memory" if machine.device == "cpu" else machine.label
    given = "" if rows.known else f", if the longest row has {count(rows.longest_tokens)} tokens"
    if memory.machine is None:
        return "the memory of this machine is unknown"
    largest = count(forecast.micro_batch.largest_tokens)
    free = memory.machine - memory.total
    whole = f"the {size(memory.machine)} of {where}"
    if forecast.tight:
        fix = "one of the changes above" if forecast.suggestions else "a GPU with more memory"
        return (
            f"barely fits in {whole}: {size(free)} free{given}, {free / memory.machine:.1%} of it, and no forecast is "
            f"that precise; leave {MARGIN:.0%} free with {fix}; the largest micro-batch has {largest} tokens"
        )
    if forecast.fits:
        return f"fits in {whole} with {size(free)} free{given}; the largest micro-batch has {largest} tokens"
    return f"does not fit in {whole}: {size(-free)} too much{given}; the largest micro-batch has {largest} tokens"


def suggestion_table(forecast: Forecast) -> Table | None:
    """Suggested changes, the cheapest first, each on its own, and finally the combination that fits."""
    if not forecast.suggestions:
        return None
    machine = forecast.memory_bytes.machine or 0  # known if there are suggestions
    rows = []
    for change in forecast.suggestions:
        free = machine - change.total_bytes
        fits = "still too much" if free < 0 else "fits" if free >= MARGIN * machine else "barely fits"
        rows.append((" and ".join(change.keys), size(change.total_bytes), fits))
    return table(("Change in the recipe, cheapest first", "Memory", "Result"), rows, numeric=(1,))


def time_text(forecast: Forecast) -> str:
    """Time per step and in total, or why it is unknown."""
    time = forecast.time
    steps = f"{count(time.steps)} steps" if time.steps is not None else "the number of steps depends on the rows"
    if time.step_seconds is None:
        gathers = "gathered" in forecast.memory_bytes.parts
        why = " with sharding, because GPU interconnects were not measured" if gathers else " for this device"
        return f"unknown{why}; {steps}"
    whole = f", {duration(time.seconds)} in total" if time.seconds is not None else ""
    about = "about" if forecast.rows.known else "at most about"
    of = f"{steps} of {count(time.tokens_per_step)} tokens"
    return f"{about} {duration(time.step_seconds)} per step{whole} ({of}), without evaluation"


def evaluation_text(forecast: Forecast) -> str | None:
    """The estimated time of evaluation; None where there are no test rows, or the GPU's speed is not known."""
    found = forecast.time.evaluation
    if found is None:
        return None
    tokens, together = count(found.answer_tokens), count(found.answers_at_once)
    answers = f"up to {count(found.answered_rows)} answers of up to {tokens} tokens, {together} at once"
    loss = (
        "the loss of test rows that are not read yet is not counted"
        if found.scored_rows is None
        else f"the loss of {several(found.scored_rows, 'row', 'rows')}"
    )
    models = "base and adapter" if found.passes > 1 else "the adapter alone"
    parts = [answers] if found.answered_rows else []
    work = f"{models}: {', '.join([*parts, loss])}"
    if found.evaluations:
        rows = f"{'' if found.validation_rows is None else count(found.validation_rows)} validation rows".strip()
        times = several(found.evaluations, "evaluation", "evaluations")
        work += f"; {times} of {rows} during training: {duration(found.during_seconds)}"
    return f"at most about {duration(found.seconds)}, an estimate ({work}); `train` measures it"


def disk_text(forecast: Forecast) -> str:
    """Bytes on the disk."""
    disk = forecast.disk_bytes
    return f"adapter {size(disk.adapter)}, each checkpoint {size(disk.checkpoint)}, {size(disk.total)} at most"


def forecast_line(forecast: Forecast | None) -> str | None:
    """The forecast on one line, for the start of a training."""
    if forecast is None or forecast.memory_bytes.machine is None:
        return None
    memory, time = forecast.memory_bytes, forecast.time
    line = f"  forecast: {size(memory.total)} of {size(memory.machine)} peak memory"
    if time.seconds is not None:
        line += f", about {duration(time.seconds)}"
        if time.evaluation is not None:
            line += f" and at most about {duration(time.evaluation.seconds)} of evaluation (estimates)"
    if forecast.tight:
        return line + "; barely fits; see `peftcli plan RECIPE` for what to reduce"
    return line if forecast.fits else line + "; may not fit; see `peftcli plan RECIPE` for what to change"
