"""The parts of the report on what went in and what was decided: samples, data and plan."""

from typing import Any

from peftcli.report.blocks import (
    Block,
    Folded,
    Notices,
    Said,
    Samples,
    Section,
    facts,
    table,
)
from peftcli.report.format import count, duration, share, size
from peftcli.report.stages import Stages, figure, find, objects, text
from peftcli.report.text import without_home


def samples_section(stages: Stages) -> Section | None:
    """Prompts with the reference and what each model said."""
    merged = {text(row, "prompt"): find(row, "merged") for row in objects(stages.merge, "samples")}
    rows = objects(stages.eval, "samples")
    if not rows:
        return None
    wide = [(row, merged.get(text(row, "prompt"))) for row in rows]
    names = [name for name in ("base", "adapter") if any(find(row, name) is not None for row in rows)]
    columns = ["Prompt", "Reference", *(name.capitalize() for name in names)]
    if any(said is not None for _, said in wide):
        columns.append("Merged")
    shown = []
    for row, said in wide:
        answers = [_said(row.get(name), row.get("reference")) for name in names]
        answers += [_said(said, row.get("reference"))] if "Merged" in columns else []
        shown.append((_said(row.get("prompt"), None), _said(row.get("reference"), None), *answers))
    decoding = find(stages.eval, "decoding")
    lead = (
        "Held-out rows, answered before and after training; an answer is correct if it equals the reference, "
        "outer space aside."
    )
    lead += f" Decoding: {text(decoding)}." if decoding else ""
    return Section("samples", "Samples", (Samples(tuple(columns), tuple(shown)),), lead.replace("_", " "))


def _said(answer: Any, reference: Any) -> Said:
    said = None if answer is None else str(answer)
    if said is None or reference is None:
        return Said(said)
    return Said(said, said.strip() == str(reference).strip())


def plan_section(stages: Stages) -> Section:
    """What was decided before the first step, and why."""
    plan = stages.plan
    trainable, total = figure(plan, "parameters", "trainable"), figure(plan, "parameters", "total")
    sizes = [figure(plan, "batch", key) for key in ("per_device", "accumulation", "processes")]
    effective = figure(plan, "batch", "effective")
    product = f"{' × '.join(count(part) for part in sizes)} = {count(effective)} rows"
    targets = [f"{text(row, 'name')} ({count(figure(row, 'modules'))})" for row in objects(plan, "targets")]
    blocks: list[Block] = [
        facts(
            (
                ("Model", without_home(text(plan, "model", "name"))),
                ("Revision", text(plan, "model", "revision") if find(plan, "model", "revision") else None),
                ("Architecture", text(plan, "model", "architecture")),
                ("Parameters", count(total)),
                ("Trainable", f"{count(trainable)} ({share(trainable, total)})"),
                ("Targets (modules)", ", ".join(targets) if targets else None),
                (
                    "Rows of one step",
                    f"{product} (per device × accumulation × processes)" if effective else None,
                ),
            )
        )
    ]
    if notices := find(plan, "notices"):
        blocks.append(Notices(tuple(without_home(text(notice)) for notice in notices)))
    if predicted := _predicted(stages):
        blocks.append(predicted)
    if decisions := objects(plan, "decisions"):
        rows = [
            (text(row, "key"), without_home(text(row, "value")), without_home(text(row, "reason"))) for row in decisions
        ]
        blocks.append(table(("Decided", "Value", "Reason"), rows))
    if trainer := find(plan, "trainer"):
        settings = [(str(key), without_home(text(trainer, key))) for key in trainer]
        blocks.append(Folded("Arguments given to the trainer", table(("Argument", "Value"), settings)))
    return Section("plan", "Plan", tuple(blocks))


def _predicted(stages: Stages) -> Block | None:
    """What was forecast before the first step beside what was measured; None for runs that had no forecast."""
    forecast = find(stages.plan, "forecast")
    if not forecast:
        return None
    train = {**(find(stages.metrics, "train") or {}), **stages.train}
    known = find(train, "calibration") or {}
    steps, a_step = figure(train, "planned_steps"), figure(known, "step_seconds")
    calibrated = None if steps is None or a_step is None else steps * a_step
    peaks = figure(forecast, "peak_memory_bytes"), figure(known, "peak_memory_bytes")
    lines = (
        ("Peak memory", size, *peaks, figure(train, "peak_memory_bytes")),
        ("Training time", duration, figure(forecast, "time", "seconds"), calibrated, figure(train, "seconds")),
    )
    rows = [
        (label, write(before), write(step), write(found), share(found, before if before is not None else step))
        for label, write, before, step, found in lines
        if before is not None or step is not None
    ]
    columns = ("Forecast", "Before loading", "After one micro-batch", "Measured", "Measured / forecast")
    return table(columns, rows) if rows else None
