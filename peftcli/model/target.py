"""The targets of `eval`, `merge` and `generate`: a run folder, an adapter, a merged model or a base."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftcli.errors import MachineError, RecipeError
from peftcli.model.adapter_weights import CONFIG, check_adapter_files
from peftcli.model.load import load_adapter, load_base, load_tokenizer
from peftcli.model.manifest import (
    BaseLocation,
    base_of,
    check_adapter,
    check_merged,
    check_tokenizer,
    read_manifest,
    refuse_other_base,
    refuse_small_embedding,
    stated_base,
    token_ids,
)
from peftcli.plan.plan import Base
from peftcli.recipe.load import load_run_recipe
from peftcli.recipe.paths import path_from
from peftcli.run_dir import RunDir
from peftcli.tasks.registry import TASKS
from peftcli.tiny.tokenizer_files import holds_tokenizer


@dataclass(frozen=True)
class Target:
    """A model to use.

    Attributes:
        base: the weights to load.
        adapter: folder of the adapter; None for a merged model or a base.
        identity: the manifest in the folder: format, templates, stop ids; empty for a plain base.
        run: the run that it belongs to; None without a run folder.
    """

    base: Base
    adapter: Path | None
    identity: dict[str, Any]
    run: RunDir | None

    @property
    def kind(self) -> str:
        """`adapter`, `merged` or `base`."""
        return str(self.identity.get("kind", "base"))

    @property
    def tokenizer_folder(self) -> Path | None:
        """The adapter's folder if it contains a tokenizer; None if that of the base is used."""
        return self.adapter if self.adapter is not None and holds_tokenizer(self.adapter) else None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load only the tokenizer.

        Raises:
            MachineError: it cannot be loaded.
        """
        folder = self.tokenizer_folder
        return load_tokenizer(self.base.tokenizer, None if folder is None else str(folder))

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the model, in evaluation mode, and its tokenizer.

        Raises:
            MachineError: it cannot be loaded, or the parts do not fit together.
        """
        model = load_base(self.base)
        tokenizer = self.tokenizer()
        if self.adapter is not None:
            if "base" in self.identity:
                refuse_other_base(self.identity, self.base)  # again, because it may have just been downloaded
            elif not TASKS[self.base.task].images:
                rows = int(model.get_input_embeddings().weight.shape[0])
                refuse_small_embedding({}, rows, token_ids(tokenizer), self.base.path)
            model = load_adapter(model, self.adapter)
        model.eval()
        return model, tokenizer


@dataclass(frozen=True)
class LoadedTarget:
    """A target with its model, in evaluation mode, and its tokenizer."""

    target: Target
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, target: Target) -> "LoadedTarget":
        """Load a target; errors as for `Target.load`."""
        return cls(target, *target.load())


def open_target(path: str, base: Base | None = None, model: str | None = None) -> Target:
    """Determine what a path is, and check that its files are unchanged since training or merging.

    Args:
        path: of a run folder, an adapter folder or a merged model; or the name of a base.
        base: the base of a recipe: for targets of other tools, and as the current location of an adapter's base.
        model: local folder or Hub id of the adapter's base, where the user says where it is now.

    Raises:
        MachineError: there is nothing usable, or an adapter, its tokenizer or its base was changed.
    """
    folder = Path(path)
    if (folder / "recipe.yaml").is_file():
        run = RunDir(folder)
        found = read_manifest(run.adapter)
        if found is None and (merged := read_manifest(run.merged)) is not None:
            return _merged(run.merged, merged, run)
        if found is None:
            fix = f"`peftcli train RECIPE --output-dir {path}` creates one"
            raise MachineError(f"{path}: this run has no adapter yet; {fix}")
        return _adapter(run.adapter, found, _places(run.adapter, found, (base, model), run), run)
    found = read_manifest(folder) if folder.is_dir() else None
    run_of = RunDir(folder.parent) if (folder.parent / "recipe.yaml").is_file() else None
    if found is not None and found["kind"] == "adapter":
        return _adapter(folder, found, _places(folder, found, (base, model), run_of), run_of)
    if found is not None:
        return _merged(folder, found, run_of)
    if base is not None and (folder / CONFIG).is_file():
        return _external_adapter(folder, base)
    if base is not None:
        if not _is_base(folder, path, base):
            raise MachineError(
                f"{path}: not written by peftcli, and not the base of the recipe ({base.name}); pass one of these"
            )
        return Target(base, None, {}, None)
    if folder.is_dir():
        raise MachineError(
            f"{path}: neither a run folder (recipe.yaml) nor an adapter or merged model of peftcli (peftcli.json); "
            "for a base model, pass --recipe"
        )
    raise MachineError(f"{path}: no such folder; for a base model, pass --recipe")


