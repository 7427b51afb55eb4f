"""Reads the weights of a base model: hashes, tensors by name, and single embedding rows.

The hashes are read from the files in milliseconds, without a network.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftcli.adapters.module_layout import end_name
from peftcli.adapters.quantized import dequantized_weight, is_quantized_layer
from peftcli.data.checks import EmbeddingRows
from peftcli.errors import MachineError
from peftcli.plan.plan import Base

INPUTS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight")
"""Suffixes of the embedding's name in various architectures."""
UNSAID = ("_name_or_path", "_commit_hash", "transformers_version")
"""Keys of a config.json about its path and writer, not about the model."""
PER_BLOCK = 32
"""Maximum number of matrices hashed per block; a mixture of experts has hundreds."""
COLUMNS = 4096
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

Source = Callable[[str], Tensor]
"""Returns the base's tensor with a given name."""

OUTPUTS = ("lm_head.weight", "embed_out.weight", "output.weight")
"""Suffixes of the output layer's name in various architectures; a tied one has no tensor."""
SAMPLE_ROWS = 1000


@contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """A safetensors file, opened for reading.

    Raises:
        MachineError: it is cut off or damaged.
    """
    try:
        with safe_open(str(file), framework="pt") as stream:
            yield stream
    except (FileNotFoundError, PermissionError):
        raise
    except (SafetensorError, OSError) as problem:  # also a folder of that name, or a faulty disk
        raise damaged_weights(file, problem) from problem


def damaged_weights(file: Path, problem: Exception) -> MachineError:
    """The error for a weights file that cannot be read."""
    reason = " ".join(str(problem).split())
    return MachineError(
        f"{file}: this file is cut off or damaged ({reason}; it has {file.stat().st_size:,} bytes); download or copy "
        "it again"
    )


def weights_damage(folder: Path) -> str | None:
    """What is wrong with the safetensors files of a model, None where they can be read."""
    try:
        wrong = next((file for file in _weight_files(folder) if not file.is_file()), None)
        if wrong is not None:
            return f"{wrong}: {'a folder, not a file' if wrong.is_dir() else 'no such file'}; download or copy it again"
        _tensors(folder)
    except MachineError as problem:
        return str(problem)
    except (OSError, ValueError, KeyError) as problem:
        return f"{folder}: {problem}"
    return None


