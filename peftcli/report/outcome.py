"""The parts of the report on what came out: training, merge, sizes, and the machine that it ran on."""

from typing import Any

from peftcli.report.blocks import Block, Code, Section, facts, table
from peftcli.report.format import DASH, compact, count, duration, percent, share, significant, size
from peftcli.report.stages import Stages, figure, find, objects, text
from peftcli.report.text import without_home


def training_facts(stages: Stages) -> Block | None:
    """What training took."""
    train = {**(find(stages.metrics, "train") or {}), **stages.train}
    if not train:
        return None
    resumed = figure(train, "resumed_from_step")
    first, last = figure(train, "first_loss"), figure(train, "last_loss")
    images = find(stages.data, "format") == "images"
    losses = f"{significant(first)} → {significant(last)}" if first is not None or last is not None else None
    return facts(
        (
            ("Steps", count(figure(train, "steps"))),
            ("Rows", count(figure(train, "rows"))),
            ("Epochs", compact(figure(train, "epochs"))),
            ("Tokens", None if images else _tokens(train, find(stages.data, "format") == "classification")),
            ("Time", duration(figure(train, "seconds"))),
            ("Speed", None if images else f"{significant(figure(train, 'tokens_per_second'))} tokens/s"),
            ("Peak memory", size(figure(train, "peak_memory_bytes"))),
            ("Training loss", losses),
            ("Resumed from", "not resumed" if resumed is None else f"step {count(resumed)}"),
        )
    )


DRIFT = (
    ("top1_agreement", "Same first choice (top-1 agreement)", percent),
    ("max_abs_logit_difference", "Largest difference of a logit", compact),
    ("mean_abs_logit_difference", "Mean difference of a logit", compact),
    ("kl_nats", "KL divergence, nats per position", compact),
)


def _tokens(train: dict[str, Any], of_rows: bool) -> str:
    """Tokens that were read and, where they are what is trained, how many of them were."""
    tokens, trained = count(figure(train, "tokens")), count(figure(train, "trained_tokens"))
    return tokens if of_rows else f"{tokens}, {trained} of them trained"


def merge_section(stages: Stages) -> Section | None:
    """How far the merged model is from the adapter that it came from."""
    merge = {**(find(stages.metrics, "merge") or {}), **stages.merge}
    if not merge:
        return None
    limits = find(merge, "limit") or {}
    rows = [(title, write(figure(merge, key)), text(limits, key)) for key, title, write in DRIFT]
    known = {key for key, _, _ in DRIFT}
    rows += [(str(key), compact(figure(merge, key)), text(limits, key)) for key in limits if key not in known]
    blocks: list[Block] = [
        facts(
            (
                ("Merged into", f"{text(merge, 'into')} base"),
                ("Precision", text(merge, "dtype") if "dtype" in merge else None),
                ("Compared on", _compared(merge)),
                (
                    "Within the limits",
                    _within(merge["met"]) if "met" in merge else None,
                ),
                ("Size on disk", size(figure(merge, "bytes")) if "bytes" in merge else None),
                ("Time", duration(figure(merge, "seconds")) if "seconds" in merge else None),
            )
        ),
        table(("Drift from the adapter", "Measured", "Limit"), rows, numeric=(1, 2)),
    ]
    if candidates := objects(merge, "candidates"):
        blocks.append(_candidates(candidates, merge.get("into")))
    return Section("merge", "Merge", tuple(blocks))


def _within(met: Any) -> str:
    return DASH if met is None else "✓ yes" if met else "✗ no"


def _compared(merge: dict[str, Any]) -> str | None:
    rows, positions = figure(merge, "rows"), figure(merge, "positions")
    what = "training rows, since none were held out" if merge.get("rows_from") == "training" else "rows"
    return None if rows is None and positions is None else f"{count(rows)} {what}, {count(positions)} positions"


NOT_SHOWN = ("into", "rows", "positions")  # the same for every candidate, or the row's own name


def _candidates(candidates: list[dict[str, Any]], into: Any) -> Block:
    keys = list(dict.fromkeys(key for row in candidates for key in row if key not in NOT_SHOWN))
    titles = [{"kl_nats": "KL, nats"}.get(key, key.replace("_", " ").capitalize()) for key in keys]
    rows = [
        (
            text(row, "into") + (" (taken)" if row.get("into") == into else ""),
            *(_candidate_cell(row, key) for key in keys),
        )
        for row in candidates
    ]
    return table(("Candidate", *titles), rows, numeric=range(1, len(keys) + 1))


def _candidate_cell(row: dict[str, Any], key: str) -> str:
    value = figure(row, key)
    if value is None:
        return text(row, key)
    return significant(value) if key == "loss" else percent(value) if key == "top1_agreement" else compact(value)


def sizes_section(stages: Stages) -> Section | None:
    """What has to be stored or sent, against the base model."""
    sizes = find(stages.metrics, "bytes") or {}
    base = figure(sizes, "base")
    rows = [
        (title, size(value), count(value), share(value, base))
        for title, value in (
            ("Base model", base),
            ("Adapter", figure(sizes, "adapter")),
            ("Merged model", figure(stages.merge, "bytes")),
        )
        if value is not None or title != "Merged model"
    ]
    if all(row[1] == DASH for row in rows):
        return None
    made = table(("On disk", "Size", "Bytes", "Share of the base"), rows, numeric=(1, 2, 3))
    return Section("sizes", "Sizes", (made,))


def environment_section(stages: Stages) -> Section | None:
    """On what it ran, with which versions, and the command that runs it again."""
    environment = stages.environment
    if not environment:
        return None
    device = find(environment, "device") or {}
    capability = find(device, "capability")
    named = text(device, "name") + (f", compute capability {capability}" if capability else "")
    number = figure(device, "count")
    blocks: list[Block] = [
        facts(
            (
                ("Device", f"{count(number)} × {named}" if number and number > 1 else named),
                ("Device memory", size(figure(device, "memory_bytes"))),
                ("Processors", count(figure(environment, "cpu_count"))),
                ("Memory", size(figure(environment, "ram_bytes"))),
                ("Platform", text(environment, "platform")),
                ("Python", text(environment, "python")),
            )
        )
    ]
    if packages := find(environment, "packages"):
        rows = [(str(name), text(packages, name)) for name in sorted(packages)]
        blocks.append(table(("Package", "Version"), rows))
    if find(environment, "command") is not None:
        blocks.append(Code("Run it again", without_home(text(environment, "command"))))
    return Section("environment", "Hardware and versions", tuple(blocks))
