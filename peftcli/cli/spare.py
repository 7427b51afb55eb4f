"""What a training does not import, since its recipe has no use for it."""

import sys

from peftcli.recipe.schema import Recipe
from peftcli.recipe.stages import stage_recipes

OWN_OPTIMIZERS = (None, "adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "sgd")
"""Of torch and transformers; of the others many are those of bitsandbytes. None is the trainer's default."""


def import_peft(recipe: Recipe) -> None:
    """Import PEFT, and bitsandbytes with it only for a recipe that has a use for it.

    PEFT imports bitsandbytes wherever it is installed, and that torch's compiler: a fifth of the start of a training
    and 40 MB (`scripts/startup.py`), and on a CUDA machine more.
    """
    packs = recipe.quantization is not None
    bits = packs or any(one.trainer.get("optim") not in OWN_OPTIMIZERS for one in stage_recipes(recipe))
    if bits or "peft" in sys.modules or "bitsandbytes" in sys.modules:
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # so that it is not found
    try:
        from peft.import_utils import is_bnb_available

        is_bnb_available()  # PEFT remembers the answer
    finally:
        del sys.modules["bitsandbytes"]
