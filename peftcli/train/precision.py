"""The precision of trainable weights: float32 in training, the base's dtype when they are saved."""

import torch
from peft.utils import ModulesToSaveWrapper

from peftcli.adapters.full import WholeLayer, free_weights
from peftcli.adapters.quantized import is_quantized


def upcast_trainable(model: torch.nn.Module, dtype: str) -> None:
    """Give the trained weights the dtype that a plan says.

    TRL makes those over a quantized base bfloat16, for which float16 has no scaler, and which would round copies of
    the base before the first step.

    Args:
        model: just wrapped, not yet trained.
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
    """Give back the memory of the base's weights that trained copies stand for.

    They are of no use while the copies are trained, and as large as the copies or half as large. The base can no
    longer be had by switching the adapter off.

    Args:
        model: whose base was measured already.
    """
    for module in model.modules():
        if isinstance(module, WholeLayer):
            module.free_base()
        elif isinstance(module, ModulesToSaveWrapper):
            free_weights(module.original_module)


def downcast_saved_modules(model: torch.nn.Module, dtype: str) -> None:
    """Give modules that were trained whole the dtype of the base again, as loading the adapter does.

    They are trained in float32 under autocast; the evaluation runs without it, and PEFT does not cast their inputs.
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
