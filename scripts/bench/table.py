"""Write the tables of scripts/bench/README.md and docs/benchmarks.md from results/: `python scripts/bench/table.py`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README, TABLE = HERE / "README.md", "table"
PAGE, BENCHMARKS = HERE.parent.parent / "docs" / "benchmarks.md", "benchmarks"
TOOL_NAMES = {
    "flat": "peftcli",
    "flat_512": "peftcli, `tokens_per_micro_batch: 512`",
    "padded": "peftcli, padded",
    "trl": "`trl`",
    "trl_fp32": "`trl`",
    "trl_tuned": "`trl`, tuned",
    "trl_tuned_fp32": "`trl`, tuned",
}
"""Tools as docs/benchmarks.md calls them."""

EARLIER_TITLES = {"flat lines": "padding-free", "peftcli, flat,": "peftcli, padding-free,", "as it comes": "defaults"}


def regime_lines(found: Mapping[str, Any]) -> Iterable[str]:
    """The comparisons of one file of batching.py."""
    device, packages = found["environment"]["device"]["name"], found["environment"]["packages"]
    cores = found["environment"]["cpu_count"]
    yield f"{device}, {cores} cores, `{found['shape']}`, torch {packages['torch']}, trl {packages['trl']}"
    yield ""
    yield (
        "| regime | tool | trained tokens/s | seconds, least to most | first step | process | peak | in the loop | "
        "largest loss difference | flat is |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for result in found["regimes"]:
        for name, tool in result["tools"].items():
            yield _tool_line(result, name, tool)
    yield ""


def _title(tool: Mapping[str, Any]) -> str:
    """The title of a tool; results of earlier versions have other words in it."""
    title = str(tool["title"])
    for earlier, now in EARLIER_TITLES.items():
        title = title.replace(earlier, now)
    return title


def _tool_line(result: Mapping[str, Any], name: str, tool: Mapping[str, Any]) -> str:
    if "error" in tool:
        return f"| {result['regime']} | {_title(tool)} | did not run: {tool['error']} | | | | | | | |"
    seconds, ratio = tool["seconds"], result["ratios"].get(name)
    speed = f"{tool['label_tokens_per_second']:,.0f}" if tool["equal_loss"] else "other loss"
    apart = tool["largest_loss_difference"]
    cells = [
        result["regime"],
        _title(tool),
        speed,
        f"{seconds['median']:.2f} ({seconds['min']:.2f} to {seconds['max']:.2f})",
        f"{tool['first_step_seconds']['median']:.1f} s",
        f"{tool['process_seconds']['median']:.1f} s",
        _mib(tool["peak_memory_bytes"]),
        _mib(tool["above_start_bytes"]),
        "-" if apart is None else f"{apart:.1e}",
        "" if ratio is None else f"{ratio['times_as_fast']:.2f}x ({ratio['least']:.2f} to {ratio['most']:.2f})",
    ]
    return f"| {' | '.join(cells)} |"


def _mib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.0f} MiB"


def other_lines(results: Path) -> Iterable[str]:
    """One line for each of the other measurements that were recorded."""
    for name, say in (("startup-cpu", _startup), ("prepare-cpu", _prepare), ("linear-cpu", _linear)):
        path = results / f"{name}.json"
        if path.is_file():
            yield f"- {say(json.loads(path.read_text()))}"


def _startup(found: Mapping[str, Any]) -> str:
    ways = [
        f"{way} {spread['median']:.1f} s"
        for way, spread in found.items()
        if isinstance(spread, dict) and "median" in spread
    ]
    shares = ", ".join(f"{share:.2f} of {way}" for way, share in found["ours_of_theirs"].items())
    return f"One step, {found['rows']:,} rows, whole process: {', '.join(ways)}; ours takes {shares}."


def _prepare(found: Mapping[str, Any]) -> str:
    seconds = {way: spread["median"] for way, spread in found["seconds"].items()}
    equal = "equal ids and labels" if found["equal_ids_and_labels"] else "ids or labels that are NOT equal"
    times = "" if found["times_as_fast"] is None else f", {found['times_as_fast']:.2f} times as fast"
    return (
        f"{found['rows']:,} chats: {seconds['ours']:.1f} s against {seconds['theirs']:.1f} s of SFTTrainer{times}, "
        f"{equal}; a second run makes its first step {found['second_beyond_imports_seconds']:.1f} s after its imports."
    )


def _linear(found: Mapping[str, Any]) -> str:
    first, last = found["points"][0], found["points"][-1]
    return (
        f"Seconds of a step grow with its tokens to the power of {found['exponent']:.2f}, from "
        f"{first['tokens']:,} tokens ({first['seconds']:.3f} s) to {last['tokens']:,} ({last['seconds']:.1f} s)."
    )


def page_lines(results: Path) -> Iterable[str]:
    """The table of docs/benchmarks.md: speed and memory of each tool as ratios, then the other measurements."""
    found = json.loads((results / "batching-cpu.json").read_text())
    packages, cores = found["environment"]["packages"], found["environment"]["cpu_count"]
    device = found["environment"]["device"]["name"]
    yield f"{device}, {cores} cores, torch {packages['torch']}, trl {packages['trl']}:"
    yield ""
    yield "| lengths | tool | trained tokens/s | peak memory | largest loss difference | peftcli is faster by |"
    yield "|---|---|---|---|---|---|"
    for result in found["regimes"]:
        for name, tool in result["tools"].items():
            yield _page_row(result, name, tool)
    yield ""
    yield from _page_others(results)


def _page_row(result: Mapping[str, Any], name: str, tool: Mapping[str, Any]) -> str:
    ratio = result["ratios"].get(name)
    cells = [
        result["regime"],
        TOOL_NAMES[name],
        f"{tool['label_tokens_per_second']:,.0f}" if tool["equal_loss"] else "other loss",
        _mib(tool["peak_memory_bytes"]),
        f"{tool['largest_loss_difference']:.1e}",
        "" if ratio is None else f"{ratio['times_as_fast']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})",
    ]
    return f"| {' | '.join(cells)} |"


def _page_others(results: Path) -> Iterable[str]:
    startup, prepare, linear, data = (
        json.loads((results / f"{name}-cpu.json").read_text()) for name in ("startup", "prepare", "linear", "data")
    )
    seconds = {
        way: spread["median"] for way, spread in startup.items() if isinstance(spread, dict) and "median" in spread
    }
    first, last, largest = linear["points"][0], linear["points"][-1], data["sizes"][-1]["ours"]
    yield "Other measurements on two cores:"
    yield ""
    yield (
        f"- One training step on {startup['rows']:,} rows, whole process: "
        + ", ".join(f"`{way}` {value:.1f} s" for way, value in seconds.items())
        + "."
    )
    yield (
        f"- Tokenizing {prepare['rows']:,} chats: {prepare['seconds']['ours']['median']:.1f} s, `SFTTrainer` "
        f"{prepare['seconds']['theirs']['median']:.1f} s, with equal ids and labels."
    )
    yield (
        f"- Time per step grows with its tokens to the power of {linear['exponent']:.2f}, from {first['tokens']:,} "
        f"tokens ({first['seconds']:.2f} s) to {last['tokens']:,} ({last['seconds']:.1f} s)."
    )
    yield (
        f"- A CSV file of {largest['rows']:,} rows: {largest['seconds']:.0f} s the first time, "
        f"{largest['second_time_seconds']:.1f} s from the cache, {largest['peak_anonymous_mib_above_start']:.0f} MiB "
        "of memory above the start."
    )
    kills = {row["fault"]: row["note"] for row in json.loads((results / "faults-cpu.json").read_text())["rows"]}
    ours, theirs = kills["kill -9 at 40 random moments"], kills["trl sft: kill -9 at 40 random moments"]
    yield (
        f"- 40 runs killed at random moments with `kill -9` and then resumed: {ours.split(' ')[0]} end with the bits "
        f"of the uninterrupted run. `trl sft`: {theirs}."
    )


def main() -> None:
    """Replace the text between the markers in both files."""
    results = HERE / "results"
    lines = [line for path in sorted(results.glob("batching-*.json")) for line in _lines_of(path)]
    README.write_text(replaced(README, TABLE, [*lines, *other_lines(results)]), encoding="utf-8")
    PAGE.write_text(replaced(PAGE, BENCHMARKS, page_lines(results)), encoding="utf-8")


def replaced(file: Path, mark: str, lines: Iterable[str]) -> str:
    """The text of a file with other lines between `<!-- mark -->` and `<!-- /mark -->`."""
    before, _, rest = file.read_text(encoding="utf-8").partition(f"<!-- {mark} -->")
    after = rest.partition(f"<!-- /{mark} -->")[2]
    return f"{before}<!-- {mark} -->\n" + "\n".join(lines) + f"\n<!-- /{mark} -->{after}"


def _lines_of(path: Path) -> Iterable[str]:
    found = json.loads(path.read_text())
    return regime_lines(found) if "environment" in found else ()


if __name__ == "__main__":
    main()
