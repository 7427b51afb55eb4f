"""The forecast of a run in words: whether it fits, what to change, how long it takes, what it writes."""

from peftcli.plan.machine import Machine
from peftcli.plan.memory.forecast import MARGIN
from peftcli.report.blocks import Block, Notices, Table, facts, table
from peftcli.report.format import count, duration, several, size
from peftcli.results import Forecast

PARTS = (
    ("weights", "Base weights"),
    ("gathered", "Parts of other GPUs, while a block needs them"),
    ("adapter", "Adapter"),
    ("gradients", "Gradients"),
    ("optimizer", "Optimizer"),
    ("activations", "Kept for the backward pass"),
    ("working", "Output layer, or one block going backward"),
    ("fragmentation", "Lost between blocks of memory (assumed)"),
    ("context", "CUDA context (assumed)"),
    ("process", "The process with its libraries"),
)


def forecast_blocks(forecast: Forecast | None, machine: Machine) -> list[Block]:
    """A forecast; a notice in its place where none could be made."""
    if forecast is None:
        return [Notices(("no forecast, since the widths of this model could not be read from its structure",))]
    blocks: list[Block] = [memory_table(forecast)]
    if changes := suggestion_table(forecast):
        blocks.append(changes)
    in_process = "process" in forecast.memory_bytes.parts
    note = "on a CPU freed memory may stay with the process, which then shows half as much again or more"
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
    """Memory by part."""
    parts = forecast.memory_bytes.parts
    rows = [(label, size(parts[name])) for name, label in PARTS if parts.get(name) is not None]
    title = f"Memory at the peak of a step, {count(forecast.micro_batch.tokens)} tokens at once"
    return table((title, "Bytes"), [*rows, ("In all", size(forecast.memory_bytes.total))], numeric=(1,))


def verdict(forecast: Forecast, machine: Machine) -> str:
    """Whether it fits, as one sentence."""
    memory, rows = forecast.memory_bytes, forecast.rows
    where = "this machine's memory" if machine.device == "cpu" else machine.label
    given = "" if rows.known else f", if the longest row has all {count(rows.longest_tokens)} tokens"
    if memory.machine is None:
        return "the memory of this machine is not known"
    largest = count(forecast.micro_batch.largest_tokens)
    spare = memory.machine - memory.total
    whole = f"the {size(memory.machine)} of {where}"
    if forecast.tight:
        fix = "one of the changes above" if forecast.mends else "a GPU with more memory"
        return (
            f"barely fits into {whole}: {size(spare)} to spare{given}, {spare / memory.machine:.1%} of it, and no "
            f"forecast is that exact; leave {MARGIN:.0%} with {fix}; the largest micro-batch has {largest} tokens"
        )
    if forecast.fits:
        return f"fits into {whole} with {size(spare)} to spare{given}; the largest micro-batch has {largest} tokens"
    return f"does not fit into {whole}: {size(-spare)} too much{given}; the largest micro-batch has {largest} tokens"


def suggestion_table(forecast: Forecast) -> Table | None:
    """What to change, the cheapest first, each alone; last, what does it together."""
    if not forecast.mends:
        return None
    machine = forecast.memory_bytes.machine or 0  # known where something is proposed
    rows = []
    for change in forecast.mends:
        spare = machine - change.total_bytes
        fits = "still too much" if spare < 0 else "fits" if spare >= MARGIN * machine else "barely fits"
        rows.append((" and ".join(change.keys), size(change.total_bytes), fits))
    return table(("Change in the recipe, the cheapest first", "Memory", "Then"), rows, numeric=(1,))


def time_text(forecast: Forecast) -> str:
    """Time by step and in all, or why there is none."""
    time = forecast.time
    steps = f"{count(time.steps)} steps" if time.steps is not None else "the number of steps depends on the rows"
    if time.step_seconds is None:
        gathers = "gathered" in forecast.memory_bytes.parts
        why = ", since GPUs that exchange weights were not timed" if gathers else " for this device"
        return f"not known{why}; {steps}"
    whole = f", {duration(time.seconds)} in all" if time.seconds is not None else ""
    about = "about" if forecast.rows.known else "at most about"
    of = f"{steps} of {count(time.tokens_per_step)} tokens"
    return f"{about} {duration(time.step_seconds)} a step{whole} ({of}), evaluation aside"


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
    line = f"  forecast: {size(memory.total)} of {size(memory.machine)} at the peak"
    if time.seconds is not None:
        line += f", about {duration(time.seconds)}"
        if time.evaluation is not None:
            line += f" and at most about {duration(time.evaluation.seconds)} of evaluation (estimates)"
    if forecast.tight:
        return line + "; this barely fits; `peftcli plan RECIPE` lists what to lower"
    return line if forecast.fits else line + "; this may not fit; `peftcli plan RECIPE` lists what to change"
