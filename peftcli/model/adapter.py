"""The adapter folder: PEFT's files, the tokenizer, and `peftcli.json`, which makes it enough by itself."""

import hashlib
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from peftcli.data.prepare import PreparedData
from peftcli.errors import Diverged, MachineError
from peftcli.plan.plan import Base, Plan
from peftcli.rundir import read_json, write_json
from peftcli.tiny.build import NAMES as TINY_NAMES
from peftcli.tiny.build import tiny_model

IDENTITY = "peftcli.json"


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
    write_json(staging / IDENTITY, identity(plan, data, "adapter"))
    replace_folder(staging, folder)


def sort_targets(model: PeftModel) -> None:
    """Give the targets in the saved configuration one order, so that equal runs write equal files."""
    for config in model.peft_config.values():
        if isinstance(config.target_modules, (set, list, tuple)):
            config.target_modules = sorted(config.target_modules)


def write_companions(model: Any, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], folder: Path) -> None:
    """Write the tokenizer with its chat template, and a generation config that stops where training did."""
    tokenizer.save_pretrained(str(folder))
    config = GenerationConfig.from_dict(model.generation_config.to_dict())
    config.eos_token_id = sorted(stop_ids) or None
    config.pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(str(folder))


def identity(plan: Plan, data: PreparedData, kind: str) -> dict[str, Any]:
    """What somebody who has only the folder must know."""
    base = asdict(plan.base)
    base["config_sha256"] = config_hash(plan.base)
    return {
        "schema": 1,
        "kind": kind,
        "smoke": plan.smoke,
        "task": plan.task,
        "base": base,
        "format": data.format,
        "prompt": data.prompt,
        "stop_ids": sorted(data.stop_ids),
        "max_length": plan.labels.max_length,
        "evaluation_batch": plan.evaluation_batch,
    }


def read_identity(folder: Path) -> dict[str, Any] | None:
    """`peftcli.json` of a folder, or None where it has none."""
    file = folder / IDENTITY
    return read_json(file) if file.is_file() else None


def base_of(found: dict[str, Any], device: str) -> Base:
    """The base that an identity names, on the device of now.

    Raises:
        MachineError: the base that lies at that path is another one.
    """
    stated = dict(found["base"])
    expected = stated.pop("config_sha256")
    base = replace(Base(**stated), device=device)
    if base.name in TINY_NAMES and not Path(base.path).is_dir():
        base = replace(base, path=str(tiny_model(base.name)))  # made anew where the cache was emptied
    if device == "cpu" and base.dtype == "float16":
        base = replace(base, dtype="float32")
    actual = config_hash(base)
    if expected is not None and actual is not None and expected != actual:
        raise MachineError(
            f"the adapter was trained on a {base.name} whose config.json differs from the one at {base.path}; "
            "give it the base that it was trained on"
        )
    return base


def config_hash(base: Base) -> str | None:
    """SHA-256 of the base's config.json where it is a local folder, else None."""
    file = Path(base.path) / "config.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


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
