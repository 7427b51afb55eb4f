"""The token cache: prepared rows on disk under a hash of everything they depend on."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from peftcli.cache import built_once, cache_root, forget_unused, mark_used
from peftcli.data.image_processor import ImageProcessor
from peftcli.data.join import Join
from peftcli.data.pipeline import DataRequest, run_pipeline
from peftcli.data.readers.open import open_source
from peftcli.data.rows import Source
from peftcli.data.store import Store
from peftcli.progress import Progress
from peftcli.recipe.schema import SourceSection

CACHE_BYTES = 20 * 2**30
"""Prepared data beyond this are removed from the cache, the oldest first."""
PRIVATE = 0o700
"""Of the folder: what people train on is nobody else's business on a shared machine."""
VERSION = 1
"""Raised with every change that makes other rows of the same sources."""


def load_or_tokenize(
    sources: Sequence[tuple[Source, SourceSection]],
    tokenizer: PreTrainedTokenizerBase,
    asked: DataRequest,
    progress: Progress,
) -> tuple[Store, bool]:
    """The rows of some sources, tokenized, from the cache or made now; and whether they were made."""
    join_sources = [
        (open_source(join, key=f"dataset.join[{number}]"), join) for number, join in enumerate(asked.dataset.join)
    ]
    key = _key(sources, join_sources, tokenizer, asked)
    root = cache_root(None) / "data"
    made = False

    def build(folder: Path) -> None:
        nonlocal made
        made = True
        joins = [Join(source, section.on) for source, section in join_sources]
        run_pipeline(folder, sources, joins, tokenizer, asked, progress)

    if root.is_dir() and not (root / key).is_dir():
        forget_unused(root, CACHE_BYTES)
    folder = built_once(root, key, build, mode=PRIVATE, note=progress.note)
    mark_used(folder)
    return Store.open(folder), made


def _key(
    sources: Sequence[tuple[Source, SourceSection]],
    joins: Sequence[tuple[Source, Any]],
    tokenizer: PreTrainedTokenizerBase,
    asked: DataRequest,
) -> str:
    """Hexadecimal name of what one pass makes: all that it depends on, hashed."""
    reading = ("format", "text", "prompt", "completion", "columns", "weight")
    parts = {
        "version": [VERSION, transformers.__version__, tokenizers.__version__],
        "sources": [
            [source.fingerprint(), source.name, section.model_dump(include=set(reading))] for source, section in sources
        ],
        "joins": [[source.fingerprint(), source.name, list(section.on)] for source, section in joins],
        "split": [asked.dataset.split.stratify, asked.dataset.split.group],
        "rule": [asked.rule.completion_only, asked.rule.assistant_only, asked.rule.max_length],
        "too_long": asked.dataset.too_long,
        "task": [asked.rule.task, asked.rule.problem_type, asked.dataset.labels],
        "limit": asked.limit,
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over all of a tokenizer that decides which ids a text gets."""
    if isinstance(tokenizer, ImageProcessor):
        return tokenizer.fingerprint()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # a cut or a padding that an earlier call has set is no property of the tokenizer
        backend.no_truncation()
        backend.no_padding()
    parts = [
        type(tokenizer).__name__,
        backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        bool(tokenizer.split_special_tokens),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
