"""The adapter folder: PEFT's files, the tokenizer, and `peftcli.json`, which makes it enough by itself."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from peftcli.data.prepare import PreparedData
from peftcli.errors import Diverged
from peftcli.model.identity import EARLIER, IDENTITY, identity
from peftcli.model.tensors import CONFIG, WEIGHTS
from peftcli.plan.plan import Plan
from peftcli.rundir import write_json


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    data: PreparedData,
    folder: Path,
) -> None:
    """Write the adapter beside its name, then move it there.

    Raises:
        Diverged: a trainable weight is not finite; nothing is written.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise Diverged(f"{name} of the adapter holds values that are not finite, so it was not saved")
    staging = folder.with_name(folder.name + ".staging")
    shutil.rmtree(staging, ignore_errors=True)
    sort_targets(model)
    # Whether embeddings changed is known here: asking the Hub for the base's vocabulary would need a network.
    model.save_pretrained(str(staging), save_embedding_layers=False)
    write_companions(model, tokenizer, data.stop_ids, staging)
    for number, earlier in enumerate(plan.base.absorbed, start=1):
        copy_adapter(Path(earlier), staging / EARLIER / str(number))
    write_json(staging / IDENTITY, identity(plan, data, staging))
    replace_folder(staging, folder)


def copy_adapter(folder: Path, target: Path) -> None:
    """Copy the files of an adapter that decide what it computes."""
    target.mkdir(parents=True)
    for name in (WEIGHTS, CONFIG):
        shutil.copyfile(folder / name, target / name)


def sort_targets(model: PeftModel) -> None:
    """Give the targets in the saved configuration one order, so that equal runs write equal files."""
    for config in model.peft_config.values():
        for name in ("target_modules", "feedforward_modules"):
            if isinstance(getattr(config, name, None), (set, list, tuple)):
                setattr(config, name, sorted(getattr(config, name)))


def write_companions(model: Any, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], folder: Path) -> None:
    """Write the tokenizer with its chat template, and a generation config that stops where training did.

    A model that gives labels has none; its configuration is written instead, which holds their names.
    """
    tokenizer.save_pretrained(str(folder))
    if getattr(model, "generation_config", None) is None:
        if not (folder / "config.json").is_file():
            config = type(model.config).from_dict(model.config.to_dict())
            config.quantization_config = None
            del config.quantization_config
            config.save_pretrained(str(folder))
        return
    config = GenerationConfig.from_dict(model.generation_config.to_dict())
    config.eos_token_id = sorted(stop_ids) or None
    config.pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(str(folder))


def replace_folder(staged: Path, final: Path) -> None:
    """Put a finished folder in the place of another, without a moment in which both are gone for good."""
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(staged, final)
    shutil.rmtree(old, ignore_errors=True)


def folder_bytes(folder: Path, pattern: str) -> int:
    """Bytes of the files of a folder that match."""
    return sum(file.stat().st_size for file in folder.glob(pattern))
