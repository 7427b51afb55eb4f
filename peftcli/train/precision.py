"""The precision of trainable weights: float32 in training, the base's dtype when saved."""

import torch
from peft.utils import ModulesToSaveWrapper

from peftcli.adapters.full import WholeLayer, free_weights
from peftcli.adapters.quantized import is_quantized


def upcast_trainable(model: torch.nn.Module, dtype: str) -> None:
    """Set the trained weights to the dtype of the plan.

    TRL makes those on a quantized base bfloat16, which the gradient scaler of float16 does not support, and which would
    round copies of the base before the first step.

    Args:
        model: wrapped and not yet trained.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    if not is_quantized(model):
        return
    for module in model.modules():
        if isinstance(module, WholeLayer):
            module.restore()
        elif isinstance(module, ModulesToSaveWrapper):
            _restore(module)


def free_trained_base(model: torch.nn.Module) -> None:
    """Free the memory of base weights that have trained copies.

    They are not needed while the copies are trained, and are half as large as the copies or more. Afterwards, disabling
    the adapter no longer gives the base.

    Args:
        model: its baseline must have been evaluated already.
    """
    for module in model.modules():
        if isinstance(module, WholeLayer):
            module.free_base()
        elif isinstance(module, ModulesToSaveWrapper):
            free_weights(module.original_module)


def downcast_saved_modules(model: torch.nn.Module, dtype: str) -> None:
    """Cast fully trained modules back to the dtype of the base, as loading the adapter does.

    They are trained in float32 under autocast, but evaluation runs without it, and PEFT does not cast their inputs.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.to(getattr(torch, dtype))
        elif isinstance(module, WholeLayer):
            module.narrow()


def _restore(module: ModulesToSaveWrapper) -> None:
    base = dict(module.original_module.named_parameters())
    for copied in module.modules_to_save.values():
        for name, own in copied.named_parameters():
            own.data = base[name].data.to(own.dtype, copy=True)
