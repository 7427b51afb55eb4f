"""Builds the report of a run, a pure function of the JSON files in its folder, and writes it."""

from peftcli.report.blocks import Block, Collapsed, Report, Section
from peftcli.report.data import data_section
from peftcli.report.format import text
from peftcli.report.html import render_page
from peftcli.report.load import Stages, load_stages
from peftcli.report.markdown import render_markdown
from peftcli.report.metrics import classes_section, metric_table
from peftcli.report.overview import gates, status, subtitle, tiles, verdict, warnings
from peftcli.report.plots import log_plots, log_table
from peftcli.report.sections import (
    earlier_section,
    environment_section,
    merge_section,
    plan_section,
    ranks_section,
    samples_section,
    selection_section,
    sizes_section,
    training_facts,
)
from peftcli.run_dir import RunDir, write_text


def write_report(run: RunDir) -> None:
    """Write `report.md` and `report.html` of a run; the same JSON gives the same bytes.

    A stage whose file is absent has no section, and a figure that is null is shown as a dash.

    Raises:
        RecipeError: the folder has no `metrics.json` or no `plan.json`: no stage has ended.
        DataError: a file of the run is not JSON, or another version of peftcli wrote it.
    """
    report = make_report(load_stages(run))
    write_text(run.report_md, render_markdown(report))
    write_text(run.report_html, render_page(report))


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
        name=text(stages.plan.name),
        subtitle=subtitle(stages),
        status=word,
        status_tone=tone,
        smoke=stages.plan.smoke or stages.metrics.smoke,
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
        blocks.append(Collapsed("The log in figures", rows))
    return Section("training", "Training", tuple(blocks)) if blocks else None
