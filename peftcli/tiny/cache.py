"""Folders that are built once: found by a hash of what determines them, whole or absent."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from filelock import FileLock
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from peftcli.errors import MachineError
from peftcli.tiny.tokenizer import asset


def cache_root(cache: Path | None) -> Path:
    """The folder given, else `$PEFTCLI_CACHE`, else `~/.cache/peftcli`."""
    if cache is not None:
        return cache
    named = os.environ.get("PEFTCLI_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "peftcli"


def content_hash(*parts: object) -> str:
    """Twelve hex digits over the shipped text and anything that JSON can write."""
    digest = hashlib.sha256(asset("corpus.txt") + b"\0" + asset("chats.jsonl"))
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:12]


def shape_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The values of a config that determine the weights, for `content_hash`."""
    named = {"transformers_version", "_name_or_path", "_commit_hash"}
    return {key: value for key, value in config.to_dict().items() if key not in named}


def built_once(root: Path, name: str, build: Callable[[Path], None]) -> Path:
    """The folder `root/name`, which `build` fills at first use.

    Two processes may ask at once: one builds, the other waits for it.

    Args:
        build: writes the files into the empty folder given.

    Raises:
        MachineError: the cache cannot be written.
    """
    folder = root / name
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):
            if not folder.is_dir():
                _build(root, folder, build)
    except OSError as error:
        raise MachineError(
            f"{folder} could not be written: {error}; free some space there, "
            "or name another folder in the environment variable PEFTCLI_CACHE"
        ) from error
    return folder


def _build(root: Path, folder: Path, build: Callable[[Path], None]) -> None:
    # Only the holder of the lock stages, so what lies here was left by a process that was killed.
    for left in root.glob(f".{folder.name}.stage-*"):
        shutil.rmtree(left, ignore_errors=True)
    stage = Path(tempfile.mkdtemp(dir=root, prefix=f".{folder.name}.stage-"))
    try:
        build(stage)
        stage.chmod(0o755)
        os.rename(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def write_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    card: str,
) -> None:
    """Write a model in Hugging Face format with its tokenizer and model card, and show no progress bar."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    if model.can_generate():
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ).save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")
