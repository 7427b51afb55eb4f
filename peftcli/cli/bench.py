"""`peftcli bench`: a comparison of a few minutes, a table, and a result file to share."""

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from peftcli.bench.compare import BenchRequest, compare_quickly
from peftcli.cli.console import Shown, console
from peftcli.cli.text import JSON_OUTPUT, printable
from peftcli.doctor.check import private_words, without_private
from peftcli.report.format import size
from peftcli.run_dir import write_json


def bench_command(request: BenchRequest, output: Path | None, out: TextIO, err: TextIO, *, as_json: bool) -> None:
    """Compare peftcli with SFTTrainer on this machine and print the results.

    Args:
        output: file for the JSON object that `--json` prints.
    """
    shown = Shown(console(err))
    with tempfile.TemporaryDirectory(prefix="peftcli-bench-") as folder:
        found = nameless(compare_quickly(request, Path(folder), shown), private_words())
    if output is not None:
        write_json(output, found)
    if as_json:
        JSON_OUTPUT.write(json.dumps(found, ensure_ascii=False), out)
        return
    for result in found["regimes"]:
        console(out).print(bench_table(result))
        console(out).print("")
        for tool in result["tools"].values():
            console(out).print(printable(tool_line(tool)))
    _print_verdict(found["verdict"], output, console(out))


def _print_verdict(verdict: str, output: Path | None, out: Console) -> None:
    out.print(printable(f"\n{verdict}"))
    if output is not None:
        out.print(printable(f"results  {output}: contains no names or folders, safe to share"))


def tool_line(tool: Mapping[str, Any]) -> str:
    """The attention and loss kernels of a tool and its micro-batch size; its error if it did not run."""
    if "error" in tool:
        return f"{tool['title']} did not run: {tool['error']}"
    attention, head = tool["attention"] or "unknown", tool["loss_head"] or "unknown"
    return (
        f"{tool['title']}: attention {attention}, loss head {head}, "
        f"up to {tool['micro_batch_tokens']:,} tokens per micro-batch"
    )


def nameless(value: Any, private: Mapping[str, str]) -> Any:
    """The same object without folders, user names and host names in any text."""
    if isinstance(value, str):
        return without_private(value, private)
    if isinstance(value, Mapping):
        return {key: nameless(one, private) for key, one in value.items()}
    if isinstance(value, list):
        return [nameless(one, private) for one in value]
    return value


COLUMNS: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "trained tokens/s": lambda tool: f"{tool['label_tokens_per_second']:,.0f}" if tool["equal_loss"] else "other loss",
    "seconds": lambda tool: "{median:.2f} ({min:.2f}-{max:.2f})".format(**tool["seconds"]),
    "first step": lambda tool: f"{tool['first_step_seconds']['median']:.1f} s",
    "process": lambda tool: f"{tool['process_seconds']['median']:.1f} s",
    "peak": lambda tool: _size(tool["peak_memory_bytes"]),
    "in the loop": lambda tool: _size(tool["above_start_bytes"]),
    "GPU": lambda tool: _size(tool["card_bytes"]),
    "MFU": lambda tool: None if tool.get("mfu") is None else f"{tool['mfu']:.1%}",
    "held-out loss": lambda tool: None if tool["held_out_loss"] is None else f"{tool['held_out_loss']:.4f}",
}
"""Columns of the table; columns without a value for any tool are omitted."""


def bench_table(result: Mapping[str, Any]) -> Table:
    """The results of one regime, one row per tool; a tool with a different loss has no speed."""
    tools = result["tools"]
    cells = {name: {title: cell(tool) for title, cell in COLUMNS.items()} for name, tool in _ran(tools).items()}
    titles = [title for title in COLUMNS if any(row[title] is not None for row in cells.values())]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(f"{result['regime']}, {result['steps']} steps", no_wrap=True)
    for title in (*titles, "peftcli is"):
        table.add_column(title, justify="right", no_wrap=title == "seconds")
    for name, tool in tools.items():
        ratio = result["ratios"].get(name)
        times = "" if ratio is None else f"{ratio['times_as_fast']:.2f}x"
        row = [cells[name][title] or "-" for title in titles] if name in cells else ["-"]
        table.add_row(tool["title"], *row, *([times] if name in cells else []))
    return table


def _ran(tools: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tool for name, tool in tools.items() if "error" not in tool}


def _size(value: int | None) -> str | None:
    return None if value is None else size(value)
