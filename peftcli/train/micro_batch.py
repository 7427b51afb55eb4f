"""Splits the rows of an optimizer step into micro-batches that fit, with the same loss.

The loss of a micro-batch is its part of the sum over all trained tokens of the step, so they add up to the same loss
and gradient however the step is split: the loader's padded batches, parts of them, or padding-free batches.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor

from peftcli.data.tokenize import IGNORED
from peftcli.errors import MemoryExhausted
from peftcli.model.oom import MOST_HALVINGS, free_memory, is_out_of_memory, memory_said
from peftcli.model.padding_free import SequenceLayout, use_layout

Inputs: TypeAlias = dict[str, Any]
FLATTEN_BELOW = 0.95
"""Flat lines are made where the real tokens are at most this share of the padded ones; else they would gain nothing."""


class MicroBatches:
    """Runs optimizer steps piece by piece, in smaller pieces once memory has run out.

    When memory runs out in the middle of a step, what the step has added to the gradients cannot be trusted: they are
    cleared, and the step begins anew with pieces of half the size.

    Attributes:
        shrunk: how often the pieces were halved, at most three times.
        events: (step, pieces from then on, about) of each time that memory ran out.
        real, padded: tokens of the rows so far, and those that the loader's micro-batches would have fed.
        count: pieces of the step at hand.
    """

    def __init__(
        self,
        *,
        tokens: int | None,
        most: int | None = None,
        boundaries: bool = False,
        agree: Callable[[int], list[int]] | None = None,
    ) -> None:
        """
        Args:
            tokens: of a flat piece at most; None for the loader's padded micro-batches.
            most: tokens of a padded piece at most, a single longer row aside; None for whole micro-batches.
            boundaries: give the model the boundaries of the rows of a flat piece as arguments.
            agree: gathers a number from all processes, which must run equally many pieces; None for a single one.
        """
        self.oom_retries = 0
        self.events: list[tuple[int, int]] = []
        self.real = self.padded = 0
        self.count = 0
        self._tokens = tokens
        self._most = most
        self._boundaries = boundaries
        self._agree = agree
        self._largest = 0

    @property
    def lines(self) -> bool:
        """Whether steps are run as flat lines where that is worth it."""
        return self._tokens is not None

    def run(
        self,
        batches: Sequence[Inputs],
        one: Callable[[Inputs], Tensor],
        restart: Callable[[], None],
        apart: Callable[[], AbstractContextManager[Any]],
        step: int,
    ) -> Tensor:
        """The loss of a step, its gradients added.

        Args:
            batches: the loader's micro-batches of the step.
            one: forward and backward of one piece.
            restart: clears what the step has added to gradients and counters.
            apart: context for all pieces but the last, in which processes do not exchange gradients.
            step: number of the step, for messages.

        Raises:
            MemoryExhausted: the pieces cannot be made smaller.
        """
        lined = self._tokens is not None and all("attention_mask" in batch for batch in batches)
        rows = [row for batch in batches for row in unpad_rows(batch)] if lined else []
        lengths = [len(row["input_ids"]) for row in rows]
        padded = sum(batch["input_ids"].numel() for batch in batches)
        self.real, self.padded = self.real + (sum(lengths) if lined else padded), self.padded + padded
        flat = lined and sum(lengths) <= FLATTEN_BELOW * padded
        if self._agree is not None:
            flat = all(self._agree(int(flat)))
        while True:
            said = None
            try:
                return self._run(self._flat(rows, lengths) if flat else self._cut(batches), one, apart)
            except (RuntimeError, MemoryError) as problem:
                if not is_out_of_memory(problem):
                    raise
                said = str(problem)
            # Outside the handler, which keeps the tensors of the failed attempt alive.
            self._shrink(said, step, batches)
            restart()

    def _run(
        self,
        pieces: Sequence[tuple[Inputs, SequenceLayout | None]],
        one: Callable[[Inputs], Tensor],
        apart: Callable[[], AbstractContextManager[Any]],
    ) -> Tensor:
        self.count = len(pieces)
        losses = []
        for number, (piece, layout) in enumerate(pieces):
            last = number == len(pieces) - 1
            with nullcontext() if last else apart(), use_layout(layout):
                losses.append(one(piece))
            self._largest = max(self._largest, piece["input_ids"].numel())
        return torch.stack(losses).sum()

    def _cut(self, batches: Sequence[Inputs]) -> list[tuple[Inputs, SequenceLayout | None]]:
        wanted = 1
        if self._most is not None:
            wanted = max(_padded_parts(batch["input_ids"], self._most) for batch in batches)
            if self._agree is not None:
                wanted = max(self._agree(wanted))
        return [(piece, None) for batch in batches for piece in split_batch(batch, wanted * 2**self.oom_retries)]

    def _flat(self, rows: Sequence[Inputs], lengths: Sequence[int]) -> list[tuple[Inputs, SequenceLayout]]:
        assert self._tokens is not None  # asked for flat pieces
        wanted = parts_that_fit(lengths, max(1, self._tokens // 2**self.oom_retries))
        if self._agree is not None:
            wanted = max(self._agree(wanted))
        pieces = [flatten_rows(rows[part]) for part in split_evenly(lengths, wanted)]
        if not self._boundaries:
            return pieces
        return [(inputs | layout.boundaries(), layout) for inputs, layout in pieces]

    def _shrink(self, said: str, step: int, batches: Sequence[Inputs]) -> None:
        rows = sum(batch["input_ids"].shape[0] for batch in batches)
        if self._agree is not None or self.count >= rows or self.oom_retries >= MOST_HALVINGS:
            why = "" if self._agree is None else " (several processes cannot make them smaller on their own)"
            fitted = f"; {self._largest} tokens at once did fit" if self._largest else ""
            raise MemoryExhausted(
                f"step {step}: its {rows} rows in {self.count} pieces do not fit into "
                f"{memory_said(batches[0]['input_ids'].device)}{why}{fitted} ({said.splitlines()[0][:120]}); lower "
                "dataset.max_length, set trainer.activation_checkpointing: true, or quantization: {bits: 4} where the "
                "base is wider"
            )
        self.oom_retries += 1
        self.events.append((step, 2 * self.count))
        free_memory()


def count_tokens(piece: Mapping[str, Any]) -> Tensor:
    """Tokens of a piece that are no padding: (), int64."""
    mask: Tensor | None = piece.get("attention_mask")
    if mask is None:
        return torch.full((), piece["input_ids"].numel(), device=piece["input_ids"].device)
    return mask.sum()


def first_rows(inputs: Mapping[str, Any], count: int) -> Inputs:
    """The first rows of a micro-batch."""
    return _rows(inputs, torch.arange(count), inputs["labels"].shape[0])


def unpad_rows(batch: Mapping[str, Any]) -> Iterator[Inputs]:
    """The rows of a padded micro-batch without their padding: `input_ids` and `labels`, (length,) each."""
    mask = batch["attention_mask"]
    # One transfer for all rows: a boolean index makes the device wait for each.
    spans = torch.stack([mask.argmax(1), mask.sum(1)], 1).tolist()
    for ids, labels, (begin, length) in zip(batch["input_ids"], batch["labels"], spans, strict=True):
        yield {"input_ids": ids[begin : begin + length], "labels": labels[begin : begin + length]}


def flatten_rows(rows: Sequence[Inputs]) -> tuple[Inputs, SequenceLayout]:
    """Rows behind one another: inputs of shape (1, tokens), and how attention keeps the rows apart."""
    lengths = [len(row["input_ids"]) for row in rows]
    labels = []
    for row in rows:
        own = row["labels"].clone()
        own[0] = IGNORED  # nothing before it predicts it, least of all the row before
        labels.append(own)
    places = torch.cat([torch.arange(length) for length in lengths])
    ids = torch.cat([row["input_ids"] for row in rows])
    inputs = {
        "input_ids": ids[None],
        "labels": torch.cat(labels)[None],
        "position_ids": places.to(ids.device, non_blocking=True)[None],
    }
    return inputs, SequenceLayout(tuple(lengths), ids.device)


def parts_that_fit(lengths: Sequence[int], most: int) -> int:
    """Smallest number of even parts of which none has more than `most` tokens, single longer rows aside.

    >>> parts_that_fit([5, 5, 5, 9], 14), parts_that_fit([3, 3, 3], 100), parts_that_fit([50, 1], 10)
    (2, 1, 2)
    """
    parts = max(1, -(-sum(lengths) // most))
    while parts < len(lengths) and any(
        part.stop - part.start > 1 and sum(lengths[part]) > most for part in split_evenly(lengths, parts)
    ):
        parts += 1
    return min(parts, len(lengths))


def split_evenly(lengths: Sequence[int], parts: int) -> list[slice]:
    """Cut rows into parts of about equally many tokens, in order, each with at least one row.

    >>> split_evenly([5, 5, 5, 9], 2)
    [slice(0, 2, None), slice(2, 4, None)]
    """
    total, done, begin = sum(lengths), 0, 0
    found = []
    for number in range(parts):
        end = begin
        share = total * (number + 1) / parts
        # The row that reaches over the edge goes where the larger part of it lies; later parts keep a row each.
        while end < len(lengths) - (parts - number - 1) and (end == begin or done + lengths[end] / 2 <= share):
            done += lengths[end]
            end += 1
        found.append(slice(begin, len(lengths) if number == parts - 1 else end))
        begin = end
    return found


def _padded_parts(ids: Tensor, most: int) -> int:
    """Parts of a padded micro-batch, (rows, length), of which none has more tokens than `most`, single rows aside."""
    return -(-ids.shape[0] // max(1, most // ids.shape[-1]))


def split_batch(inputs: Mapping[str, Any], pieces: int) -> list[Inputs]:
    """The rows of a micro-batch in parts of about equal size, each without the padding that all its rows share.

    >>> ids, mask = torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    >>> [part["input_ids"].tolist() for part in split_batch({"input_ids": ids, "attention_mask": mask}, 2)]
    [[[5, 6, 7]], [[8]]]
    """
    rows = inputs["input_ids"].shape[0]
    if pieces == 1 or rows == 1:
        return [dict(inputs)]
    return [_trimmed(_rows(inputs, part, rows)) for part in torch.arange(rows).tensor_split(min(pieces, rows))]


def _rows(inputs: Mapping[str, Any], chosen: Tensor, rows: int) -> Inputs:
    def part(value: Any) -> Any:
        per_row = torch.is_tensor(value) and value.dim() > 0 and value.shape[0] == rows
        return value[chosen.to(value.device)] if per_row else value

    return {name: part(value) for name, value in inputs.items()}


def _trimmed(inputs: Inputs) -> Inputs:
    mask = inputs.get("attention_mask")
    if mask is None:
        return inputs
    used = mask.any(0).nonzero().flatten()
    span = slice(int(used[0]), int(used[-1]) + 1)
    width = mask.shape[1]

    def part(value: Any) -> Any:
        # Numbers with decimals are labels of whole rows, whose count may be that of the tokens by chance.
        of_tokens = torch.is_tensor(value) and value.dim() == 2 and not value.is_floating_point()
        return value[:, span] if of_tokens and value.shape[1] == width else value

    return {name: part(value) for name, value in inputs.items()}
