"""A preview of training rows: which tokens are trained, and the labels."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from peftcli.data.class_labels import Names
from peftcli.data.formats import LABELLED
from peftcli.data.quality import hide_keys
from peftcli.data.spans import DROPPED, PROMPT, TRAINED, Part, shorten
from peftcli.data.stats import Indices, Split
from peftcli.data.tokenize import IGNORED, TokenizeStep
from peftcli.plan.plan import LossMask
from peftcli.tasks.labels import OUTSIDE

if TYPE_CHECKING:
    from torch import Tensor


UNCUT = 2**40
"""More tokens than any row has."""


def sample_rows(
    train: Split, tokenizer: PreTrainedTokenizerBase, rule: LossMask, too_long: str | None, count: int
) -> list[dict[str, Any]]:
    """A preview of some training rows, from a batch of TRL's collator, or with their labels.

    Args:
        train: the training split.
        too_long: of the recipe; with `split` no tokens are truncated.
        count: number of rows; the last one is replaced by a truncated row, if there is one.

    Returns:
        `place`, `tokens` (None for an image), `trained` (None for rows with a class) and `parts` (`kind` and `text`)
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
    # A class belongs to the row, not to its tokens.
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
    train: Split, rows: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, rule: LossMask, too_long: str | None
) -> list[list[Part]]:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling  # takes seconds to import

    features = [
        {"input_ids": ids, "labels": labels} for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)
    ]
    batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id or 0)(features)
    return preview_rows(batch, _untruncated(train, rows, tokenizer, rule, too_long), tokenizer)


def _fit(parts: Sequence[Part]) -> list[Part]:
    """The parts shortened for display and without access keys, because the preview is saved in the run folder."""
    texts = hide_keys([part.text for part in parts])
    return shorten([replace(part, text=text) for part, text in zip(parts, texts, strict=True)])


def _choose(train: Split, count: int) -> Indices:
    chosen = np.arange(min(count, len(train.rows)))
    cut = np.flatnonzero(train.flag("truncated"))
    if len(chosen) and len(cut) and cut[0] >= len(chosen):
        chosen[-1] = cut[0]
    return chosen


def _untruncated(
    train: Split, rows: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, rule: LossMask, too_long: str | None
) -> list[list[int]]:
    """The ids of the rows before truncation."""
    kept: list[list[int]] = rows["input_ids"]
    if too_long == "split" or not any(train.flag("truncated")):
        return kept
    tokens = TokenizeStep(train.store.facts["kind"], tokenizer, replace(rule, max_length=UNCUT))
    columns = {name: rows[name] for name in rows if name not in ("input_ids", "labels")}
    batch = tokens.batch(columns, None, "truncate")
    ends = np.cumsum(batch.lengths)
    pieces = {
        int(of): batch.flat[end - length : end].tolist()
        for of, end, length in zip(batch.of, ends, batch.lengths, strict=True)
    }
    return [pieces.get(row, ids) for row, ids in enumerate(kept)]


def label_parts(
    rows: dict[str, list[Any]], problem_type: str | None, names: Names, tokenizer: PreTrainedTokenizerBase
) -> list[list[Part]]:
    """The parts of some rows: the input, and the label or the tags.

    Args:
        rows: of the store, including `uncut` and `length`.
        problem_type: for classification; None for tagging.
        names: class or tag names by id.
    """
    made = []
    for number, ids in enumerate(rows["input_ids"]):
        if problem_type is None:
            parts = tag_parts(ids, rows["labels"][number], names, tokenizer)
        else:
            label = _label_text(rows["labels"][number], names)
            text = rows["name"][number] if "pixels" in rows else _decode(ids, tokenizer)
            parts = [Part(PROMPT, text), Part(TRAINED, f" -> {label}")]
        lost = rows["uncut"][number] - rows["length"][number]
        made.append([*parts, Part(DROPPED, f" {lost:,} tokens truncated")] if lost > 0 else parts)
    return made


