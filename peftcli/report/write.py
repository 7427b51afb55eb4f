"""Writes the report of a run: a pure function of the JSON files in its folder."""

from peftcli.report.content import make_report
from peftcli.report.markdown import render_markdown
from peftcli.report.page import render_page
from peftcli.report.stages import load_stages
from peftcli.rundir import RunDir, write_text


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
