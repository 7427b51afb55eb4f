"""Renders the report as one HTML page without network access and scripts."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from peftcli.report.blocks import Report
from peftcli.report.format import clip, pieces, visible

LONGEST = 20_000  # characters of one prompt or answer


def render_page(report: Report) -> str:
    """Render a report as one HTML file; every string of the run goes through `visible` and is escaped."""
    environment = Environment(
        loader=PackageLoader("peftcli.report", "."),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["pieces"] = lambda text: pieces(clip(text, LONGEST))
    # Drawings are trusted: they contain numbers and fixed words, but no text of the run.
    environment.filters["drawing"] = Markup
    return environment.get_template("page.html.j2").render(report=report) + "\n"


def _finalize(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
