"""Single rows of a model's output embedding, read from its files without loading the model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open

from peftcli.data.checks import EmbeddingRows
from peftcli.model.files import INPUTS, local_folder

OUTPUTS = ("lm_head.weight", "embed_out.weight", "output.weight")
"""Ends of the names that architectures give to the output layer; a tied one has no tensor of its own."""
SAMPLE_ROWS = 1000


def embedding_rows(path: str, revision: str | None, ids: Sequence[int]) -> EmbeddingRows | None:
    """Rows of the matrix that writes tokens, and an even sample of others.

    Args:
        path: local folder or Hub id; of the Hub only files that were downloaded already are read.
        ids: token ids; those beyond the matrix are left out.

    Returns:
        None where the files are not here, or hold no such matrix under a known name.
    """
    folder = local_folder(path, revision)
    found = _find(folder) if folder is not None else None
    if found is None:
        return None
    file, name = found
    with safe_open(str(file), framework="pt") as stream:
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


def _find(folder: Path) -> tuple[Path, str] | None:
    names: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as stream:
            names.update(dict.fromkeys(stream.keys(), file))
    for ending in (*OUTPUTS, *INPUTS):
        for name, file in names.items():
            if name == ending or name.endswith(f".{ending}"):
                return file, name
    return None
