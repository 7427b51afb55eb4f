"""Some training rows with their labels, for people to look at."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from peftcli.data.labels import Names
from peftcli.data.parts import DROPPED, PROMPT, TRAINED, Part
from peftcli.data.tokens import IGNORED
from peftcli.metrics.tagging import OUTSIDE


def label_parts(
    rows: dict[str, list[Any]], problem: str | None, names: Names, tokenizer: PreTrainedTokenizerBase
) -> list[list[Part]]:
    """The parts of some rows: what is read, and the label or the tags that are learned.

    Args:
        rows: of the store, `uncut` and `length` among them.
        problem: of a classification; None for tags.
        names: of the classes or tags by number.
    """
    made = []
    for number, ids in enumerate(rows["input_ids"]):
        if problem is None:
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
