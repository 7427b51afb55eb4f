"""When a training no longer leads anywhere: a loss or gradient that is not finite, or no gradient at all."""

import math

from peftcli.errors import Diverged

MOST_FLAT_STEPS = 5
"""Steps in a row without any gradient; one alone may be chance, such as a row whose answer is certain."""
MOST_SKIPPED_STEPS = 30
"""Steps in a row that float16's scaler skips; it begins at 65536 and halves its scale each time."""


class Divergence:
    """Looks at each step before the optimizer applies it."""

    def __init__(self) -> None:
        self._flat = 0
        self._skipped = 0

    def check(self, step: int, loss: float, norm: float, *, scaled: bool, chance: str) -> None:
        """Stop before a step that would spoil the weights, or once nothing is learned any more.

        Args:
            norm: of the gradient.
            scaled: the gradient scaler of float16 skips steps that overflow.
            chance: what a guess would lose, in brackets with a space before, or nothing.

        Raises:
            Diverged: the loss or the gradient of the step is not finite, or the gradient has been 0 for some steps.
        """
        if not math.isfinite(loss):
            raise Diverged(
                f"step {step}: the loss is {loss}, so training stopped before the weights took it; lower "
                "trainer.learning_rate, or look at the rows of this step"
            )
        if not math.isfinite(norm):
            # The gradient scaler of float16 finds its scale by steps that overflow, and skips them itself.
            self._skipped += 1
            if not scaled or self._skipped >= MOST_SKIPPED_STEPS:
                raise Diverged(
                    f"step {step}: the gradient is {norm} at a loss of {loss:.4f}, so training stopped before "
                    "the weights took it; lower trainer.learning_rate or trainer.max_grad_norm"
                )
            return
        self._skipped = 0
        self._flat = self._flat + 1 if norm == 0.0 else 0
        if self._flat >= MOST_FLAT_STEPS:
            raise Diverged(
                f"step {step}: the gradient has been 0 for {self._flat} steps at a loss of {loss:.3f}{chance}, so "
                "nothing is learned any more; lower trainer.learning_rate and begin anew, or from an earlier checkpoint"
            )
