"""The token cache: prepared rows on disk, keyed by a hash of everything they depend on."""

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
"""Maximum size of the cache; the least recently used data are removed first."""
PRIVATE = 0o700
"""Permissions of the folder: training data are private on a shared machine."""
VERSION = 4
"""Increase it with every change that gives different rows, reasons or warnings for the same sources."""


def load_or_tokenize(
    sources: Sequence[tuple[Source, SourceSection]],
    tokenizer: PreTrainedTokenizerBase,
    request: DataRequest,
    progress: Progress,
) -> tuple[Store, bool]:
    """The tokenized rows of some sources, from the cache or built now, and whether they were built."""
    join_sources = [
        (open_source(join, key=f"dataset.join[{number}]"), join) for number, join in enumerate(request.dataset.join)
    ]
    key = _key(sources, join_sources, tokenizer, request)
    root = cache_root(None) / "data"
    built = False

    def build(folder: Path) -> None:
        nonlocal built
        built = True
        joins = [Join(source, section.on) for source, section in join_sources]
        run_pipeline(folder, sources, joins, tokenizer, request, progress)

    if root.is_dir() and not (root / key).is_dir():
        forget_unused(root, CACHE_BYTES)
    folder = built_once(root, key, build, mode=PRIVATE, note=progress.note)
    mark_used(folder)
    return Store.open(folder), built


def _key(
    sources: Sequence[tuple[Source, SourceSection]],
    joins: Sequence[tuple[Source, Any]],
    tokenizer: PreTrainedTokenizerBase,
    request: DataRequest,
) -> str:
    """Hexadecimal hash of everything that the result of one pass depends on."""
    keys = ("format", "text", "prompt", "completion", "columns", "where", "ignore_columns", "weight")
    parts = {
        "version": [VERSION, transformers.__version__, tokenizers.__version__],
        "sources": [
            [source.fingerprint(), source.name, section.model_dump(include=set(keys))] for source, section in sources
        ],
        "joins": [[source.fingerprint(), source.name, list(section.on)] for source, section in joins],
        "split": [request.dataset.split.stratify, request.dataset.split.group],
        "rule": [request.rule.completion_only, request.rule.assistant_only, request.rule.max_length],
        "too_long": request.dataset.too_long,
        "task": [request.rule.task, request.rule.problem_type, request.dataset.labels],
        "limit": request.limit,
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over everything in a tokenizer that affects the ids of a text."""
    if isinstance(tokenizer, ImageProcessor):
        return tokenizer.fingerprint()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # truncation and padding set by an earlier call are not properties of the tokenizer
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
