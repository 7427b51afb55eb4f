"""What a run's files amount to: the report, section by section, before it is written in any format."""

from peftcli.report.blocks import Block, Folded, Report, Section
from peftcli.report.classes import classes_section
from peftcli.report.data import data_section
from peftcli.report.earlier import earlier_section
from peftcli.report.head import gates, status, subtitle, tiles, verdict, warnings
from peftcli.report.outcome import environment_section, merge_section, sizes_section, training_facts
from peftcli.report.plots import log_plots, log_table
from peftcli.report.ranks import ranks_section
from peftcli.report.scores import metric_table
from peftcli.report.sections import plan_section, samples_section
from peftcli.report.selection import selection_section
from peftcli.report.stages import Stages, text


def make_report(stages: Stages) -> Report:
    """Make the report of a run from what its stages wrote."""
    sections = (
        _results(stages),
        classes_section(stages),
        earlier_section(stages),
        selection_section(stages),
        _training(stages),
        ranks_section(stages),
        samples_section(stages),
        data_section(stages),
        plan_section(stages),
        merge_section(stages),
        sizes_section(stages),
        environment_section(stages),
    )
    word, tone = status(stages)
    return Report(
        name=text(stages.plan, "name"),
        subtitle=subtitle(stages),
        status=word,
        status_tone=tone,
        smoke=bool(stages.plan.get("smoke") or stages.metrics.get("smoke")),
        verdict=verdict(stages),
        warnings=warnings(stages),
        tiles=tiles(stages),
        gates=gates(stages),
        sections=tuple(section for section in sections if section is not None),
    )


def _results(stages: Stages) -> Section | None:
    made = metric_table(stages)
    return None if made is None else Section("results", "Results", (made,))


def _training(stages: Stages) -> Section | None:
    plots, rows, figures = log_plots(stages), log_table(stages), training_facts(stages)
    blocks: list[Block] = [block for block in (plots, figures) if block is not None]
    if rows is not None:
        blocks.append(Folded("The log in figures", rows))
    return Section("training", "Training", tuple(blocks)) if blocks else None
