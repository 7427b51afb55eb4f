"""TRL's SFTTrainer with a token-weighted evaluation, exact counts and checkpoints that are whole or absent."""

import math
from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

from peftcli.data.tokenize import IGNORED
from peftcli.train.steps import StepTrainer


class DeferredTrainer(SFTTrainer):  # type: ignore[misc]  # trl ships no types
    """SFTTrainer that leaves its figures on the device until they are logged.

    TRL asks for entropy, accuracy and tokens after each micro-batch, and among several processes gathers each of them;
    the device then waits for Python, and the processes for one another.

    Attributes:
        defers: False leaves it all to TRL.
    """

    defers = True

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss: of the tokens of a step, or of a micro-batch where no count is given.

        Source: `SFTTrainer.compute_loss`, to the bit; a loss of another kind is computed there.
        """
        if return_outputs or not self._is_plain():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**{**inputs, "use_cache": False}, fused_lm_head=True)
        count = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = -outputs.log_probs.sum() / torch.as_tensor(count).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())  # whose gradients are averaged
        sums = [outputs.label_mask.sum(), outputs.entropy.detach().sum(), outputs.is_top1.sum()]
        mode = "train" if model.training else "eval"
        self._metrics[mode]["sums"].append(torch.stack([one.float() for one in sums]))
        return loss

    def _is_plain(self) -> bool:
        """Whether the loss is the mean negative log-likelihood of the tokens, with nothing added to it."""
        return (
            self.defers
            and self.args.loss_type == "nll"
            and self.label_smoother is None
            and self.compute_loss_func is None
            and not self.aux_loss_enabled
            and self.accelerator.parallelism_config is None
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Fetch the sums since the last time, of all processes, and log what they amount to."""
        figures = self._metrics["train" if self.model.training else "eval"]
        figures.pop("num_tokens", None)  # counted by the step
        sums = figures.pop("sums", None)
        if sums:
            tokens, entropy, right = self.accelerator.reduce(torch.stack(sums).sum(0), "sum").tolist()
            figures["entropy"] = [entropy / max(tokens, 1.0)]
            figures["mean_token_accuracy"] = [right / max(tokens, 1.0)]
        super().log(logs, start_time)


class Trainer(StepTrainer, DeferredTrainer):
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
