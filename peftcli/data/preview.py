"""What the trainer does with each token of a row, as text: read, trained, or cut off."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from peftcli.data.parts import DROPPED, PROMPT, TRAINED, Part
from peftcli.data.tokens import IGNORED

if TYPE_CHECKING:
    from torch import Tensor


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
