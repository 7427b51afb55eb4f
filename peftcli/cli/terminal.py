"""Data statistics, labels, rows and the memory forecast as tables for the terminal."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import ceil
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from peftcli.cli.console import printable
from peftcli.data.spans import DROPPED, TRAINED, Part, shorten
from peftcli.plan.machine import Machine
from peftcli.plan.memory.forecast import MARGIN
from peftcli.report.format import count, duration, several, size

ROWS = (
    ("read", "rows", "rows"),
    ("dropped", "dropped_rows", "rows"),
    ("training", "train_rows", "rows"),
    ("test", "test_rows", "rows"),
    ("cut at max_length", "truncated_rows", "rows"),
    ("test, also in training", "leaked_rows", "test_rows"),
)
RARE_ROWS = (
    ("test, prompt or text also in training", "leaked_prompts", "test_rows"),
    ("test, nearly in training", "near_leaked_rows", "test_rows"),
    ("equal to an earlier row", "duplicate_rows", "rows"),
    ("nearly equal to an earlier row", "near_duplicate_rows", "rows"),
    ("text of an earlier row, another label", "conflicting_rows", "train_rows"),
    ("token over the end of the prompt", "merged_boundary_rows", "train_rows"),
    ("start token twice", "doubled_bos_rows", "rows"),
    ("with an unknown token", "unknown_token_rows", "rows"),
)
"""Shown where there are any."""
EXAMPLES = {
    "truncated_rows": "truncated_examples",
    "leaked_rows": "leaked_examples",
    "near_leaked_rows": "near_leaked_examples",
    "duplicate_rows": "duplicate_examples",
    "near_duplicate_rows": "near_duplicate_examples",
    "conflicting_rows": "conflicting_examples",
}
SCANNED = ("control_characters", "replacement_characters", "email", "phone", "key")
SIGNS = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("fail", "bold red"), "skip": ("-", "dim")}
MOST_LABELS, MOST_BARS, BAR = 12, 10, 28
PLACES = 3

WORDS = (
    ("words", "words"),
    ("within an entity", "tagged"),
    ("without a token of their own", "silent"),
    ("cut off at max_length", "cut"),
    ("cut off, within an entity", "cut_tagged"),
    ("going on with no entity", "odd_tags"),
)
SPREAD = ("min", "median", "max", "mean", "deviation")
MOST_TYPES = 12

STYLES = {TRAINED: "bold green", DROPPED: "strike red"}
BRACKETS = {TRAINED: ("{+", "+}"), DROPPED: ("[-", "-]")}

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


def show_data(data: Mapping[str, Any], out: Console) -> None:
    """Print the content of `data.json`: tables, rows with their trained tokens, and at the end what to look at."""
    for part in data_tables(data):
        out.print(part)
        out.print()
    for line in preview_lines(data, colour=out.color_system is not None and not out.no_color):
        out.print(line)
    for warning in warning_lines(data):
        out.print(Text(f"note: {warning}", style="yellow"), soft_wrap=True)


def data_tables(data: Mapping[str, Any]) -> list[RenderableType]:
    """The data report as tables, in reading order; parts that `data.json` does not have are left out."""
    made = [
        _rows(data),
        _dropped(data),
        _sources(data),
        _joins(data),
        _tokens(data),
        _lengths(data),
        _labels(data),
        numbers_table(data),
        words_table(data),
        _columns(data),
        _checks(data),
    ]
    return [part for part in made if part is not None]


def _rows(data: Mapping[str, Any]) -> Table | None:
    table = _table("rows", "number|r", "share|r", "first at")
    shown = [row for row in ROWS if data.get(row[1]) is not None] + [row for row in RARE_ROWS if data.get(row[1])]
    for title, key, of in shown:
        share = "" if key == "rows" else _share(data[key], data.get(of))
        table.add_row(title, _count(data[key]), share, _places(data.get(EXAMPLES.get(key, ""))))
    ended, expected = data.get("eos_trained_rows"), data.get("eos_expected_rows", data.get("train_rows"))
    if ended is not None:
        table.add_row("training, end token trained", _count(ended), _share(ended, expected), "")
    return table if table.row_count else None


def _dropped(data: Mapping[str, Any]) -> Table | None:
    dropped = data.get("dropped") or {}
    table = _table("dropped because", "rows|r", "first at")
    places = data.get("dropped_examples") or {}
    for reason, number in sorted(dropped.items(), key=lambda found: -found[1]):
        table.add_row(_cell(reason), _count(number), _places(places.get(reason)))
    return table if dropped else None


def _sources(data: Mapping[str, Any]) -> Table | None:
    sources = data.get("sources") or []
    table = _table("source", "rows|r", "read as", "weight|r")
    for source in sources:
        read_as = str(source.get("read_as") or str(data.get("format") or "").replace("_", " + "))
        weight = source.get("weight")
        table.add_row(
            _cell(source.get("path")),
            _count(source.get("rows")),
            _cell(read_as),
            "" if weight is None else f"{weight:g}",
        )
    return table if sources else None


def _joins(data: Mapping[str, Any]) -> Table | None:
    joins = data.get("joins") or []
    table = _table("joined with", "on", "rows|r", "without a partner|r")
    for join in joins:
        on = ", ".join(map(str, join.get("on") or []))
        table.add_row(_cell(join.get("path")), _cell(on), _count(join.get("rows")), _count(join.get("unmatched")))
    return table if joins else None


def _tokens(data: Mapping[str, Any]) -> Table | None:
    tokens = data.get("tokens")
    if not tokens or data.get("format") == "images":
        return None
    if data.get("format") == "classification":  # a class belongs to a row, not to its tokens
        table = _table("tokens", "all|r")
        for title, whole in (("training", "train"), ("test", "test")):
            table.add_row(title, _count(tokens.get(whole)))
        return table
    table = _table("tokens", "all|r", "trained or scored|r", "share|r")
    for title, whole, part in (("training", "train", "trained"), ("test", "test", "test_trained")):
        share = _share(tokens.get(part), tokens.get(whole))
        table.add_row(title, _count(tokens.get(whole)), _count(tokens.get(part)), share)
    return table


def _lengths(data: Mapping[str, Any]) -> Table | None:
    """The histogram of the lengths as bars of text, with the place of max_length."""
    histogram, limit = data.get("length_histogram"), data.get("max_length")
    if not histogram or not histogram.get("counts") or data.get("format") == "images":
        return None
    edges, counts = _merged(histogram["edges"], histogram["counts"])
    length = data.get("length") or {}
    known = [key for key in ("min", "median", "p95", "max") if length.get(key) is not None]
    table = _table("tokens of a row|r", ", ".join(f"{key} {length[key]:,.6g}" for key in known), "rows|r", "")
    for (low, high), number in zip(pairwise(edges), counts, strict=True):
        # A row of so many tokens as an edge stands in the bar above it.
        here = limit is not None and low <= limit < high
        note = f"<- max_length {limit:,}" if here else ""
        table.add_row(f"{ceil(low):,} to {ceil(high) - 1:,}", _bar(number, max(counts)), _count(number), note)
    if limit is not None and limit >= edges[-1]:
        table.add_row("", f"max_length {limit:,}: no training row is longer", "", "")
    return table


def _merged(edges: Sequence[float], counts: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MOST_BARS bars, each of as many neighbours, from the first that is not empty.

    >>> _merged([0, 1, 2, 3, 4], [0, 5, 6, 7])
    ([1, 2, 3, 4], [5, 6, 7])
    """
    first = next((at for at, number in enumerate(counts) if number), 0)
    edges, counts = edges[first:], counts[first:]
    step = -(-len(counts) // MOST_BARS)
    starts = range(0, len(counts), step)
    return [*(edges[at] for at in starts), edges[-1]], [sum(counts[at : at + step]) for at in starts]


def _labels(data: Mapping[str, Any]) -> Table | None:
    labels = data.get("labels")
    if not labels or not labels.get("train"):
        return None
    train, test = labels["train"], labels.get("test") or {}
    # Of many values only the most frequent are stored, so the shares are those of all rows.
    total = labels.get("total") or {"train": data.get("train_rows"), "test": data.get("test_rows")}
    totals = total["train"], total["test"] if test else None
    table = _table(str(labels.get("of") or "value"), "", "training|r", "share|r", "of the test rows|r")
    values = sorted(train, key=lambda value: -train[value])
    for value in values[:MOST_LABELS]:
        bar = _bar(train[value], train[values[0]], BAR // 2)
        shares = _share(train[value], totals[0]), _share(test.get(value, 0), totals[1])
        table.add_row(_cell(value), bar, _count(train[value]), *shares)
    more = max(labels.get("distinct") or 0, len(values)) - min(len(values), MOST_LABELS)
    if more:
        table.add_row(Text(f"and {more:,} more", style="dim"), "", "", "", "")
    return table


def _columns(data: Mapping[str, Any]) -> Table | None:
    columns = data.get("columns") or []
    table = _table("column", "rows|r", "null|r", "empty|r", "types", "found")
    for column in columns:
        first = column.get("first") or {}
        found = []
        for key in SCANNED:
            if column.get(key):
                at = f" (first {as_line(first[key][0])})" if first.get(key) else ""
                found.append(f"{_count(column[key])} {key.replace('_', ' ')}{at}")
        types = ", ".join(f"{kind} {_count(number)}" for kind, number in (column.get("types") or {}).items())
        figures = [_count(column.get(key)) for key in ("rows", "null", "empty")]
        table.add_row(_cell(column.get("column")), *figures, _cell(types), _cell(", ".join(found)))
    return table if columns else None


def _checks(data: Mapping[str, Any]) -> Table | None:
    checks = data.get("checks") or []
    table = _table("check", "", "")
    for check in checks:
        word, style = SIGNS.get(str(check.get("result")), (as_line(check.get("result")), ""))
        table.add_row(_cell(check.get("name")), Text(word, style=style), _cell(check.get("said")))
    return table if checks else None


def _table(*columns: str) -> Table:
    """A table of the house; `|r` behind a title sets its column to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        title, _, side = printable(column).partition("|")
        table.add_column(title, justify="right" if side else "left", overflow="fold", no_wrap=bool(side))
    return table


def _bar(number: float, most: float, width: int = BAR) -> str:
    """A bar of text; a number that is not 0 has at least a thin one.

    >>> _bar(3, 4, 8), _bar(1, 1000, 8), _bar(0, 4, 8)
    ('######', '|', '')
    """
    length = round(width * number / most) if most else 0
    return "#" * length or ("|" if number else "")


def _places(found: Any) -> str:
    """The first few places: of rows, or of pairs of equal rows."""
    shown = []
    for place in list(found or [])[:PLACES]:
        if isinstance(place, Mapping):
            shown.append(" = ".join(as_line(part) for part in place.values()))
        else:
            shown.append(as_line(place))
    return ", ".join(shown)


def _cell(value: Any) -> Text:
    return Text(as_line(value))


def _count(value: Any) -> str:
    return "-" if value is None else f"{value:,}"


def _share(part: float | None, whole: float | None) -> str:
    """Part of the whole in percent; only none and all are written as 0 and 100.

    >>> _share(0, 5), _share(1, 100000), _share(99999, 100000), _share(1, 8)
    ('0.0%', '<0.1%', '>99.9%', '12.5%')
    """
    if part is None or not whole:
        return "-"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "<0.1%"
    return ">99.9%" if 99.9 < percent < 100 else f"{percent:.1f}%"


def numbers_table(data: Mapping[str, Any]) -> Table | None:
    """The spread of the numbers of a regression on both sides."""
    numbers = data.get("numbers")
    if not numbers:
        return None
    table = _table(as_line(numbers.get("of")), *(f"{name}|r" for name in SPREAD))
    for title, side in (("training", "train"), ("test", "test")):
        found = numbers.get(side)
        if not found:
            continue
        table.add_row(title, *("-" if found.get(name) is None else f"{found[name]:,.6g}" for name in SPREAD))
    return table


def words_table(data: Mapping[str, Any]) -> Table | None:
    """Words of tagged rows and entities by type, both sides together."""
    words = data.get("words")
    if not words:
        return None
    table = _table("words of all rows", "number|r")
    for title, key in WORDS:
        if words.get(key) or key == "words":
            table.add_row(title, f"{words.get(key, 0):,}")
    entities = list((words.get("entities") or {}).items())
    for kind, number in entities[:MOST_TYPES]:
        table.add_row(Text(f"entities: {as_line(kind)}"), f"{number:,}")
    if len(entities) > MOST_TYPES:
        table.add_row(Text(f"and {len(entities) - MOST_TYPES:,} more types", style="dim"), "")
    return table


def preview_lines(data: Mapping[str, Any], *, colour: bool) -> list[Text]:
    """Rows as the trainer sees them, after a line that explains the marks; long rows without their middle.

    Args:
        data: content of `data.json`.
        colour: the marks are colours; else `{+trained+}` and `[-cut off-]`.
    """
    rows = data.get("preview") or []
    if not rows:
        return []
    marks = [_marked(Part(kind, word), colour) for kind, word in ((TRAINED, "trained"), (DROPPED, "cut off"))]
    lines = [Text("rows as the trainer sees them: ").append_text(_marked(Part("", "read"), colour))]
    for mark in marks:
        lines[0].append(", ").append_text(mark)
    for row in rows:
        tokens, trained = (f"{row[key]:,}" if row.get(key) is not None else "-" for key in ("tokens", "trained"))
        size = f"{tokens} tokens" + (f", {trained} trained" if row.get("trained", "") is not None else "")
        size = "an image" if row.get("tokens", "") is None else size
        lines.append(Text(f"{as_line(row.get('place'))}: {size}", style="bold" if colour else ""))
        parts = [Part(str(part.get("kind")), str(part.get("text"))) for part in row.get("parts") or []]
        lines.append(Text().join(_marked(part, colour) for part in shorten(parts)))
    return lines


def warning_lines(data: Mapping[str, Any]) -> list[str]:
    """What should be looked at before training, the worst first, one line each."""
    checks = data.get("checks") or []
    failed = [check.get("said") for check in checks if check.get("result") == "fail"]
    said = [*failed, *(data.get("warnings") or [])]
    return list(dict.fromkeys(as_line(text) for text in said if text))


def as_line(value: Any) -> str:
    """Any value as text on one line that can neither colour nor rewrite the terminal.

    >>> as_line("a\\n  b"), as_line(None)
    ('a b', '-')
    """
    return " ".join(printable(str("-" if value is None else value)).split())


def _marked(part: Part, colour: bool) -> Text:
    if colour:
        return Text(printable(part.text), style=STYLES.get(part.kind, "dim"))
    before, after = BRACKETS.get(part.kind, ("", ""))
    return Text(f"{before}{printable(part.text)}{after}")


def show_forecast(forecast: Mapping[str, Any] | None, machine: Machine, out: Console) -> None:
    """Print a forecast; a line in its place where none could be made."""
    out.print()
    if forecast is None:
        out.print("forecast: none, since the widths of this model could not be read from its structure")
        return
    out.print(memory_table(forecast))
    for line in (verdict(forecast, machine), *suggestion_lines(forecast), *time_lines(forecast), disk_line(forecast)):
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


def suggestion_lines(forecast: Mapping[str, Any]) -> list[str]:
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
        f"{count(time['tokens_per_step'])} tokens), evaluation aside",
        *evaluation_lines(forecast),
    ]


def evaluation_lines(forecast: Mapping[str, Any]) -> list[str]:
    """The estimated time of evaluation; none where there are no test rows."""
    found = forecast["time"]["evaluation"]
    if found is None:
        return []
    models = "base and adapter" if found["passes"] > 1 else "the adapter alone"
    tokens, together = count(found["answer_tokens"]), count(found["answers_at_once"])
    answers = f"up to {count(found['answered_rows'])} answers of up to {tokens} tokens, {together} at once"
    loss = (
        "the loss of test rows that are not read yet is not counted"
        if found["scored_rows"] is None
        else f"the loss of {several(found['scored_rows'], 'row', 'rows')}"
    )
    parts = [answers] if found["answered_rows"] else []
    return [
        f"evaluation: at most about {duration(found['seconds'])}, an estimate ({models}: {', '.join([*parts, loss])}); "
        "`train` measures it"
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
        if time["evaluation"] is not None:
            line += f" and at most about {duration(time['evaluation']['seconds'])} of evaluation (estimates)"
    if forecast["tight"]:
        return line + "; this barely fits; `peftcli plan RECIPE` lists what to lower"
    return line if forecast["fits"] else line + "; this may not fit; `peftcli plan RECIPE` lists what to change"
