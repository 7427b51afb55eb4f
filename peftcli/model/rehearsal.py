"""What a smoke run uses of a real model: its configuration and tokenizer, from the local disk only."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from peftcli.errors import MachineError
from peftcli.model.files import local_folder
from peftcli.model.hub import explain_missing
from peftcli.recipe.schema import ModelSection
from peftcli.tasks.registry import TASKS
from peftcli.tiny.build import stand_in
from peftcli.tiny.images import image_stand_in
from peftcli.tiny.shrink import family_config
from peftcli.tiny.tokenizer_files import holds_tokenizer

SMALL_FILES = "--include '*.json' --include '*.jinja' --include '*.model' --include '*.txt'"
"""Arguments of `hf download` for all files of a model except its weights."""


@dataclass(frozen=True)
class Rehearsal:
    """A stand-in for a real model.

    Attributes:
        path: folder of the stand-in.
        config: the real configuration; None if it is not local.
        own_tokenizer: the stand-in has the tokenizer, chat template and vocabulary of the real model.
        notes: messages on what was replaced or could not be rehearsed.
    """

    path: str
    config: PreTrainedConfig | None
    own_tokenizer: bool
    notes: tuple[str, ...]


def rehearse(model: ModelSection, longest: int) -> Rehearsal:
    """Make the stand-in of a model from local files: a folder, or the cache of the Hub.

    Args:
        longest: maximum tokens of a row in the recipe; used as the stand-in's maximum length if that of the model is
            unknown.

    Raises:
        MachineError: the local files cannot be read, or no small model of this type can be made.
    """
    folder = local_folder(model.name, model.revision)
    config = None if folder is None else _config(folder, model)
    known, origin = (config, "its own configuration") if config is not None else _guess(model)
    small = f"smoke: {model.name} is replaced by a tiny random {known.model_type} model made from {origin}"
    notes = [small, *([] if config is not None else [_unknown_config(model)])]
    if TASKS[model.task].images:
        notes.append(f"smoke: images are resized to 32 pixels; the image processor of {model.name} was not rehearsed")
        return Rehearsal(str(image_stand_in(known)), config, own_tokenizer=False, notes=tuple(notes))
    own = folder if config is not None and folder is not None and holds_tokenizer(folder) else None
    if model.trust_remote_code:
        own = None
    if own is None:
        notes.append(_unknown_tokenizer(model))
    path = stand_in(known, tokenizer_folder=own, end=model.eos_token, longest=0 if config is not None else longest)
    return Rehearsal(str(path), config, own is not None, tuple(notes))


def _config(folder: Path, model: ModelSection) -> PreTrainedConfig | None:
    """The configuration in a folder; None if it has none, or one that needs custom code."""
    if not (folder / "config.json").is_file():
        return None
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as problem:
        if model.trust_remote_code:
            return None
        raise MachineError(explain_missing(str(folder), problem)) from problem
    return config


def _guess(model: ModelSection) -> tuple[PreTrainedConfig, str]:
    return family_config(model.name, images=TASKS[model.task].images)


def _unknown_config(model: ModelSection) -> str:
    why = (
        "needs code from its repository, which a smoke run does not run" if model.trust_remote_code else "is not local"
    )
    return (
        f"smoke: the configuration of {model.name} {why}, so neither the adapter's targets nor dataset.max_length were "
        "checked against the real model"
    )


def _unknown_tokenizer(model: ModelSection) -> str:
    start = "smoke: the tokenizer of"
    unchecked = "so its chat template, its end token and the lengths of the rows in its tokens were not checked"
    if model.trust_remote_code:
        return f"{start} {model.name} may need code from its repository, which a smoke run does not run, {unchecked}"
    missing = f"{start} {model.name} is not available locally, {unchecked}"
    if Path(model.name).is_absolute():
        return f"{missing}; copy its files into that folder to rehearse with it"
    return f"{missing}; `hf download {model.name} {SMALL_FILES}` downloads it"
