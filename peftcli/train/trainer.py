"""TRL's SFTTrainer with a token-weighted evaluation, exact counts and checkpoints that are whole or absent."""

import math
from typing import Any

from torch import Tensor
from trl import SFTTrainer

from peftcli.data.tokens import IGNORED
from peftcli.train.steps import StepTrainer


class Trainer(StepTrainer, SFTTrainer):  # type: ignore[misc]  # trl ships no types
    """SFTTrainer; the training step, the loss and the loop are TRL's."""

    def targets(self, labels: Tensor) -> Tensor:
        """The tokens that are trained; the first of a row is predicted by nothing."""
        return (labels[..., 1:] != IGNORED).sum()

    def chance(self) -> str:
        """The loss of a guess among all tokens."""
        vocabulary = self.model.config.get_text_config().vocab_size
        return f" (a guess among all {vocabulary} tokens has {math.log(vocabulary):.3f})"

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the adapter folder gets a card with this run's own figures."""