def embedding_rows(path: str, revision: str | None, ids: Sequence[int]) -> EmbeddingRows | None:
    """Rows of the output matrix, and an even sample of other rows.

    Args:
        path: local folder or Hub id; for the Hub, only files in the cache are read.
        ids: token ids; those outside the matrix are omitted.

    Returns:
        None if the files are not local, or have no such matrix under a known name.
    """
    folder = local_folder(path, revision)
    found = _find(folder) if folder is not None else None
    if found is None:
        return None
    file, name = found
    with open_weights(file) as stream:
        matrix = stream.get_slice(name)
        count = matrix.get_shape()[0]
        wanted = [token for token in ids if token < count]
        step = max(1, count // SAMPLE_ROWS)
        others = [token for token in range(0, count, step) if token not in set(wanted)]
        rows, sample = (
            np.concatenate([matrix[token : token + 1].float().numpy() for token in tokens])
            if tokens
            else np.zeros((0, matrix.get_shape()[1]), np.float32)
            for tokens in (wanted, others)
        )
    return EmbeddingRows(wanted, rows, sample)


@dataclass(frozen=True)
class BaseFacts:
    """Data from the files of a base model; None for what cannot be read locally.

    Attributes:
        config_sha256: of config.json without paths, formatting and the writer's version.
        weights_sha256: over a few rows of the embedding, the output layer and the first, a middle and the last block.
        embedding_rows: number of embedding rows.
        commit: on the Hub, None for a local folder.
    """

    config_sha256: str | None = None
    weights_sha256: str | None = None
    embedding_rows: int | None = None
    commit: str | None = None


def base_facts(path: str, revision: str | None) -> BaseFacts:
    """Read the facts of a base model.

    Args:
        path: local folder or Hub id; for the Hub, only files in the cache are read.
    """
    folder = local_folder(path, revision)
    if folder is None:
        return BaseFacts()
    commit = None if Path(path).is_dir() else folder.name
    try:
        tensors = _tensors(folder)
        return BaseFacts(_config_hash(folder), _weights_hash(tensors), _embedding_rows(tensors), commit)
    except (OSError, ValueError, KeyError, MachineError):  # damaged files; loading them gives a better message
        return BaseFacts(_config_hash(folder), commit=commit)


def stored_names(path: str, revision: str | None) -> set[str] | None:
    """Names of the tensors in a model's files; None if they are not local or unreadable."""
    folder = local_folder(path, revision)
    try:
        return None if folder is None else set(_tensors(folder)) or None
    except (OSError, ValueError, KeyError, MachineError):  # loading them gives a better message
        return None


def local_folder(path: str, revision: str | None) -> Path | None:
    """The local folder of a model; None if it was never downloaded from the Hub."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # never downloaded, or not a Hub id
        return None


def _config_hash(folder: Path) -> str | None:
    """SHA-256 of the model that a folder's config.json describes; None without a readable one."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"), object_hook=_said)
    except (OSError, ValueError):
        return None
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _said(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in UNSAID}


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, there or not; empty if it names none."""
    if (folder / INDEX).is_file():
        # Not every *.safetensors: some repositories contain the same weights again under other names.
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    return [folder / SINGLE] if (folder / SINGLE).exists() else sorted(folder.glob("*.safetensors"))


def _tensors(folder: Path) -> dict[str, tuple[Path, list[int]]]:
    """File and shape of each tensor by name; empty if a file of the model is missing."""
    files = _weight_files(folder)
    if not all(file.is_file() for file in files):
        return {}
    tensors: dict[str, tuple[Path, list[int]]] = {}
    for file in files:
        with open_weights(file) as stream:
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
        with open_weights(file) as stream:
            for name in (name for name in chosen if tensors[name][0] == file):
                _add_rows(digest, name, stream.get_slice(name))
    return digest.hexdigest()


def sampled_names(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """The matrices that are hashed: those outside the blocks, and those of the first, a middle and the last block.

    Blocks are hashed in full, because a merged model may differ from its base in only one projection.

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


def loaded_weights(model: PreTrainedModel) -> Source:
    """The weights of a loaded base; those of quantized layers are dequantized."""
    modules = dict(model.named_modules())
    state = model.state_dict(keep_vars=True)
    turned = turned_layers(model)

    def read(name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and is_quantized_layer(modules.get(owner)):
            unpacked = dequantized_weight(modules[owner])
            # GPT-2's layers store their weight transposed; quantized they are ordinary linear layers.
            return unpacked.t() if owner in turned else unpacked
        return Tensor.detach(state[name])

    return read


def end_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the embedding and the output layer; empty if the model has no output layer."""
    embedding, output = end_name(model, "input"), end_name(model, "output")
    return (embedding, output) if embedding is not None and output is not None else ()


def turned_layers(model: PreTrainedModel) -> set[str]:
    """Layers whose file stores their weight transposed, as GPT-2's does; quantized they are ordinary linear layers."""
    # Read from the structure without adapter and quantization, which both replace modules.
    return {name for name, module in skeleton_of(model).named_modules() if isinstance(module, Conv1D)}


def original_weights(base: Base, model: PreTrainedModel) -> Source:
    """The weights in the base's safetensors files, read one by one.

    Args:
        base: the base whose files are read.
        model: the loaded base; if its output layer has no tensor, the embedding's is used.

    Raises:
        MachineError: a weight is missing.
    """
    folder = Path(base.path)
    if not folder.is_dir():
        folder = Path(snapshot_download(base.path, revision=base.revision, allow_patterns=["*.safetensors*"]))
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open_weights(file) as stream:
            files.update(dict.fromkeys(stream.keys(), file))

    ends = end_names(model)
    tied = {f"{ends[1]}.weight": f"{ends[0]}.weight"} if ends else {}

    def read(name: str) -> Tensor:
        name = name if name in files else tied.get(name, name)
        if name not in files:
            raise MachineError(f"{base.path}: its files have no weight {name}; merge with --into dequantized")
        with open_weights(files[name]) as stream:
            tensor: Tensor = stream.get_tensor(name)
        return tensor

    return read


def skeleton_of(base: PreTrainedModel) -> PreTrainedModel:
    """The model without quantization, on the meta device."""
    config = type(base.config).from_dict(base.config.to_dict())
    config.quantization_config = None
    del config.quantization_config
    with torch.device("meta"):
        skeleton: PreTrainedModel = type(base)._from_config(config)
    return skeleton


def _find(folder: Path) -> tuple[Path, str] | None:
    names: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open_weights(file) as stream:
            names.update(dict.fromkeys(stream.keys(), file))
    for ending in (*OUTPUTS, *INPUTS):
        for name, file in names.items():
            if name == ending or name.endswith(f".{ending}"):
                return file, name
    return None
