"""What `eval`, `merge` and `generate` are pointed at: a run folder, an adapter, a merged model or a base."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftcli.errors import MachineError
from peftcli.model.adapter import base_of, read_identity
from peftcli.model.load import load_adapter, load_base, load_tokenizer
from peftcli.plan.plan import Base
from peftcli.rundir import RunDir


@dataclass(frozen=True)
class Target:
    """A model to use.

    Attributes:
        base: the weights to load.
        adapter: folder of the adapter on it, None for a merged model or a base.
        identity: what training left in the folder: format, templates, stop ids; empty for a plain base.
        run: the run that it belongs to, None where it stands alone.
    """

    base: Base
    adapter: Path | None
    identity: dict[str, Any]
    run: RunDir | None

    @property
    def kind(self) -> str:
        """`adapter`, `merged` or `base`."""
        return str(self.identity.get("kind", "base"))

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the model, in evaluation mode, and its tokenizer."""
        model = load_base(self.base)
        tokenizer = load_tokenizer(self.base.tokenizer, None if self.adapter is None else str(self.adapter))
        if self.adapter is not None:
            model = load_adapter(model, self.adapter)
        model.eval()
        return model, tokenizer


def open_target(path: str, base: Base | None = None) -> Target:
    """Find out what a path is.

    Args:
        path: of a run folder, an adapter folder or a merged model; or the name of a base.
        base: the base of a recipe, for a target that is no folder of ours.

    Raises:
        MachineError: nothing usable is there.
    """
    folder = Path(path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (folder / "recipe.yaml").is_file():
        run = RunDir(folder)
        found = read_identity(run.adapter)
        if found is None:
            raise MachineError(f"{path}: this run holds no adapter yet; `peftcli train` makes one")
        return Target(base_of(found, device), run.adapter, found, run)
    found = read_identity(folder) if folder.is_dir() else None
    run_of = RunDir(folder.parent) if (folder.parent / "recipe.yaml").is_file() else None
    if found is not None and found["kind"] == "adapter":
        return Target(base_of(found, device), folder, found, run_of)
    if found is not None:
        return Target(_merged_base(folder, found, device), None, found, run_of)
    if base is not None:
        return Target(base, None, {}, None)
    if folder.is_dir():
        raise MachineError(
            f"{path}: neither a run folder (recipe.yaml) nor an adapter or merged model of ours (peftcli.json); "
            "a base model needs --recipe"
        )
    raise MachineError(f"{path}: no such folder; a base model needs --recipe")


def _merged_base(folder: Path, found: dict[str, Any], device: str) -> Base:
    stated = dict(found["base"])
    stated.pop("config_sha256")
    stated |= {
        "path": str(folder),
        "revision": None,
        "quantization": None,
        "chat_template": None,
        "eos_token": None,
        "device": device,
    }
    return Base(**stated)
