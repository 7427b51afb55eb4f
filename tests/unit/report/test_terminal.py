"""The report on a terminal: the numbers of the other renderers, whole at every width, and no text that acts on it."""

import html
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from peftcli.cli.pipeline import inspect_data
from peftcli.progress import Silent
from peftcli.recipe.load import load_recipe
from peftcli.report.blocks import (
    Answer,
    Block,
    Code,
    Collapsed,
    Facts,
    Notices,
    Preview,
    PreviewRow,
    Report,
    Samples,
    Section,
    SideBySide,
    Span,
    Table,
    facts,
    table,
)
from peftcli.report.build import make_report
from peftcli.report.data import data_section
from peftcli.report.format import DASH
from peftcli.report.html import render_page
from peftcli.report.load import Stages, load_stages
from peftcli.report.markdown import render_markdown
from peftcli.report.terminal import print_blocks, render_terminal
from peftcli.results import DataJson
from peftcli.run_dir import RunDir
from peftcli.typed_json import parse


def printed(blocks: list[Block], width: int = 80, *, colour: bool = False) -> str:
    stream = StringIO()
    print_blocks(blocks, Console(file=stream, width=width, markup=False, highlight=False, force_terminal=colour))
    return stream.getvalue()


def shown(report: Report, width: int) -> str:
    stream = StringIO()
    render_terminal(report, Console(file=stream, width=width, markup=False, highlight=False))
    return stream.getvalue()


def leaves(blocks: tuple[Block, ...]) -> Iterator[Table | Facts]:
    """The tables and facts of blocks, folded ones too."""
    for block in blocks:
        match block:
            case Table() | Facts():
                yield block
            case Collapsed():
                yield block.table
            case SideBySide():
                yield from (made for stack in block.stacks for made in stack)


