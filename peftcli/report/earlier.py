"""The stages of a run that was trained in several: what each trained, and what the model could do after it."""

from peftcli.report.blocks import Section, table
from peftcli.report.format import count, duration, share
from peftcli.report.scores import primary_metric
from peftcli.report.stages import Stages, figure, text


def earlier_section(stages: Stages) -> Section | None:
    """A row for each stage, the run's own last; None for a run of one stage."""
    if not stages.earlier:
        return None
    metric = primary_metric(stages.metrics)
    known = [*stages.earlier, (f"{len(stages.earlier) + 1} (this run)", stages.plan, stages.metrics)]
    rows = []
    for name, plan, metrics in known:
        after = None if metric is None else figure(metrics, "adapter", metric.key)
        trainable, total = (figure(plan, "parameters", key) for key in ("trainable", "total"))
        rows.append(
            (
                name,
                text(plan, "adapter", "method"),
                f"{count(trainable)} ({share(trainable, total)})",
                count(figure(metrics, "train", "steps")),
                duration(figure(metrics, "train", "seconds")),
                "" if metric is None else metric.write(after),
            )
        )
    title = "" if metric is None else metric.heading
    columns = ("Stage", "Method", "Trainable", "Steps", "Time", title)
    lead = "Each stage starts from the result of the one before; the base of the results is that of the first."
    return Section("stages", "Stages", (table(columns, rows, numeric=(2, 3, 4, 5)),), lead)
