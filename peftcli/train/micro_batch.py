"""Splits the rows of an optimizer step into micro-batches that fit, with the same loss.

The loss of a micro-batch is its part of the sum over all trained tokens of the step, so the parts add up to the same
loss and gradient however the step is split: into the loader's padded batches, parts of them, or padding-free batches.
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
"""Batches are padding-free if the real tokens are at most this share of the padded ones; otherwise it gains nothing."""


class MicroBatches:
    """Runs optimizer steps in micro-batches, and in smaller ones after running out of memory.

    When memory runs out during a step, the gradients accumulated so far cannot be trusted: they are cleared, and the
    step restarts with micro-batches of half the size.

    Attributes:
        oom_retries: how often the size was halved, at most three times.
        events: (step, approximate number of micro-batches from then on) each time memory ran out.
        real, padded: tokens of the rows so far, and of the loader's padded micro-batches.
        count: number of micro-batches of the current step.
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
            tokens: maximum tokens of a padding-free micro-batch; None for the loader's padded micro-batches.
            most: maximum tokens of a padded micro-batch, except for a single longer row; None to not split them.
            boundaries: pass the row boundaries of a padding-free micro-batch to the model as arguments.
            agree: gathers a number from all processes, which must run equally many micro-batches; None for one process.
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
    def padding_free(self) -> bool:
        """Whether steps run as padding-free batches if it is worthwhile."""
        return self._tokens is not None

    def run(
        self,
        batches: Sequence[Inputs],
        one: Callable[[Inputs], Tensor],
        restart: Callable[[], None],
        apart: Callable[[], AbstractContextManager[Any]],
        step: int,
    ) -> Tensor:
        """Run a step and add its gradients; returns its loss.

        Args:
            batches: the loader's micro-batches of the step.
            one: forward and backward pass of one micro-batch.
            restart: clears the gradients and counters of the step.
            apart: context for all micro-batches except the last, in which processes do not exchange gradients.
            step: number of the step, for messages.

        Raises:
            MemoryExhausted: the micro-batches cannot be made smaller.
        """
        has_masks = self._tokens is not None and all("attention_mask" in batch for batch in batches)
        rows = [row for batch in batches for row in unpad_rows(batch)] if has_masks else []
        lengths = [len(row["input_ids"]) for row in rows]
        padded = sum(batch["input_ids"].numel() for batch in batches)
        self.real, self.padded = self.real + (sum(lengths) if has_masks else padded), self.padded + padded
        flat = has_masks and sum(lengths) <= FLATTEN_BELOW * padded
        if self._agree is not None:
            flat = all(self._agree(int(flat)))
        while True:
            message = ""
            try:
                return self._run(self._flatten(rows, lengths) if flat else self._split(batches), one, apart)
            except (RuntimeError, MemoryError) as problem:
                if not is_out_of_memory(problem):
                    raise
                message = str(problem)
            # Outside the except block, which keeps the tensors of the failed attempt alive.
            self._shrink(message, step, batches)
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

    def _split(self, batches: Sequence[Inputs]) -> list[tuple[Inputs, SequenceLayout | None]]:
        parts = 1
        if self._most is not None:
            parts = max(_padded_parts(batch["input_ids"], self._most) for batch in batches)
            if self._agree is not None:
                parts = max(self._agree(parts))
        return [(piece, None) for batch in batches for piece in split_batch(batch, parts * 2**self.oom_retries)]

    def _flatten(self, rows: Sequence[Inputs], lengths: Sequence[int]) -> list[tuple[Inputs, SequenceLayout | None]]:
        assert self._tokens is not None  # needed for padding-free batches
        parts = parts_that_fit(lengths, max(1, self._tokens // 2**self.oom_retries))
        if self._agree is not None:
            parts = max(self._agree(parts))
        flat = [flatten_rows(rows[part]) for part in split_evenly(lengths, parts)]
        return [(inputs | layout.boundaries() if self._boundaries else inputs, layout) for inputs, layout in flat]

    def _shrink(self, message: str, step: int, batches: Sequence[Inputs]) -> None:
        rows = sum(batch["input_ids"].shape[0] for batch in batches)
        if self._agree is not None or self.count >= rows or self.oom_retries >= MOST_HALVINGS:
            why = "" if self._agree is None else " (with several processes, they cannot be split further)"
            fitted = f"; {self._largest} tokens at once fitted" if self._largest else ""
            raise MemoryExhausted(
                f"step {step}: its {rows} rows in {self.count} micro-batches do not fit in "
                f"{memory_said(batches[0]['input_ids'].device)}{why}{fitted} ({message.splitlines()[0][:120]}); lower "
                "dataset.max_length, set trainer.activation_checkpointing: true, or quantization: {bits: 4} if the "
                "base is not quantized"
            )
        self.oom_retries += 1
        self.events.append((step, 2 * self.count))
        free_memory()


def count_tokens(piece: Mapping[str, Any]) -> Tensor:
    """Tokens of a micro-batch without padding: (), int64."""
    mask: Tensor | None = piece.get("attention_mask")
    if mask is None:
        return torch.full((), piece["input_ids"].numel(), device=piece["input_ids"].device)
    return mask.sum()


def first_rows(inputs: Mapping[str, Any], count: int) -> Inputs:
    """The first rows of a micro-batch."""
    return _rows(inputs, torch.arange(count), inputs["labels"].shape[0])


def unpad_rows(batch: Mapping[str, Any]) -> Iterator[Inputs]:
    """The rows of a padded micro-batch without padding: `input_ids` and `labels`, (length,) each."""
    mask = batch["attention_mask"]
    # One transfer for all rows: a boolean index would synchronize with the device for each.
    spans = torch.stack([mask.argmax(1), mask.sum(1)], 1).tolist()
    for ids, labels, (begin, length) in zip(batch["input_ids"], batch["labels"], spans, strict=True):
        yield {"input_ids": ids[begin : begin + length], "labels": labels[begin : begin + length]}


def flatten_rows(rows: Sequence[Inputs]) -> tuple[Inputs, SequenceLayout]:
    """Concatenate rows: inputs of shape (1, tokens), and the layout with which attention separates the rows."""
    lengths = [len(row["input_ids"]) for row in rows]
    labels = []
    for row in rows:
        own = row["labels"].clone()
        own[0] = IGNORED  # it must not be predicted from the previous row
        labels.append(own)
    positions = torch.cat([torch.arange(length) for length in lengths])
    ids = torch.cat([row["input_ids"] for row in rows])
    inputs = {
        "input_ids": ids[None],
        "labels": torch.cat(labels)[None],
        "position_ids": positions.to(ids.device, non_blocking=True)[None],
    }
    return inputs, SequenceLayout(tuple(lengths), ids.device)


def parts_that_fit(lengths: Sequence[int], most: int) -> int:
    """Smallest number of even parts with at most `most` tokens each, except for single longer rows.

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
    """Split rows into parts of about equally many tokens, in order, each with at least one row.

    >>> split_evenly([5, 5, 5, 9], 2)
    [slice(0, 2, None), slice(2, 4, None)]
    """
    total, done, begin = sum(lengths), 0, 0
    found = []
    for number in range(parts):
        end = begin
        share = total * (number + 1) / parts
        # A row that crosses a boundary goes to the part with more of it; later parts get at least one row each.
        while end < len(lengths) - (parts - number - 1) and (end == begin or done + lengths[end] / 2 <= share):
            done += lengths[end]
            end += 1
        found.append(slice(begin, len(lengths) if number == parts - 1 else end))
        begin = end
    return found


def _padded_parts(ids: Tensor, most: int) -> int:
    """Number of parts of a padded micro-batch, (rows, length), with at most `most` tokens each, except single rows."""
    return -(-ids.shape[0] // max(1, most // ids.shape[-1]))


def split_batch(inputs: Mapping[str, Any], pieces: int) -> list[Inputs]:
    """Split the rows of a micro-batch into parts of about equal size, and remove padding common to all rows of a part.

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
        # Float tensors are labels of whole rows, whose number may equal the number of tokens by chance.
        of_tokens = torch.is_tensor(value) and value.dim() == 2 and not value.is_floating_point()
        return value[:, span] if of_tokens and value.shape[1] == width else value

    return {name: part(value) for name, value in inputs.items()}
