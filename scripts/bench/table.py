"""Write the table of scripts/bench/README.md from the files in results/: `python scripts/bench/table.py`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BEGIN, END = "<!-- table -->", "<!-- /table -->"


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


def _tool_line(result: Mapping[str, Any], name: str, tool: Mapping[str, Any]) -> str:
    if "error" in tool:
        return f"| {result['regime']} | {tool['title']} | did not run: {tool['error']} | | | | | | | |"
    seconds, ratio = tool["seconds"], result["ratios"].get(name)
    speed = f"{tool['label_tokens_per_second']:,.0f}" if tool["equal_loss"] else "other loss"
    apart = tool["largest_loss_difference"]
    cells = [
        result["regime"],
        tool["title"],
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


def main() -> None:
    """Replace what stands between the two marks."""
    readme = HERE / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    lines = [line for path in sorted((HERE / "results").glob("batching-*.json")) for line in _lines_of(path)]
    lines += other_lines(HERE / "results")
    readme.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


def _lines_of(path: Path) -> Iterable[str]:
    found = json.loads(path.read_text())
    return regime_lines(found) if "environment" in found else ()


if __name__ == "__main__":
    main()
