"""float16 with its gradient scaler on a CPU, where accelerate refuses it: training as on a GPU without bfloat16."""

from typing import Any

import torch
import transformers


def train_in_float16(scale: float = 65536.0) -> None:
    """Let every trainer compute under float16 autocast with a gradient scaler.

    Args:
        scale: of the first step; torch's default is 65536.
    """
    real = transformers.Trainer.create_accelerator_and_postprocess

    def create(self: Any) -> None:
        real(self)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"

    transformers.Trainer.create_accelerator_and_postprocess = create
