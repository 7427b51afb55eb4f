"""The weights of an adapter, put into a model that has one already."""

from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file


def give_weights(model: Any, folder: Path) -> None:
    """Replace the weights of a model's adapter by those of a folder in PEFT's format.

    Raises:
        ValueError: the folder holds another adapter; PEFT would leave out in silence what does not fit.
    """
    given = load_file(folder / "adapter_model.safetensors")
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    unlike = {name for name in set(own) | set(given) if name not in own or name not in given}
    if unlike:
        raise ValueError(f"{folder.name}: {len(unlike)} tensors are on one side only, such as {min(unlike)}")
    set_peft_model_state_dict(model, given)
