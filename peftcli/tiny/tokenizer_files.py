"""The files that a stand-in copies from the real model's folder: the tokenizer and the generation config."""

import hashlib
from pathlib import Path

TOKENIZER_ENDINGS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
NOT_OF_TOKENIZERS = (
    "peftcli.json",
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
)
"""Files with one of these extensions that are not part of the tokenizer."""
VOCABULARIES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")
"""A folder without any of these files has no tokenizer."""


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder contains a tokenizer."""
    return any(any(folder.glob(pattern)) for pattern in VOCABULARIES)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that a tokenizer may consist of, including chat templates, in a fixed order."""
    files = [*folder.iterdir(), *folder.glob("*/*.jinja")]
    return [
        file
        for file in sorted(files)
        if file.is_file() and file.suffix in TOKENIZER_ENDINGS and file.name not in NOT_OF_TOKENIZERS
    ]


def taken_over(folder: Path) -> list[Path]:
    """The files that a stand-in copies from the folder of the real model."""
    generation = folder / "generation_config.json"
    return [*tokenizer_files(folder), *([generation] if generation.is_file() else [])]


def files_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of the files that a stand-in copies."""
    digest = hashlib.sha256()
    for file in taken_over(folder):
        digest.update(f"{file.relative_to(folder)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