def tag_parts(
    ids: Sequence[int], labels: Sequence[int], names: Names, tokenizer: PreTrainedTokenizerBase
) -> list[Part]:
    """The words of a row, each with its tag unless that is O: `Empire/B-location`."""
    words: list[tuple[str | None, list[int]]] = []
    for token, label in zip(ids, labels, strict=True):
        special = token in tokenizer.all_special_ids
        if label != IGNORED or special or not words:
            words.append((names[label] if label != IGNORED else None, [token]))
        else:
            words[-1][1].append(token)
    parts: list[Part] = []
    for tagged, group in groupby(words, key=lambda word: word[0] not in (None, OUTSIDE)):
        texts = [_decode(tokens, tokenizer).strip() + (f"/{tag}" if tagged else "") for tag, tokens in group]
        parts.append(Part(TRAINED if tagged else PROMPT, " ".join(texts)))
    spaced = [Part(part.kind, f" {part.text}") for part in parts[1:]]
    return [*parts[:1], *spaced]


def _label_text(labels: Sequence[Any], names: Names) -> str:
    if not names:
        return ", ".join(f"{value:.6g}" for value in labels)
    return ", ".join(names[int(label)] for label in labels) or "no class"


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def preview_rows(
    batch: Mapping[str, "Tensor"], whole: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> list[list[Part]]:
    """Split the rows of a collated batch into prompt, trained and truncated parts.

    The concatenated texts of a row's parts are the decoded row. A character whose bytes are in tokens of two kinds is
    in the second of the two parts.

    Args:
        batch: `input_ids` and `labels`, (B, T), int64, padded on either side, not packed; `attention_mask` if the
            collator returns one.
        whole: the ids of each row before truncation.

    Raises:
        ValueError: a row of the batch is neither the beginning nor the end of the full row.
    """
    kinds = token_kinds(batch, whole)
    return [_parts(row, list(ids), tokenizer) for row, ids in zip(kinds, whole, strict=True)]


def token_kinds(batch: Mapping[str, "Tensor"], whole: Sequence[Sequence[int]]) -> list[list[str]]:
    """The kind of each token of each full row; arguments and errors as for `preview_rows`."""
    masks = batch.get("attention_mask")
    rows = []
    for number, ids in enumerate(whole):
        tokens = batch["input_ids"][number].tolist()
        labels = batch["labels"][number].tolist()
        mask = masks[number].tolist() if masks is not None else None
        rows.append(_kinds(tokens, labels, mask, list(ids)))
    return rows


def _kinds(tokens: list[int], labels: list[int], mask: list[int] | None, whole: list[int]) -> list[str]:
    start, length = _position(tokens, mask, whole)
    kept = tokens[start : start + length]
    # The first token of a row is never predicted: the loss compares logits with the next label.
    kinds = [TRAINED if at > 0 and labels[at] != IGNORED else PROMPT for at in range(start, start + length)]
    beyond = [DROPPED] * (len(whole) - length)
    if whole[:length] == kept:
        return kinds + beyond
    if whole[len(whole) - length :] == kept:
        return beyond + kinds
    raise ValueError(f"a row of {length} tokens is neither the beginning nor the end of its {len(whole)} tokens")


def _position(tokens: list[int], mask: list[int] | None, whole: list[int]) -> tuple[int, int]:
    """Start and length of the row within its padded sequence."""
    if mask is not None:
        return (mask.index(1), sum(mask)) if 1 in mask else (0, 0)
    # Without a mask either end may be padding, with any id; the alignment that matches more of the row is correct.
    right = _common_prefix(tokens, whole)
    starts = (start for start in range(len(tokens)) if tokens[start:] == whole[: len(tokens) - start])
    start = next(starts, len(tokens))
    left = len(tokens) - start
    return (start, left) if left > right else (0, right)


def _parts(kinds: list[str], ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[Part]:
    text = _decode(ids, tokenizer)
    parts: list[Part] = []
    end = written = 0
    for kind, group in groupby(kinds):
        end += len(list(group))
        # An incomplete character decodes to a replacement character, so it goes to the next part.
        position = len(text) if end == len(ids) else _common_prefix(_decode(ids[:end], tokenizer), text)
        if position > written:
            parts.append(Part(kind, text[written:position]))
            written = position
    return parts


def _common_prefix(first: Sequence[int] | str, second: Sequence[int] | str) -> int:
    """Length of the common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))
