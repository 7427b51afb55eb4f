"""One training with plain SFTTrainer, set up as `trl sft` does it, in this process."""

import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoTokenizer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from peftcli.bench.job import ALPHA, RANK
from peftcli.bench.weights import give_weights
from peftcli.model.hardware import peak_memory_bytes, resident_bytes


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """When the loop began and when each step ended, on the clock of the wall."""

    def __init__(self) -> None:
        self.begun = self.ended = 0.0
        self.resident_before = 0
        self.steps: list[float] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.resident_before = resident_bytes()
        self.begun = time.time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.steps.append(time.time())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.ended = time.time()


def train(given: dict[str, Any]) -> dict[str, Any]:
    """Train the rows of a spec and write the adapter.

    Args:
        given: what `Job.sft` makes.

    Returns:
        Seconds of the loop, when the first step ended, the losses and the peak of the memory.
    """
    settings = ModelConfig(
        use_peft=True,
        lora_r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        lora_target_modules=["all-linear"],
        load_in_4bit=given["bits"] == 4,
        **given["model_settings"],
    )
    clock, run = Clock(), Path(given["run"])
    loading = {"dtype": settings.dtype, "attn_implementation": settings.attn_implementation}
    arguments = SFTConfig(
        output_dir=str(run),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        model_init_kwargs=loading,
        **given["arguments"],
    )
    trainer = SFTTrainer(
        model=given["model"],
        args=arguments,
        train_dataset=load_dataset("json", data_files=given["rows"], split="train", cache_dir=str(run / "cache")),
        processing_class=AutoTokenizer.from_pretrained(given["model"]),
        quantization_config=get_quantization_config(settings),
        peft_config=get_peft_config(settings),
        callbacks=[clock],
    )
    give_weights(trainer.model, Path(given["adapter"]))
    trainer.train()
    device = arguments.device.type
    peak = peak_memory_bytes(device)
    trainer.save_model(str(run / "adapter"))
    return {
        "seconds": clock.ended - clock.begun,
        "first_step_at": clock.steps[0],
        "step_seconds": [after - before for before, after in zip(clock.steps, clock.steps[1:], strict=False)],
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "peak_memory_bytes": peak,
        "resident_before_bytes": clock.resident_before,
        "reserved_bytes": torch.cuda.max_memory_reserved() if device == "cuda" else None,
        "recomputed": 1.0 if arguments.activation_checkpointing else 0.0,
    }
