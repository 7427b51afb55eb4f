"""The forecast of a run for a person: memory by part, whether it fits, what to change, time and disk."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from peftcli.plan.machine import Machine
from peftcli.plan.memory.forecast import MARGIN
from peftcli.report.format import count, duration, size

PARTS = (
    ("weights", "base weights"),
    ("gathered", "parts of other cards, while a block needs them"),
    ("adapter", "adapter"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer"),
    ("activations", "kept for the backward pass"),
    ("working", "output layer, or one block going backward"),
    ("fragmentation", "lost between blocks of memory (assumed)"),
    ("context", "CUDA context (assumed)"),
    ("process", "the process with its libraries"),
)


def show_forecast(forecast: Mapping[str, Any] | None, machine: Machine, out: Console) -> None:
    """Print a forecast; a line in its place where none could be made."""
    out.print()
    if forecast is None:
        out.print("forecast: none, since the widths of this model could not be read from its structure")
        return
    out.print(memory_table(forecast))
    for line in (verdict(forecast, machine), *mend_lines(forecast), *time_lines(forecast), disk_line(forecast)):
        out.print(line)
    if "process" in forecast["memory_bytes"]:
        out.print("on a CPU freed memory may stay with the process, which then shows half as much again or more")


def memory_table(forecast: Mapping[str, Any]) -> Table:
    """Memory by part."""
    memory, batch = forecast["memory_bytes"], forecast["micro_batch"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"memory at the peak of a step, {count(batch['tokens'])} tokens at once")
    table.add_column("bytes", justify="right")
    for name, label in PARTS:
        if memory.get(name) is not None:
            table.add_row(label, size(memory[name]))
    table.add_row("in all", size(memory["total"]), style="bold")
    return table


def verdict(forecast: Mapping[str, Any], machine: Machine) -> str:
    """Whether it fits, on one line."""
    memory, rows = forecast["memory_bytes"], forecast["rows"]
    where = "this machine's memory" if machine.device == "cpu" else machine.label
    given = "" if rows["known"] else f", if the longest row has all {count(rows['longest_tokens'])} tokens"
    if memory["machine"] is None:
        return "the memory of this machine is not known"
    largest = count(forecast["micro_batch"]["largest_tokens"])
    spare = memory["machine"] - memory["total"]
    whole = f"the {size(memory['machine'])} of {where}"
    if forecast["tight"]:
        fix = "one of the changes below" if forecast["mends"] else "a GPU with more memory"
        return (
            f"barely fits into {whole}: {size(spare)} to spare{given}, {spare / memory['machine']:.1%} of it, and no "
            f"forecast is that exact; leave {MARGIN:.0%} with {fix}; the largest micro-batch has {largest} tokens"
        )
    if forecast["fits"]:
        return f"fits into {whole} with {size(spare)} to spare{given}; the largest micro-batch has {largest} tokens"
    return f"does not fit into {whole}: {size(-spare)} too much{given}; the largest micro-batch has {largest} tokens"


def mend_lines(forecast: Mapping[str, Any]) -> list[str]:
    """What to change, the cheapest first, each alone; last, what does it together."""
    lines = []
    machine = forecast["memory_bytes"]["machine"]
    for mend in forecast["mends"]:
        spare = machine - mend["total_bytes"]
        fits = "still too much" if spare < 0 else "fits" if spare >= MARGIN * machine else "barely fits"
        lines.append(f"  {' and '.join(mend['keys'])}: {size(mend['total_bytes'])}, {fits}")
    return ["change in the recipe, the cheapest first:", *lines] if lines else []


def time_lines(forecast: Mapping[str, Any]) -> list[str]:
    """Time by step and in all, or why there is none."""
    time = forecast["time"]
    steps = f"{count(time['steps'])} steps" if time["steps"] is not None else "the number of steps depends on the rows"
    if time["step_seconds"] is None:
        why = "since cards that exchange weights were not timed" if "gathered" in forecast["memory_bytes"] else ""
        return [f"time: not known{', ' + why if why else ' for this device'}; {steps}"]
    whole = f", {duration(time['seconds'])} in all" if time["seconds"] is not None else ""
    about = "about" if forecast["rows"]["known"] else "at most about"
    return [
        f"time: {about} {duration(time['step_seconds'])} a step{whole} ({steps} of "
        f"{count(time['tokens_per_step'])} tokens), evaluation aside"
    ]


def disk_line(forecast: Mapping[str, Any]) -> str:
    """Bytes on the disk."""
    disk = forecast["disk_bytes"]
    return (
        f"disk: adapter {size(disk['adapter'])}, each checkpoint {size(disk['checkpoint'])}, "
        f"{size(disk['total'])} at most"
    )


def forecast_line(forecast: Mapping[str, Any] | None) -> str | None:
    """The forecast on one line, for the start of a training."""
    if forecast is None or forecast["memory_bytes"]["machine"] is None:
        return None
    memory, time = forecast["memory_bytes"], forecast["time"]
    line = f"  forecast: {size(memory['total'])} of {size(memory['machine'])} at the peak"
    if time["seconds"] is not None:
        line += f", about {duration(time['seconds'])}"
    if forecast["tight"]:
        return line + "; this barely fits; `peftcli plan RECIPE` lists what to lower"
    return line if forecast["fits"] else line + "; this may not fit; `peftcli plan RECIPE` lists what to change"
