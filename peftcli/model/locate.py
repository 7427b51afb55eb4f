"""Where a model lies: a tiny one made here, a local folder, a Hub id, or the stand-in of a smoke run."""

from transformers import PreTrainedConfig

from peftcli.errors import MachineError
from peftcli.model.inspect import load_config
from peftcli.progress import Progress
from peftcli.recipe.schema import ModelSection
from peftcli.recipe.tasks import IMAGES
from peftcli.tiny.build import stand_in, tiny_model
from peftcli.tiny.family import family_config
from peftcli.tiny.images import image_stand_in

TINY = "tiny:"


def locate(model: ModelSection, progress: Progress, *, smoke: bool) -> tuple[str, PreTrainedConfig, str]:
    """Find or make the model of a recipe.

    Args:
        smoke: stand in for a real model with a tiny random one of the same architecture.

    Returns:
        path: what to load.
        config: its configuration.
        note: what is unusual about it, empty as a rule.

    Raises:
        MachineError: the model cannot be had.
        RecipeError: no tiny model has that name.
    """
    if model.name.startswith(TINY):
        path = str(tiny_model(model.name))
        return path, load_config(path, None), ""
    if not smoke:
        return model.name, load_config(model.name, model.revision, trust_remote_code=model.trust_remote_code), ""
    try:
        config, origin = load_config(model.name, model.revision), "its own configuration"
    except MachineError:
        config, origin = family_config(model.name, images=model.task == IMAGES)
    path = str(image_stand_in(config) if model.task == IMAGES else stand_in(config))
    note = f"smoke: {model.name} is replaced by a tiny random {config.model_type} model made from {origin}"
    return path, load_config(path, None), note