@pytest.fixture(scope="module")
def odd_data(recipe_in: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> DataJson:
    """The data report of rows of which some are twice, cut, dropped or long."""
    folder = tmp_path_factory.mktemp("odd")
    rows = [f'"{"very " * (number % 7)}small plum {number}",kind {number % 15}' for number in range(60)]
    rows += (
        ['"a plum, and once more",kind 1'] * 2
        + ['"nothing",']
        + [f'"plum {number}",{"long " * 60}' for number in range(8)]
    )
    (folder / "rows.csv").write_text("\n".join(["thing,kind", *rows]) + "\n", encoding="utf-8")
    limits = {"max_dropped": 1, "max_truncated": 1, "max_leaked": 1, "min_eos_trained": 0}
    dataset = {"path": str(folder / "rows.csv"), "max_length": 40, "limits": limits}
    recipe = load_recipe(recipe_in(folder, dataset=dataset)).recipe
    found = inspect_data(recipe, Silent(), smoke=False, preview=2).facts
    return parse(DataJson, json.loads(json.dumps(found)))


def data_blocks(data: DataJson) -> list[Block]:
    section = data_section(Stages(data=data))
    assert section is not None
    return list(section.blocks)


def test_all_three_renderers_show_the_same_numbers(real_run: Path) -> None:
    report = make_report(load_stages(RunDir(real_run)))
    plain = re.sub(r"\\(.)|\*\*", r"\1", html.unescape(render_markdown(report)))
    page = html.unescape(re.sub(r"<[^>]+>", "", render_page(report)))
    texts = [" ".join(text.split()) for text in (plain, page, shown(report, 400))]
    made = [block for section in report.sections for block in leaves(section.blocks)]
    cells = [cell.text for block in made if isinstance(block, Table) for row in block.rows for cell in row]
    cells += [value for block in made if isinstance(block, Facts) for _, value in block.pairs]
    wanted = {" ".join(cell.split()) for cell in cells} - {"", DASH}
    assert len(wanted) > 150
    for text in texts:
        assert [cell for cell in wanted if cell not in text] == []


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_broken(real_run: Path, width: int) -> None:
    report = make_report(load_stages(RunDir(real_run)))
    lines = shown(report, width).splitlines()
    assert max(map(cell_len, lines)) <= width
    results = next(section for section in report.sections if section.name == "results")
    (made,) = (block for block in results.blocks if isinstance(block, Table))
    assert made.numeric
    for row in made.rows:
        for at in made.numeric:
            assert any(row[at].text in line for line in lines), row[at].text


def test_a_table_that_is_too_wide_is_printed_in_parts_with_the_names_in_each() -> None:
    numbers = [f"{number}00,000" for number in range(1, 9)]
    titles = ("Name", *(f"Figure number {number}" for number in range(8)))
    made = table(titles, [("one", *numbers)], numeric=range(1, 9), note="All of them.")
    text = printed([made], 40)
    assert all(number in text for number in numbers) and text.count("one") > 1
    assert text.splitlines()[-1].strip() == "All of them."
    assert printed([made], 200).count("one") == 1


def test_a_column_without_any_value_is_left_out() -> None:
    made = table(("Metric", "Base", "Adapter", "Note"), [("loss", DASH, "1.0", ""), ("f1", DASH, DASH, "")])
    assert [line.split() for line in printed([made]).splitlines()] == [
        ["Metric", "Adapter"],
        ["loss", "1.0"],
        ["f1", DASH],
    ]


def test_notices_come_last_and_so_does_the_verdict(real_run: Path) -> None:
    made: list[Block] = [Notices(("look here",)), facts([("a", "1")])]
    assert printed(made).split() == ["a", "1", "note:", "look", "here"]
    report = make_report(load_stages(RunDir(real_run)))
    assert shown(report, 2000).splitlines()[-1] == report.verdict


def test_the_data_report_names_counts_reasons_and_places(odd_data: DataJson) -> None:
    text = printed(data_blocks(odd_data), 120)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert f"Read {odd_data.rows} 100 %" in lines
    (reason, number), *_ = odd_data.dropped.items()
    assert any(line.startswith(f"{reason} {number} rows.csv:") for line in lines)
    assert odd_data.truncated_examples[0] in text
    assert lines[-1].startswith("note: ") and odd_data.warnings[-1] in text.replace("\n", " ")


def test_the_lengths_are_bars_of_text_that_stand_for_all_rows(odd_data: DataJson) -> None:
    text = printed(data_blocks(odd_data), 120)
    bars = re.findall(r"^([\d,]+) to ([\d,]+) +[#|]* +(\d+)(.*)$", text, re.M)
    assert 1 < len(bars) <= 10
    assert sum(int(bar[2]) for bar in bars) == odd_data.train_rows
    marked = [bar for bar in bars if "max_length" in bar[3]]
    assert len(marked) == 1 and int(marked[0][0]) <= 40 <= int(marked[0][1]) and "max_length 40" in marked[0][3]


def test_without_colour_the_marks_are_brackets_and_with_it_they_are_styles() -> None:
    spans = (Span("prompt", "salt ->:"), Span("trained", " pan"), Span("dropped", "try"))
    block = Preview("Rows", spans[1:], (PreviewRow("a.csv:2", "5 tokens", spans),))
    assert "salt ->:{+ pan+}[-try-]" in printed([block])
    text = printed([block], colour=True)
    assert "{+" not in text and "\x1b[1;32m pan\x1b[0m\x1b[9;31mtry\x1b[0m" in text


def test_an_answer_is_right_or_wrong_by_its_sign() -> None:
    said = (Answer("say apple"), Answer("apple"), Answer("pear", False), Answer(" apple\n", True), Answer(None))
    lines = printed([Samples(("Prompt", "Reference", "Base", "Adapter", "Merged"), (said,))]).splitlines()
    assert re.split(r" {2,}", lines[1].strip()) == ["say apple", "apple", "✗ pear", "✓ apple", DASH]


def test_no_text_of_a_run_can_colour_or_rewrite_the_terminal() -> None:
    evil = "\x1b]0;x\x07[red]\x1b[31mtext\u202e\r\b"
    cells = [(evil, evil)]
    blocks: list[Block] = [
        table((evil, evil), cells, note=evil),
        facts([(evil, evil)]),
        Notices((evil,)),
        Code(evil, evil),
        Samples((evil, "Reference"), ((Answer(evil), Answer(evil, False)),)),
        Collapsed(evil, table(("a", "b"), cells)),
        Preview(evil, (Span("trained", evil),), (PreviewRow(evil, evil, (Span("dropped", evil),)),)),
    ]
    report = Report(evil, evil, evil, "", True, evil, (evil,), (), (), (Section("a", evil, tuple(blocks)),) * 2)
    text = shown(report, 80)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e]", text)
    assert "[red]" in text and "\u241b" in text


def test_the_renderer_imports_nothing_heavy() -> None:
    code = (
        "import sys; import peftcli.report.terminal, peftcli.report.forecast, peftcli.report.data; "
        "print({'torch', 'transformers', 'numpy', 'pyarrow', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_nothing_is_drawn_for_the_terminal(real_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> str:
        raise AssertionError("a drawing was made")

    for module in ("data", "plots", "sections"):
        monkeypatch.setattr(f"peftcli.report.{module}.drawing", refuse)
    report = make_report(load_stages(RunDir(real_run)))
    assert "Tokens of a row" in shown(report, 100)
    with pytest.raises(AssertionError, match="a drawing was made"):
        render_page(report)
