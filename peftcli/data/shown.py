"""Some training rows as they go to the trainer, for people to look at."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from peftcli.data.facts import Indices, Side
from peftcli.data.parts import Part, shorten
from peftcli.data.preview import preview_rows
from peftcli.data.readings import LABELLED
from peftcli.data.shown_labels import label_parts
from peftcli.data.tokens import Tokens
from peftcli.data.traces import hide_keys
from peftcli.plan.plan import LabelRule

UNCUT = 2**40
"""Longer than any row, tokens."""


def shown_rows(
    train: Side, tokenizer: PreTrainedTokenizerBase, rule: LabelRule, too_long: str | None, count: int
) -> list[dict[str, Any]]:
    """The preview of some training rows, from the batch that TRL's own collator makes of them, or with their labels.

    Args:
        train: the training side.
        too_long: of the recipe; of a text that is split nothing is cut off.
        count: number of rows; one that is cut takes the place of the last, where there is one.

    Returns:
        `place`, `tokens` (None for an image), `trained` (None where a row has a class) and `parts` (`kind` and `text`)
        of each row.
    """
    chosen = _choose(train, count)
    if not len(chosen):
        return []
    rows = train.store.examples.take(pa.array(train.rows[chosen], pa.int64())).to_pydict()
    if train.store.facts["kind"] in LABELLED:
        rows |= {name: train.column(name)[chosen].tolist() for name in ("uncut", "length")}
        parts = label_parts(rows, train.store.facts["problem"], train.store.classes, tokenizer)
    else:
        parts = _trained_parts(train, rows, tokenizer, rule, too_long)
    # A class belongs to a row, and to none of its tokens.
    trained = [None] * len(chosen) if train.store.facts.get("problem") else train.column("trained")[chosen].tolist()
    return [
        {
            "place": place,
            "tokens": None if "pixels" in rows else len(ids),
            "trained": count,
            "parts": [asdict(part) for part in _fit(row)],
        }
        for place, ids, count, row in zip(train.places(chosen), rows["input_ids"], trained, parts, strict=True)
    ]


def _trained_parts(
    train: Side, rows: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, rule: LabelRule, too_long: str | None
) -> list[list[Part]]:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling  # seconds; the light commands stay without

    features = [
        {"input_ids": ids, "labels": labels} for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)
    ]
    batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id or 0)(features)
    return preview_rows(batch, _whole(train, rows, tokenizer, rule, too_long), tokenizer)


def _fit(parts: Sequence[Part]) -> list[Part]:
    """The parts as short as a screen needs them, and without access keys: what is shown is also written to the run."""
    texts = hide_keys([part.text for part in parts])
    return shorten([replace(part, text=text) for part, text in zip(parts, texts, strict=True)])


def _choose(train: Side, count: int) -> Indices:
    chosen = np.arange(min(count, len(train.rows)))
    cut = np.flatnonzero(train.flag("truncated"))
    if len(chosen) and len(cut) and cut[0] >= len(chosen):
        chosen[-1] = cut[0]
    return chosen


def _whole(
    train: Side, rows: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, rule: LabelRule, too_long: str | None
) -> list[list[int]]:
    """The ids of the rows before the cut."""
    kept: list[list[int]] = rows["input_ids"]
    if too_long == "split" or not any(train.flag("truncated")):
        return kept
    tokens = Tokens(train.store.facts["kind"], tokenizer, replace(rule, max_length=UNCUT))
    columns = {name: rows[name] for name in rows if name not in ("input_ids", "labels")}
    batch = tokens.batch(columns, None, "truncate")
    ends = np.cumsum(batch.lengths)
    pieces = {
        int(of): batch.flat[end - length : end].tolist()
        for of, end, length in zip(batch.of, ends, batch.lengths, strict=True)
    }
    return [pieces.get(row, ids) for row, ids in enumerate(kept)]
