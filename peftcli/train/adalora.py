"""AdaLoRA in training: ranks allocated after every step, orthogonal regularization, and state across a resume."""

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
"""In a checkpoint: the averages of importance, and what the ranks were."""
KINDS = ("ipt", "exp_avg_ipt", "exp_avg_unc")
MOST_POINTS = 200
"""Of the history, over the whole run."""


class RankAllocation(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Calls what neither transformers nor TRL calls: PEFT's allocation of ranks.

    Attributes:
        history: for each step that was kept, the rank of each module, in the order of `modules`.
        skips: the gradient of the step at hand is not finite, so that the optimizer skips it. Not asked of accelerate's
            `step_was_skipped`: a fused optimizer is called on every step, and keeps the weights itself.
    """

    def __init__(self, model: PeftModel, adapter: AdapterSection, resume_from: Path | None) -> None:
        """
        Args:
            model: the wrapped model.
            adapter: of the plan.
            resume_from: the checkpoint that the run goes on from.
        """
        self._model = model
        self._adapter = adapter
        self._config: Any = model.peft_config["default"]
        self._allocator: Any = model.base_model.rankallocator
        self._weight = float(self._config.orth_reg_weight)
        # PEFT's own forward would add the regulariser once more for each piece that it sees the labels of.
        self._config.orth_reg_weight = 0.0
        self._every = 1
        self._pattern: dict[str, list[bool]] | None = None
        self.modules = [_module(name) for name, _ in _values(model)]
        self.history: list[dict[str, Any]] = []
        self.skips = False
        if resume_from is not None:
            self._load(resume_from)

    def regulariser(self) -> Tensor:
        """How far the singular vectors are from orthogonal, times its weight: (), float32.

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
        # Not before: PEFT would cut the ranks of the checkpoint that is loaded in between.
        self._config.rank_pattern = self._pattern
        self._every = max(1, state.max_steps // MOST_POINTS)
        if not self.history:
            self._note(0)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Here the gradients are still there, and the optimizer has used them.
        if self.skips:
            return  # what is not finite would stay in the averages for good
        step = state.global_step + 1
        self._allocate(step)
        if step % self._every == 0 or step == state.max_steps:
            self._note(step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._config.orth_reg_weight = self._weight

    def _allocate(self, step: int) -> None:
        """Let PEFT allocate, at the step that fixes the ranks for as long as that one was skipped.

        PEFT fixes them at that very step by the importance of those before, which it forgets then, and goes on with the
        ranks that were fixed.
        """
        fixing = self._config.total_step - self._config.tfinal
        if step >= fixing and (self._config.rank_pattern is None or self._allocator.ipt):
            if not self._allocator.ipt:  # all steps before were skipped
                self._allocator.update_ipt(self._model.base_model.model)
            step = fixing
        self._model.base_model.update_and_allocate(step)

    def _note(self, step: int) -> None:
        pattern = self._config.rank_pattern
        full = self._config.init_r
        ranks = [full if pattern is None else sum(_pattern_of(pattern, name)) for name, _ in _values(self._model)]
        self.history.append({"step": step, "ranks": ranks})

    @contextmanager
    def whole(self, folder: Path) -> Iterator[None]:
        """Save the adapter of a checkpoint with all its ranks, since those that are masked now may come back.

        PEFT leaves the masked ones out, for the adapter that a run ends with.
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
        kept = read_json(folder / HISTORY)
        self.history = list(kept["history"])
        self._pattern = kept["pattern"]
        places = {name: weight.device for name, weight in self._model.get_base_model().named_parameters()}
        for key, value in load_file(folder / AVERAGES).items():
            kind, _, name = key.partition("/")
            getattr(self._allocator, kind)[name] = value.to(places[name])

    def write(self, file: Path) -> None:
        """Write what the ranks were over the run, for the report."""
        history = RanksJson(
            first=self._config.init_r,
            target=self._config.target_r,
            modules=tuple(self.modules),
            steps=tuple(point["step"] for point in self.history),
            ranks=tuple(tuple(point["ranks"]) for point in self.history),
        )
        save(file, history)


def _values(model: PeftModel) -> list[tuple[str, Tensor]]:
    """The singular values of each module, by the name that the allocator knows."""
    return [(name, value) for name, value in model.get_base_model().named_parameters() if "lora_E.default" in name]


def _module(name: str) -> str:
    return name.partition(".lora_E")[0]


def _pattern_of(pattern: dict[str, list[bool]], name: str) -> list[bool]:
    # PEFT takes the adapter's name out of the keys once it has saved the adapter.
    return pattern[name] if name in pattern else pattern[name.replace(".default", "")]
