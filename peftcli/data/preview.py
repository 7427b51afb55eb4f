"""A preview of training rows: what the trainer does with each token, and the labels."""

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
from peftcli.metrics.tagging import OUTSIDE
from peftcli.plan.plan import LossMask

if TYPE_CHECKING:
    from torch import Tensor


UNCUT = 2**40
"""Longer than any row, tokens."""


def sample_rows(
    train: Split, tokenizer: PreTrainedTokenizerBase, rule: LossMask, too_long: str | None, count: int
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
    train: Split, rows: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, rule: LossMask, too_long: str | None
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


def _choose(train: Split, count: int) -> Indices:
    chosen = np.arange(min(count, len(train.rows)))
    cut = np.flatnonzero(train.flag("truncated"))
    if len(chosen) and len(cut) and cut[0] >= len(chosen):
        chosen[-1] = cut[0]
    return chosen


def _whole(
    train: Split, rows: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, rule: LossMask, too_long: str | None
) -> list[list[int]]:
    """The ids of the rows before the cut."""
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
    """The parts of some rows: what is read, and the label or the tags that are learned.

    Args:
        rows: of the store, `uncut` and `length` among them.
        problem_type: of a classification; None for tags.
        names: of the classes or tags by number.
    """
    made = []
    for number, ids in enumerate(rows["input_ids"]):
        if problem_type is None:
            parts = tag_parts(ids, rows["labels"][number], names, tokenizer)
        else:
            said = _label_text(rows["labels"][number], names)
            read = rows["name"][number] if "pixels" in rows else _decode(ids, tokenizer)
            parts = [Part(PROMPT, read), Part(TRAINED, f" -> {said}")]
        lost = rows["uncut"][number] - rows["length"][number]
        made.append([*parts, Part(DROPPED, f" {lost:,} tokens cut off")] if lost > 0 else parts)
    return made


def tag_parts(
    ids: Sequence[int], labels: Sequence[int], names: Names, tokenizer: PreTrainedTokenizerBase
) -> list[Part]:
    """The words of a row, those with another tag than O followed by it: `Empire/B-location`."""
    words: list[tuple[str | None, list[int]]] = []
    for token, label in zip(ids, labels, strict=True):
        special = token in tokenizer.all_special_ids
        if label != IGNORED or special or not words:
            words.append((names[label] if label != IGNORED else None, [token]))
        else:
            words[-1][1].append(token)
    parts: list[Part] = []
    for tagged, stretch in groupby(words, key=lambda word: word[0] not in (None, OUTSIDE)):
        texts = [_decode(tokens, tokenizer).strip() + (f"/{tag}" if tagged else "") for tag, tokens in stretch]
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
    """Tell what the trainer will do with each token of a collated batch.

    The texts of a row's parts add up to the decoded row. A letter whose bytes are spread over tokens of two kinds
    stands whole in the second of the two parts.

    Args:
        batch: `input_ids` and `labels`, (B, T), int64, padded on either side, not packed; `attention_mask` where
            the collator made one.
        whole: the ids of each row before any cut.

    Raises:
        ValueError: a row of the batch is neither the beginning nor the end of its whole.
    """
    kinds = token_kinds(batch, whole)
    return [_parts(row, list(ids), tokenizer) for row, ids in zip(kinds, whole, strict=True)]


def token_kinds(batch: Mapping[str, "Tensor"], whole: Sequence[Sequence[int]]) -> list[list[str]]:
    """The kind of each token of each whole row; arguments and errors as for `preview_rows`."""
    masks = batch.get("attention_mask")
    rows = []
    for number, ids in enumerate(whole):
        tokens = batch["input_ids"][number].tolist()
        labels = batch["labels"][number].tolist()
        mask = masks[number].tolist() if masks is not None else None
        rows.append(_kinds(tokens, labels, mask, list(ids)))
    return rows


def _kinds(tokens: list[int], labels: list[int], mask: list[int] | None, whole: list[int]) -> list[str]:
    start, length = _kept(tokens, mask, whole)
    kept = tokens[start : start + length]
    # The label of a row's very first position is never predicted: the loss compares logits with the next label.
    kinds = [TRAINED if at > 0 and labels[at] != IGNORED else PROMPT for at in range(start, start + length)]
    beyond = [DROPPED] * (len(whole) - length)
    if whole[:length] == kept:
        return kinds + beyond
    if whole[len(whole) - length :] == kept:
        return beyond + kinds
    raise ValueError(f"a row of {length} tokens is neither the beginning nor the end of its {len(whole)} tokens")


def _kept(tokens: list[int], mask: list[int] | None, whole: list[int]) -> tuple[int, int]:
    """Where the row stands in its padded line, and its length."""
    if mask is not None:
        return (mask.index(1), sum(mask)) if 1 in mask else (0, 0)
    # Without a mask either end may be padding, with any id: the reading that keeps more of the row is the right one.
    right = _shared(tokens, whole)
    starts = (start for start in range(len(tokens)) if tokens[start:] == whole[: len(tokens) - start])
    start = next(starts, len(tokens))
    left = len(tokens) - start
    return (start, left) if left > right else (0, right)


def _parts(kinds: list[str], ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[Part]:
    text = _decode(ids, tokenizer)
    parts: list[Part] = []
    end = written = 0
    for kind, stretch in groupby(kinds):
        end += len(list(stretch))
        # Half a letter decodes to a replacement character, the whole text has the letter: it goes to the next part.
        place = len(text) if end == len(ids) else _shared(_decode(ids[:end], tokenizer), text)
        if place > written:
            parts.append(Part(kind, text[written:place]))
            written = place
    return parts


def _shared(first: Sequence[int] | str, second: Sequence[int] | str) -> int:
    """How many tokens or letters both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))
