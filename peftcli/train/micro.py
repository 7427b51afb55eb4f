"""Micro-batches that become smaller when memory does not hold them; the step, its rows and its loss stay the same."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from peftcli.errors import MemoryExhausted
from peftcli.model.memory import MOST_HALVINGS, free_memory, is_out_of_memory, memory_said

Inputs: TypeAlias = dict[str, Any]


class MicroBatches:
    """Runs the micro-batches of one optimizer step, in pieces where they do not fit whole.

    The loss of a piece is a part of the sum over all trained tokens of the step, so the pieces of a step add up to the
    same loss and the same gradient. When memory runs out in the middle of a step, what it has added to the gradients
    cannot be trusted: they are cleared, and the step begins anew with pieces of half the size.

    Attributes:
        pieces: into how many parts each micro-batch is cut; 1, 2, 4 or 8.
        events: (step, rows at once) of each time that memory ran out.
    """

    def __init__(self, *, alone: bool) -> None:
        """
        Args:
            alone: this is the only process; several cannot repeat a step each for itself.
        """
        self.pieces = 1
        self.events: list[tuple[int, int]] = []
        self._alone = alone
        self._batches: Sequence[Inputs] = ()
        self._done = 0
        self._largest: tuple[int, int] | None = None
        self._repeating = False

    @property
    def parts_of_step(self) -> int:
        """Forward passes of the step at hand."""
        return sum(min(self.pieces, batch["input_ids"].shape[0]) for batch in self._batches)

    def begin(self, batches: Sequence[Inputs]) -> None:
        """Remember the micro-batches of the step that begins."""
        self._batches, self._done = batches, 0

    def run(self, inputs: Inputs, one: Callable[[Inputs], Tensor], restart: Callable[[], None], step: int) -> Tensor:
        """The loss of a micro-batch, its gradients added.

        Args:
            inputs: the micro-batch.
            one: forward and backward of some rows.
            restart: clears what the step has added to gradients and counters.
            step: number of the step, for messages.

        Raises:
            MemoryExhausted: the pieces cannot be made smaller.
        """
        while True:
            said = None
            try:
                for earlier in self._batches[: self._done] if self._repeating else ():
                    self._whole(earlier, one)
                loss = self._whole(inputs, one)
            except (RuntimeError, MemoryError) as problem:
                if not is_out_of_memory(problem):
                    raise
                said = str(problem)
            if said is None:
                self._repeating = False
                self._done += 1
                return loss
            # Outside the handler, which keeps the tensors of the failed attempt alive.
            self._shrink(inputs, said, step)
            restart()
            self._repeating = True

    def _whole(self, inputs: Inputs, one: Callable[[Inputs], Tensor]) -> Tensor:
        losses = []
        for piece in cut(inputs, self.pieces):
            losses.append(one(piece))
            rows, tokens = piece["input_ids"].shape
            if self._largest is None or rows * tokens > self._largest[0] * self._largest[1]:
                self._largest = (rows, tokens)
        return torch.stack(losses).sum()

    def _shrink(self, inputs: Inputs, said: str, step: int) -> None:
        rows, tokens = inputs["input_ids"].shape
        device = inputs["input_ids"].device
        now = -(-rows // self.pieces)
        if not self._alone or now == 1 or self.pieces >= 2**MOST_HALVINGS:
            fitted = f"; {self._largest[0]} rows of {self._largest[1]} tokens did fit" if self._largest else ""
            why = "" if self._alone else " (several processes cannot make it smaller on their own)"
            raise MemoryExhausted(
                f"step {step}: {now} row{'s' if now > 1 else ''} of {tokens} tokens at once do not fit into "
                f"{memory_said(device)}{why}{fitted} ({said.splitlines()[0][:120]}); lower dataset.max_length or "
                "trainer.per_device_train_batch_size, set trainer.activation_checkpointing: true, or add "
                "quantization: {bits: 4}"
            )
        self.pieces *= 2
        self.events.append((step, -(-rows // self.pieces)))
        free_memory()


def cut(inputs: Mapping[str, Any], pieces: int) -> list[Inputs]:
    """The rows of a micro-batch in parts of about equal size, each without the padding that all its rows share.

    >>> ids, mask = torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    >>> [part["input_ids"].tolist() for part in cut({"input_ids": ids, "attention_mask": mask}, 2)]
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
        return value[:, span] if torch.is_tensor(value) and value.dim() == 2 and value.shape[1] == width else value

    return {name: part(value) for name, value in inputs.items()}
