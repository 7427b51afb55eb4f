"""Running statistics of batch norms: those of the base stay, so that an adapter switched off leaves the base."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a forward pass in training changes a module, as the running means of a batch norm."""
    return isinstance(module, _BatchNorm)


def freeze_statistics(model: nn.Module) -> None:
    """Let each batch norm compute with the statistics of the base, in training too.

    A forward pass then depends on no other row of its batch, and changes nothing.
    """
    for module in model.modules():
        if keeps_statistics(module):
            # A trainer puts the whole model into training mode before each step.
            module.register_forward_pre_hook(_as_in_evaluation)


def _as_in_evaluation(module: nn.Module, inputs: Any) -> None:
    module.eval()
