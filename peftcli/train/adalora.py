"""AdaLoRA in training: rank allocation after every step, orthogonal regularization, and its state in checkpoints."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftcli.plan.adalora import rank_schedule
from peftcli.recipe.schema import AdapterSection
from peftcli.results import RanksJson, save
from peftcli.run_dir import read_json

AVERAGES = "ranks.safetensors"
HISTORY = "ranks.json"
"""Files in a checkpoint: the averages of importance, and the history of the ranks."""
KINDS = ("ipt", "exp_avg_ipt", "exp_avg_unc")
MOST_POINTS = 200
"""Maximum number of points in the history of a run."""


class RankAllocation(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Calls PEFT's rank allocation, which neither transformers nor TRL calls.

    Attributes:
        history: for each recorded step, the rank of each module, in the order of `modules`.
        skips: the gradient of the current step is not finite, so the optimizer skips it. Accelerate's
            `step_was_skipped` is not used: a fused optimizer is called on every step and skips the update internally.
    """

    def __init__(self, model: PeftModel, adapter: AdapterSection, resume_from: Path | None) -> None:
        """
        Args:
            model: the wrapped model.
            adapter: of the plan.
            resume_from: the checkpoint from which the run resumes.
        """
        self._model = model
        self._adapter = adapter
        self._config: Any = model.peft_config["default"]
        self._allocator: Any = model.base_model.rankallocator
        self._weight = float(self._config.orth_reg_weight)
        # PEFT's forward would add the regularizer again for each micro-batch with labels.
        self._config.orth_reg_weight = 0.0
        self._every = 1
        self._pattern: dict[str, list[bool]] | None = None
        self.modules = [_module(name) for name, _ in _values(model)]
        self.history: list[dict[str, Any]] = []
        self.skips = False
        if resume_from is not None:
            self._load(resume_from)

    def regularizer(self) -> Tensor:
        """The deviation of the singular vectors from orthogonality, times its weight: (), float32.

        Source: Zhang et al. 2023, arXiv:2303.10512, equation 4; the mean over matrices is PEFT's.
        """
        parts = []
        for name, vectors in self._model.named_parameters():
            if "lora_A.default" in name or "lora_B.default" in name:
                wide = vectors.float()
                product = wide @ wide.T if "lora_A" in name else wide.T @ wide
                parts.append(torch.linalg.norm(product - torch.eye(len(product), device=product.device)))
        return self._weight * torch.stack(parts).mean()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        schedule = rank_schedule(self._adapter, state.max_steps)
        self._config.total_step = state.max_steps
        self._config.tinit, self._config.tfinal = schedule
        # Not earlier: PEFT would shrink the ranks of the checkpoint that is loaded in between.
        self._config.rank_pattern = self._pattern
        self._every = max(1, state.max_steps // MOST_POINTS)
        if not self.history:
            self._note(0)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Here the gradients still exist, and the optimizer has already used them.
        if self.skips:
            return  # non-finite values would stay in the averages forever
        step = state.global_step + 1
        self._allocate(step)
        if step % self._every == 0 or step == state.max_steps:
            self._note(step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._config.orth_reg_weight = self._weight

    def _allocate(self, step: int) -> None:
        """Call PEFT's allocation, and repeat the step that fixes the ranks until it is not skipped.

        PEFT fixes the ranks at exactly that step, from the importance of the previous steps, then clears the importance
        and keeps the ranks fixed.
        """
        fixing = self._config.total_step - self._config.tfinal
        if step >= fixing and (self._config.rank_pattern is None or self._allocator.ipt):
            if not self._allocator.ipt:  # all previous steps were skipped
                self._allocator.update_ipt(self._model.base_model.model)
            step = fixing
        self._model.base_model.update_and_allocate(step)

    def _note(self, step: int) -> None:
        pattern = self._config.rank_pattern
        full = self._config.init_r
        ranks = [full if pattern is None else sum(_pattern_of(pattern, name)) for name, _ in _values(self._model)]
        self.history.append({"step": step, "ranks": ranks})

    @contextmanager
    def save_all_ranks(self, folder: Path) -> Iterator[None]:
        """Save the adapter of a checkpoint with all its ranks, because masked ones may become active again.

        PEFT omits the masked ones, which is right for the final adapter.
        """
        pattern, self._config.rank_pattern = self._config.rank_pattern, None
        try:
            yield
        finally:
            self._config.rank_pattern = pattern
        averages = {f"{kind}/{name}": value for kind in KINDS for name, value in getattr(self._allocator, kind).items()}
        save_file({name: value.contiguous() for name, value in averages.items()}, folder / AVERAGES)
        (folder / HISTORY).write_text(json.dumps({"pattern": pattern, "history": self.history}), encoding="utf-8")

    def _load(self, folder: Path) -> None:
        stored = read_json(folder / HISTORY)
        self.history = list(stored["history"])
        self._pattern = stored["pattern"]
        devices = {name: weight.device for name, weight in self._model.get_base_model().named_parameters()}
        for key, value in load_file(folder / AVERAGES).items():
            kind, _, name = key.partition("/")
            getattr(self._allocator, kind)[name] = value.to(devices[name])

    def write(self, file: Path) -> None:
        """Write the history of the ranks for the report."""
        history = RanksJson(
            first=self._config.init_r,
            target=self._config.target_r,
            modules=tuple(self.modules),
            steps=tuple(point["step"] for point in self.history),
            ranks=tuple(tuple(point["ranks"]) for point in self.history),
        )
        save(file, history)


def _values(model: PeftModel) -> list[tuple[str, Tensor]]:
    """The singular values of each module, by the allocator's name for them."""
    return [(name, value) for name, value in model.get_base_model().named_parameters() if "lora_E.default" in name]


def _module(name: str) -> str:
    return name.partition(".lora_E")[0]


def _pattern_of(pattern: dict[str, list[bool]], name: str) -> list[bool]:
    # PEFT removes the adapter's name from the keys when it saves the adapter.
    return pattern[name] if name in pattern else pattern[name.replace(".default", "")]
