"""Where a model lies: a tiny one made here, a local folder, a Hub id, or the stand-in of a smoke run."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from peftcli.model.inspect import load_config
from peftcli.model.rehearsal import Rehearsal, rehearse
from peftcli.recipe.schema import ModelSection
from peftcli.tiny.build import tiny_model

TINY = "tiny:"


@dataclass(frozen=True)
class Located:
    """What is loaded for the model of a recipe.

    Attributes:
        path: local folder or Hub id.
        config: its configuration.
        rehearsal: what stands in for the real model in a smoke run; None where nothing does.
    """

    path: str
    config: PreTrainedConfig
    rehearsal: Rehearsal | None = None


def locate(model: ModelSection, *, smoke: bool, longest: int = 0) -> Located:
    """Find or make the model of a recipe.

    Args:
        smoke: replace a real model by a tiny random one of the same architecture, without asking the network.
        longest: tokens of the longest row that the recipe allows; a smoke run needs it.

    Raises:
        MachineError: the model cannot be had.
        RecipeError: no tiny model has that name.
    """
    if model.name.startswith(TINY):
        path = str(tiny_model(model.name))
        return Located(path, load_config(path, None))
    if not smoke:
        trust = model.trust_remote_code
        return Located(model.name, load_config(model.name, model.revision, trust_remote_code=trust))
    made = rehearse(model, longest)
    return Located(made.path, load_config(made.path, None), made)
