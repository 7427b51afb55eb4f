"""Tokenizes examples batch by batch to ids and labels, truncated to the maximum length.

Ids and labels are the same as TRL's SFTTrainer would make (tests compare them). They are made here so that they can be
counted and shown before a model is loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from peftcli.data.chat_template import ChatEncoder, read_chats
from peftcli.data.encode import BackgroundEncoder, encode, encode_prompts, flatten, stop_ids, with_end
from peftcli.plan.plan import LossMask

IGNORED = -100
"""Label of an untrained token (`ignore_index` of torch's cross entropy)."""

Columns: TypeAlias = Mapping[str, Sequence[str]]

FLAGS = ("truncated", "ends", "end_trained", "merged", "doubled_bos", "unknown", "mismatched", "context_only")

Ids: TypeAlias = NDArray[np.int32]
Flags: TypeAlias = NDArray[np.bool_]
Counts: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class Encoded:
    """The concatenated rows of a batch, before truncation.

    Attributes:
        flat: (tokens,), ids of all rows.
        trained: (tokens,), the loss mask.
        lengths: (rows,), tokens of each row.
        merged: (rows,), whether a token crosses the boundary between prompt and completion.
        whole: (rows,), whether the row ends at the end of its text.
        chats: further flags of chats by name, each (rows,).
    """

    flat: Ids
    trained: Flags
    lengths: Counts
    merged: Flags
    whole: Flags
    chats: Mapping[str, Flags] = field(default_factory=dict)


Made: TypeAlias = tuple[Encoded, list[int], list[tuple[int, str]]]
"""Encoded rows, the example of each, and the dropped examples with the reason."""


@dataclass(frozen=True)
class TokenizedBatch:
    """The tokenized rows of a batch of examples, with statistics of each row.

    Attributes:
        of: (rows,), the example of each row.
        flat: (tokens,), concatenated ids.
        loss_mask: (tokens,), whether each token is trained.
        lengths: (rows,), tokens after truncation.
        uncut: (rows,), tokens before truncation.
        trained: (rows,), number of predicted tokens that are trained; the first token of a row is never predicted.
        flags: by name, (rows,): truncated, ends (the end token should be trained), end_trained, merged, doubled_bos,
            unknown (has the unknown token), mismatched (evaluation asks another text), context_only (an answer is not
            trained because the text shows it differently).
        dropped: example and reason.
        classes: for rows with labels, the concatenated labels of all rows, int32 or float32, and their number per row.
    """

    of: Counts
    flat: Ids
    loss_mask: Flags
    lengths: Counts
    uncut: Counts
    trained: Counts
    flags: Mapping[str, Flags]
    dropped: list[tuple[int, str]]
    classes: tuple[NDArray[Any], Counts] | None = None

    def labels(self) -> Ids:
        """(tokens,), ids of the trained tokens, IGNORED for the others."""
        return np.where(self.loss_mask, self.flat, np.int32(IGNORED)).astype(np.int32)


@dataclass(frozen=True)
class TruncatedRows:
    """Rows after truncation; `of` is the row in the batch, `uncut` its number of tokens before."""

    flat: Ids
    trained: Flags
    lengths: Counts
    of: Counts
    uncut: Counts
    truncated: Flags
    ends: Flags


class TokenizeStep:
    """Tokenizes examples of one kind, and truncates, splits or drops those that are too long."""

    def __init__(self, kind: str, tokenizer: PreTrainedTokenizerBase, rule: LossMask) -> None:
        """
        Raises:
            DataError: the examples are chats, but the tokenizer has no chat template.
        """
        self._tokenizer = tokenizer
        self._rule = rule
        self._ends = np.array(sorted(stop_ids(tokenizer)), np.int32)
        self._chat_encoder = ChatEncoder(tokenizer, assistant_only=rule.assistant_only) if kind == "messages" else None
        self._background = BackgroundEncoder(tokenizer)
        encoders: dict[str, Callable[[Columns, Sequence[bool] | None], Callable[[], Made]]] = {
            "prompt_completion": self._pairs,
            "messages": self._chats,
            "text": self._texts,
        }
        self._encode = encoders[kind]

    def start(
        self, columns: Columns, ends: Sequence[bool] | None, too_long: str | None
    ) -> Callable[[], TokenizedBatch]:
        """Start to encode a batch in a background thread.

        Args:
            columns: of the examples.
            ends: False for an example whose text continues in the next one; None if all are complete.
            too_long: `truncate`, `drop` or `split`; None for split if `ends` is given, else truncate.

        Returns:
            A function that waits for the token ids of the batch.

        Raises:
            DataError: the assistant mask of a chat is ambiguous; also raised by the returned function.
        """
        action = too_long or ("truncate" if ends is None else "split")
        encoded = self._encode(columns, ends)
        return lambda: self._finish(*encoded(), action)

    def batch(self, columns: Columns, ends: Sequence[bool] | None, too_long: str | None) -> TokenizedBatch:
        """Token ids of a batch; arguments and errors as for `start`."""
        return self.start(columns, ends, too_long)()

    def _pairs(self, columns: Columns, ends: Sequence[bool] | None) -> Callable[[], Made]:
        completions = with_end(columns["completion"], self._tokenizer)
        texts = [a + b for a, b in zip(columns["prompt"], completions, strict=True)]
        first = self._background.start(encode_prompts, columns["prompt"], self._tokenizer)
        second = self._background.start(encode, texts, self._tokenizer)

        def made() -> Made:
            prompts, wholes = first(), second()
            starts = np.fromiter(map(_common_prefix, prompts, wholes), np.int64, len(wholes))
            merged = starts < np.fromiter(map(len, prompts), np.int64, len(prompts))
            flat, lengths = flatten(wholes)
            trained = positions(lengths) >= np.repeat(starts if self._rule.completion_only else 0 * starts, lengths)
            return Encoded(flat, trained, lengths, merged, np.ones(len(wholes), bool)), list(range(len(wholes))), []

        return made

    def _texts(self, columns: Columns, ends: Sequence[bool] | None) -> Callable[[], Made]:
        texts = columns["text"]
        whole = np.ones(len(texts), bool) if ends is None else np.array(ends, bool)
        finished = with_end(texts, self._tokenizer)
        given = [b if end else a for a, b, end in zip(texts, finished, whole, strict=True)]
        rows = self._background.start(encode, given, self._tokenizer)

        def made() -> Made:
            flat, lengths = flatten(rows())
            none = np.zeros(len(texts), bool)
            return Encoded(flat, np.ones(len(flat), bool), lengths, none, whole), list(range(len(texts))), []

        return made

    def _chats(self, columns: Columns, ends: Sequence[bool] | None) -> Callable[[], Made]:
        assert self._chat_encoder is not None  # created for this kind
        encoding = self._chat_encoder.start(*read_chats(columns))

        def made() -> Made:
            encoded = encoding()
            dropped = [(row, reason) for row, reason in enumerate(encoded) if isinstance(reason, str)]
            kept = [row for row, one in enumerate(encoded) if not isinstance(one, str)]
            rows = [one for one in encoded if not isinstance(one, str)]
            flat, lengths = flatten([row.ids for row in rows])
            trained = np.fromiter(chain.from_iterable(row.mask for row in rows), np.bool_, len(flat))
            none = np.zeros(len(rows), bool)
            flags = {
                "mismatched": np.array([row.mismatched for row in rows], bool),
                "context_only": np.array([row.context_only for row in rows], bool),
            }
            return Encoded(flat, trained, lengths, none, ~none, flags), kept, dropped

        return made

    def _finish(
        self, encoded: Encoded, rows: Sequence[int], dropped: list[tuple[int, str]], action: str
    ) -> TokenizedBatch:
        kept = np.array(rows, np.int64)
        limit = self._rule.max_length
        cut = truncate_rows(encoded, limit, split=action == "split")
        trained = row_sums(cut.trained & (positions(cut.lengths) > 0), cut.lengths)
        truncated = cut.truncated
        keep = trained > 0
        if action == "drop":
            keep &= ~truncated
        for row in np.flatnonzero(~keep):
            reason = "without a trained token"
            if truncated[row]:
                reason = f"longer than max_length {limit}" if action == "drop" else _prompt_fills(limit)
            dropped.append((int(kept[cut.of[row]]), reason))
        inside = np.repeat(keep, cut.lengths)
        no_chat = np.zeros(len(encoded.lengths), bool)
        flags = {
            "truncated": truncated,
            "ends": cut.ends & ~truncated,
            "end_trained": self._ends_trained(cut) & cut.ends & ~truncated,
            "merged": encoded.merged[cut.of],
            "doubled_bos": self._doubled(cut),
            "unknown": self._unknown(cut),
            **{name: encoded.chats.get(name, no_chat)[cut.of] for name in ("mismatched", "context_only")},
        }
        return TokenizedBatch(
            of=kept[cut.of[keep]],
            flat=cut.flat[inside],
            loss_mask=cut.trained[inside],
            lengths=cut.lengths[keep],
            uncut=cut.uncut[keep],
            trained=trained[keep],
            flags={name: flag[keep] for name, flag in flags.items()},
            dropped=dropped,
        )

    def _ends_trained(self, cut: TruncatedRows) -> Flags:
        """Whether every run of trained tokens in a row contains an end token, since each turn must end with one."""
        begins = cut.trained.copy()
        begins[1:] &= ~cut.trained[:-1] | (positions(cut.lengths)[1:] == 0)
        run = np.cumsum(begins)
        ended = np.zeros(int(run[-1]) + 1 if len(run) else 1, bool)
        ended[run[cut.trained & np.isin(cut.flat, self._ends)]] = True
        lacking = begins & ~ended[run]
        found: Flags = row_sums(lacking, cut.lengths) == 0
        return found

    def _doubled(self, cut: TruncatedRows) -> Flags:
        begin = self._tokenizer.bos_token_id
        found = np.zeros(len(cut.lengths), bool)
        if begin is not None:
            starts = (np.cumsum(cut.lengths) - cut.lengths)[cut.lengths > 1]
            found[cut.lengths > 1] = (cut.flat[starts] == begin) & (cut.flat[starts + 1] == begin)
        return found

    def _unknown(self, cut: TruncatedRows) -> Flags:
        unknown = self._tokenizer.unk_token_id
        if unknown is None:
            return np.zeros(len(cut.lengths), bool)
        found: Flags = row_sums(cut.flat == unknown, cut.lengths) > 0
        return found


def _common_prefix(prompt: list[int], whole: list[int]) -> int:
    """Number of tokens in the common prefix of a prompt and its full row."""
    return len(prompt) if whole[: len(prompt)] == prompt else int(common_prefix_length(prompt, whole))


def _prompt_fills(limit: int) -> str:
    return f"with a prompt that fills max_length {limit}"


def truncate_rows(encoded: Encoded, limit: int, *, split: bool) -> TruncatedRows:
    """Truncate rows that are longer than the limit, or split them into rows of about equal length.

    Args:
        limit: maximum tokens of a row.
        split: split long rows instead of truncating them.
    """
    lengths = encoded.lengths
    if not split:
        long = lengths > limit
        inside = positions(lengths) < limit
        of = np.arange(len(lengths))
        short = np.minimum(lengths, limit)
        return TruncatedRows(encoded.flat[inside], encoded.trained[inside], short, of, lengths, long, encoded.whole)
    pieces = np.maximum(-(-lengths // limit), 1)
    of = np.repeat(np.arange(len(lengths)), pieces)
    number = positions(pieces)
    # Piece k of n has the tokens from k * length // n to (k + 1) * length // n.
    sizes = (number + 1) * lengths[of] // pieces[of] - number * lengths[of] // pieces[of]
    last = number == pieces[of] - 1
    none = np.zeros(len(of), bool)
    return TruncatedRows(encoded.flat, encoded.trained, sizes, of, sizes, none, encoded.whole[of] & last)


def positions(lengths: Counts) -> Counts:
    """Position of each token in its row.

    >>> positions(np.array([2, 0, 3]))
    array([0, 1, 0, 1, 2])
    """
    starts = np.cumsum(lengths) - lengths
    found: Counts = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
    return found


def row_sums(flags: Flags, lengths: Counts) -> Counts:
    """Number of set flags in each row.

    >>> row_sums(np.array([True, False, True]), np.array([2, 0, 1]))
    array([1, 0, 1])
    """
    total = np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])
    ends = np.cumsum(lengths)
    found: Counts = total[ends] - total[ends - lengths]
    return found
