"""The files beside a model's weights that a stand-in takes over as they are: its tokenizer and generation config."""

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
"""Files with such an ending that say nothing of the tokenizer."""
VOCABULARIES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")
"""Without one of these a folder holds no tokenizer."""


def holds_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer can be read from a folder."""
    return any(any(folder.glob(pattern)) for pattern in VOCABULARIES)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that a tokenizer may be read from, its chat templates among them, in a fixed order."""
    files = [*folder.iterdir(), *folder.glob("*/*.jinja")]
    return [
        file
        for file in sorted(files)
        if file.is_file() and file.suffix in TOKENIZER_ENDINGS and file.name not in NOT_OF_TOKENIZERS
    ]


def taken_over(folder: Path) -> list[Path]:
    """What a stand-in copies from the folder of the model that it stands in for."""
    generation = folder / "generation_config.json"
    return [*tokenizer_files(folder), *([generation] if generation.is_file() else [])]


def files_digest(folder: Path) -> str:
    """SHA-256 over names and bytes of what a stand-in copies."""
    digest = hashlib.sha256()
    for file in taken_over(folder):
        digest.update(f"{file.relative_to(folder)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
