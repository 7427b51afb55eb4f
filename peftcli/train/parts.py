"""A trainer over a base in parts."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from peftcli.model.distributed import is_divided


@contextmanager
def made_for_parts(model: torch.nn.Module, arguments: TrainingArguments) -> Iterator[None]:
    """Let transformers make a trainer for a base in parts that keeps its checkpoints.

    Args:
        model: as it was loaded.
        arguments: of the trainer; when the context ends they are as they were.
    """
    strategy = arguments.save_strategy
    if is_divided(model):
        # transformers takes what is trained to lie in parts as well, and refuses to keep it; here it is whole.
        arguments.save_strategy = SaveStrategy.NO
    try:
        yield
    finally:
        arguments.save_strategy = strategy
