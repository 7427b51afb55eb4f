"""What a training does not import, since its recipe has no use for it."""

import sys

from peftcli.recipe.schema import Recipe
from peftcli.recipe.stages import stage_recipes

OWN_OPTIMIZERS = (None, "adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "sgd")
"""Of torch and transformers; of the others many are those of bitsandbytes. None is the trainer's default."""


def import_peft(recipe: Recipe) -> None:
    """Import PEFT and transformers without packages that they import where they are installed, used or not.

    bitsandbytes brings torch's compiler with it, and only a loss of object detection wants scipy: together a fifth of
    the start of a training and 70 MB, and on a CUDA machine more. Older transformers import scikit-learn for assisted
    generation, and it does not load without scipy, so both are hidden.
    """
    if "peft" in sys.modules:
        return
    unused = {"scipy", "sklearn"}
    own = all(one.trainer.get("optim") in OWN_OPTIMIZERS for one in stage_recipes(recipe))
    if own and recipe.quantization is None:
        unused.add("bitsandbytes")
    hidden = unused - sys.modules.keys()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None stands for what is not found
    try:
        from peft.import_utils import is_bnb_available

        is_bnb_available()  # PEFT remembers the answer
    finally:
        for name in hidden:
            del sys.modules[name]
