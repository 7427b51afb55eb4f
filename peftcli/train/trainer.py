"""TRL's SFTTrainer with a token-weighted evaluation, exact counts and checkpoints that are whole or absent."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from peftcli.data.tokens import IGNORED
from peftcli.errors import Diverged
from peftcli.train import checkpoints


class Trainer(SFTTrainer):  # type: ignore[misc]  # trl ships no types
    """SFTTrainer; the training step, the loss and the loop are TRL's.

    Attributes:
        seconds_before: seconds of training in earlier sessions of the run.
        seconds: seconds of training in this one, kept by the callback that watches.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds_before = 0.0
        self.seconds = 0.0
        self._trained_tokens: Tensor | int = 0
        self._counted_before = {"tokens": 0.0, "trained_tokens": 0.0}
        self._step_loss: Tensor | None = None
        self._staging: str | None = None

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Count the trained tokens and remember the loss of the step."""
        self._trained_tokens = self._trained_tokens + (inputs["labels"][..., 1:] != IGNORED).sum()
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        return loss

    def counters(self) -> dict[str, float]:
        """What all processes of all sessions have counted: tokens, trained tokens and seconds of training."""
        mine = torch.as_tensor(self._trained_tokens, device=self.args.device)
        trained = float(self.accelerator.reduce(mine, "sum"))
        return {
            "tokens": self._counted_before["tokens"] + float(self._total_train_tokens),
            "trained_tokens": self._counted_before["trained_tokens"] + trained,
            "seconds": self.seconds_before + self.seconds,
        }

    @property
    def tokens_before(self) -> float:
        """Tokens of earlier sessions of the run."""
        return self._counted_before["tokens"]

    def go_on_from(self, counters: dict[str, float]) -> None:
        """Take over what the sessions before have counted."""
        self._counted_before = {name: counters[name] for name in self._counted_before}
        self.seconds_before = counters["seconds"]

    def check_finite(self, step: int) -> None:
        """Stop before the optimizer applies a step whose loss is not a number.

        Raises:
            Diverged: the loss of the micro-batches since the last call is not finite.
        """
        loss, self._step_loss = self._step_loss, None
        if loss is not None and not torch.isfinite(loss):
            raise Diverged(
                f"step {step}: the loss is {loss.item()}, so training stopped before the weights took it; lower "
                "trainer.learning_rate, or look at the rows of this step"
            )

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate with every trained token weighing the same, so that the loss does not depend on the batch size."""
        self.model.eval()
        nll = torch.zeros((), dtype=torch.float64, device=self.args.device)
        tokens = torch.zeros((), dtype=torch.float64, device=self.args.device)
        rows = 0
        for inputs in dataloader:
            loss = self.prediction_step(self.model, inputs, prediction_loss_only=True)[0]
            count = (inputs["labels"][..., 1:] != IGNORED).sum().to(nll)
            nll += loss.double() * count
            tokens += count
            rows += inputs["labels"].shape[0]
        total = self.accelerator.reduce(torch.stack([nll, tokens]), "sum")
        metrics = {f"{metric_key_prefix}_loss": (total[0] / total[1]).item()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        self._staging = str(folder / checkpoints.STAGING)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        counters = self.counters()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(folder / name)
                self.state.save_to_json(str(folder / checkpoints.STAGING / name / "trainer_state.json"))
            checkpoints.seal(folder / checkpoints.STAGING / name, self.state.global_step, counters)
            checkpoints.promote(folder / checkpoints.STAGING / name, folder / name)
            checkpoints.rotate(folder, self.args.save_total_limit or 2, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the adapter folder gets a card with this run's own figures."""
