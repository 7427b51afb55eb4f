"""Encodes batches of texts to token ids on all cores, and finds the ids that end an answer.

A chat template is untrusted code that comes with a model, so rendering has a time limit.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from peftcli.errors import DataError

T = TypeVar("T")

PROBE_SECONDS = 10.0
"""Time limit for a chat of two turns; a normal template needs a thousandth of that."""
BATCH_SECONDS = 120.0
"""Time limit for a batch of rows."""


class BackgroundEncoder:
    """Encodes in a background thread; a tokenizer in Rust releases the GIL, so the next rows can be read meanwhile."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._thread = ThreadPoolExecutor(1, "encode") if rust_core(tokenizer) is not None else None

    def start(self, work: Callable[..., T], *given: Any) -> Callable[[], T]:
        """Start a function in the background.

        Returns:
            A function that waits and returns the result, or raises the exception.
        """
        if self._thread is None:  # tokenizers in Python are not thread-safe
            result = work(*given)
            return lambda: result
        return self._thread.submit(work, *given).result


def rust_core(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The `tokenizers` backend without truncation and padding; None if the tokenizer does not use one."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None or tokenizer.split_special_tokens:
        return None
    # Only changed if necessary: a backend that is in use by another thread cannot be changed.
    if core.truncation is not None:
        core.no_truncation()
    if core.padding is not None:
        core.no_padding()
    return core


def encode(
    texts: Sequence[str] | Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, *, special: bool = True
) -> list[list[int]]:
    """Ids of each text without truncation or padding; equal to calling the tokenizer.

    Args:
        texts: all single texts, or all text pairs.
        special: add the tokenizer's special tokens.
    """
    core = rust_core(tokenizer)
    if core is None:
        return list(tokenizer(list(texts), add_special_tokens=special)["input_ids"])
    # Without character offsets, which take a third of the time; runs on all cores.
    return [one.ids for one in core.encode_batch_fast(list(texts), add_special_tokens=special)]


def encode_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of prompts for generation, without the end token that some tokenizers append."""
    encoded = encode(prompts, tokenizer)
    return [ids[:-1] for ids in encoded] if writes_end(tokenizer) else encoded


def writes_end(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer appends its end token to every text."""
    probe = tokenizer("a")["input_ids"]
    return tokenizer.eos_token_id is not None and bool(probe) and probe[-1] == tokenizer.eos_token_id


def with_end(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts with the end token appended, unless they end with it or the tokenizer appends it."""
    end = tokenizer.eos_token
    if end is None or writes_end(tokenizer):
        return list(texts)
    return [text if text.endswith(end) else text + end for text in texts]


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end an answer: the tokenizer's end token, and the chat template's end-of-turn token if it has one.

    Raises:
        DataError: the chat template exceeds the time limit.
    """
    ends = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            with template_time_limit(PROBE_SECONDS):
                ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
        except TemplateError:  # a template for another purpose; rows that need it are rejected when they are read
            ids = []
        special = set(tokenizer.all_special_ids)
        place = next((place for place in range(len(ids) - 1, -1, -1) if ids[place] in special), None)
        # The user's turn may end with the same token, so its first place is not the end of the answer.
        if place is not None and not tokenizer.decode(ids[place + 1 :]).strip():
            ends.add(ids[place])
    return frozenset(ends)


def flatten(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The concatenated ids of all rows, and the length of each row.

    >>> flatten([[5, 6], [], [7]])
    (array([5, 6, 7], dtype=int32), array([2, 0, 1]))
    """
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths


def as_lists(flat: NDArray[np.int32] | NDArray[np.float32], lengths: NDArray[np.int64]) -> pa.LargeListArray:
    """Concatenated ids or numbers as an Arrow column of lists; 25 times faster than from Python lists."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    kind = pa.float32() if flat.dtype.kind == "f" else pa.int32()
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(flat, kind))


@contextmanager
def template_time_limit(seconds: float) -> Iterator[None]:
    """Raise an error if the block takes longer; only works in the main thread, which receives the signal.

    Raises:
        DataError: the time limit is exceeded.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    error = DataError(
        f"the chat template was still running after {seconds:g} s; it has an endless loop, or renders far more text "
        "than the chats contain: fix the template, or set model.chat_template to another one"
    )
    expired = False

    def expire(number: int, frame: FrameType | None) -> None:
        nonlocal expired
        expired = True
        raise error

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Exception:
        if expired:  # Jinja rewrites exceptions in a template, and fails for one between two lines
            raise error from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