def _is_base(folder: Path, path: str, base: Base) -> bool:
    if path in (base.name, base.path):
        return True
    return folder.is_dir() and Path(base.path).is_dir() and folder.samefile(base.path)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _merged(folder: Path, found: dict[str, Any], run: RunDir | None) -> Target:
    """One of our merged models, after checking its files and its tokenizer."""
    merged = _merged_base(folder, found, _device())
    check_merged(folder, found)
    check_tokenizer(folder, found, merged)
    return Target(merged, None, found, run)


def _adapter(folder: Path, found: dict[str, Any], places: Sequence[BaseLocation], run: RunDir | None) -> Target:
    """One of our adapters, after checking its files, base and tokenizer against its manifest."""
    check_adapter(folder)
    under = base_of(found, _device(), places)
    check_tokenizer(folder, found, under)
    under = replace(under, absorbed=tuple(str(folder / place) for place in under.absorbed))
    return Target(under, folder, found, run)


def _places(
    folder: Path, found: dict[str, Any], given: tuple[Base | None, str | None], run: RunDir | None
) -> list[BaseLocation]:
    """Possible locations of an adapter's base: the given one, or else where it was, and in or beside the run.

    Args:
        given: the base of a recipe, and the base that the user names.
    """
    base, model = given
    stated = stated_base(found)
    if model is not None:
        return [BaseLocation(model, None if Path(model).is_dir() else stated.revision)]
    if base is not None and not found.get("smoke"):  # a smoke run uses a stand-in, never the recipe's base
        return [BaseLocation(base.path, base.revision)]
    beside = found["base"].get("beside")
    if beside is None:
        places = [BaseLocation(stated.path, stated.revision)]
    else:
        unresolved = os.path.join(os.path.abspath(folder), beside)  # as earlier versions wrote it
        places = [BaseLocation(path_from(folder, path), None) for path in (stated.path, beside, unresolved)]
    if run is not None and not found.get("smoke"):
        places += _place_of_run(run)
    name = Path(stated.path).name
    nearby = [] if beside is None or run is None else [run.path / name, run.path.parent / name]
    return places + [BaseLocation(os.path.abspath(place), None) for place in nearby if place.is_dir()]


def _place_of_run(run: RunDir) -> list[BaseLocation]:
    """The local folder in a run's recipe: users who move a base may set its new location there."""
    try:
        model = load_run_recipe(run.recipe).recipe.model
    except RecipeError:  # the command that needs the recipe reports its problems
        return []
    return [BaseLocation(model.name, None)] if Path(model.name).is_dir() else []


def _external_adapter(folder: Path, base: Base) -> Target:
    """An adapter written by PEFT for another tool, on the base of a recipe."""
    check_adapter_files(folder, None)
    return Target(base, folder, {"kind": "adapter"}, None)


def _merged_base(folder: Path, found: dict[str, Any], device: str) -> Base:
    return replace(
        stated_base(found),
        path=str(folder),
        revision=None,
        quantization=None,
        chat_template=None,
        eos_token=None,
        template=None,  # written into the template of the merged model
        absorbed=(),
        add_tokens=(),
        device=device,
    )
