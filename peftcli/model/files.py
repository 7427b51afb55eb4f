"""What tells one base model from another, read from its files in milliseconds, without a network."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

INPUTS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight")
"""Ends of the names that architectures give to the embedding."""
UNSAID = ("_name_or_path", "_commit_hash", "transformers_version")
"""Keys of a config.json that say where it lay and who wrote it, and nothing of the model."""
PER_BLOCK = 32
"""Matrices sampled of one block at most; a mixture of experts has hundreds."""
COLUMNS = 4096
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class BaseFacts:
    """What the files of a base model say; None for what is not here to be read.

    Attributes:
        config_sha256: of what config.json says of the model; white space and the writer's version aside.
        weights_sha256: over a few rows of its embedding, its output layer and its first, a middle and its last block.
        embedding_rows: number of token ids that the model has a row for.
        commit: of the Hub, None for a local folder.
    """

    config_sha256: str | None = None
    weights_sha256: str | None = None
    embedding_rows: int | None = None
    commit: str | None = None


def base_facts(path: str, revision: str | None) -> BaseFacts:
    """Read the facts of a base model.

    Args:
        path: local folder or Hub id; of the Hub only files that were downloaded already are read.
    """
    folder = local_folder(path, revision)
    if folder is None:
        return BaseFacts()
    commit = None if Path(path).is_dir() else folder.name
    try:
        tensors = _tensors(folder)
        return BaseFacts(_config_hash(folder), _weights_hash(tensors), _embedding_rows(tensors), commit)
    except (
        OSError,
        ValueError,
        KeyError,
        SafetensorError,
    ):  # damaged files, of which loading them says more than could be said here
        return BaseFacts(_config_hash(folder), commit=commit)


def stored_names(path: str, revision: str | None) -> set[str] | None:
    """Names of the tensors in a model's files, None where they are not here or cannot be read."""
    folder = local_folder(path, revision)
    try:
        return None if folder is None else set(_tensors(folder)) or None
    except (OSError, ValueError, KeyError, SafetensorError):  # loading them says more than could be said here
        return None


def local_folder(path: str, revision: str | None) -> Path | None:
    """The folder of a model on this disk, or None for one of the Hub that was never downloaded."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # never downloaded, or no id of the Hub
        return None


def _config_hash(folder: Path) -> str | None:
    """SHA-256 of the model that a folder's config.json describes, None where it has none that can be read."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"), object_hook=_said)
    except (OSError, ValueError):
        return None
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _said(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in UNSAID}


def _tensors(folder: Path) -> dict[str, tuple[Path, list[int]]]:
    """File and shape of each tensor by name; empty where a file of the model is not here."""
    if (folder / INDEX).is_file():
        # Not every *.safetensors: some repositories hold the same weights a second time under other names.
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    else:
        files = [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
    if not all(file.is_file() for file in files):
        return {}
    tensors: dict[str, tuple[Path, list[int]]] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as stream:
            tensors.update((name, (file, stream.get_slice(name).get_shape())) for name in stream.keys())  # noqa: SIM118
    return tensors


def _embedding_rows(tensors: Mapping[str, tuple[Path, list[int]]]) -> int | None:
    for ending in INPUTS:
        for name, (_, shape) in tensors.items():
            if name == ending or name.endswith(f".{ending}"):
                return shape[0]
    return None


def _weights_hash(tensors: Mapping[str, tuple[Path, list[int]]]) -> str | None:
    chosen = sampled_names({name: shape for name, (_, shape) in tensors.items()})
    if not chosen:
        return None
    digest = hashlib.sha256()
    for file in sorted({tensors[name][0] for name in chosen}):
        with safe_open(str(file), framework="pt") as stream:
            for name in (name for name in chosen if tensors[name][0] == file):
                _add_rows(digest, name, stream.get_slice(name))
    return digest.hexdigest()


def sampled_names(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """The matrices that are looked at: those outside of the blocks, and of the first, a middle and the last block.

    All of a block, since a model that was merged with an adapter may differ from its base in one projection only.

    >>> sampled_names({"norm": [4], "head": [9, 4], **{f"h.{block}.q": [4, 4] for block in range(12)}})
    ['head', 'h.0.q', 'h.6.q', 'h.11.q']
    """
    blocks: dict[int, list[str]] = {}
    for name in sorted(name for name, shape in shapes.items() if len(shape) > 1 and min(shape) > 0):
        block = re.search(r"\.(\d+)\.", name)
        blocks.setdefault(int(block[1]) if block else -1, []).append(name)
    numbers = sorted(number for number in blocks if number >= 0)
    wanted = [-1, *sorted({numbers[0], numbers[len(numbers) // 2], numbers[-1]})] if numbers else [-1]
    picked: list[str] = []
    for number in wanted:
        names = blocks.get(number, [])
        picked += names[:: -(-len(names) // PER_BLOCK)] if names else []
    return picked


def _add_rows(digest: Any, name: str, matrix: Any) -> None:
    shape = matrix.get_shape()
    digest.update(json.dumps([name, matrix.get_dtype(), shape]).encode())
    inner = tuple(slice(0, 1) for _ in shape[1:-1])
    for row in sorted({0, shape[0] // 2, shape[0] - 1}):
        part = matrix[(slice(row, row + 1), *inner, slice(0, COLUMNS))]
        digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
