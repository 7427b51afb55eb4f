"""Text to token ids: whole batches at once, on all cores; and the ids that end an answer.

A chat template is a program that came with somebody's model, so rendering has a time limit.
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
"""For a chat of two turns; a template writes it in a thousandth of that."""
BATCH_SECONDS = 120.0
"""For a batch of rows."""


class BackgroundEncoder:
    """Encodes on a thread of its own: a tokenizer written in Rust leaves Python free for the rows that come next."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._thread = ThreadPoolExecutor(1, "encode") if rust_core(tokenizer) is not None else None

    def start(self, work: Callable[..., T], *given: Any) -> Callable[[], T]:
        """Begin a piece of work.

        Returns:
            What waits for the work and gives what it made, or raises what it raised.
        """
        if self._thread is None:  # a tokenizer written in Python is not meant for several threads
            made = work(*given)
            return lambda: made
        return self._thread.submit(work, *given).result


def rust_core(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizer's core of the `tokenizers` package, without limits of length; None where a call goes around it."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None or tokenizer.split_special_tokens:
        return None
    # Changed only where it must be: a core that another thread works with cannot be changed.
    if core.truncation is not None:
        core.no_truncation()
    if core.padding is not None:
        core.no_padding()
    return core


def encode(
    texts: Sequence[str] | Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, *, special: bool = True
) -> list[list[int]]:
    """Ids of each text, without any cut or padding; equal to calling the tokenizer.

    Args:
        texts: single texts or, all of them, pairs of texts.
        special: let the tokenizer add its own beginning and end.
    """
    core = rust_core(tokenizer)
    if core is None:
        return list(tokenizer(list(texts), add_special_tokens=special)["input_ids"])
    # Without character offsets, which cost a third of the time; it runs on all cores.
    return [one.ids for one in core.encode_batch_fast(list(texts), add_special_tokens=special)]


def encode_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids that an answer goes on from: without the end token that some tokenizers write by themselves."""
    encoded = encode(prompts, tokenizer)
    return [ids[:-1] for ids in encoded] if writes_end(tokenizer) else encoded


def writes_end(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its end token behind every text by itself."""
    probe = tokenizer("a")["input_ids"]
    return tokenizer.eos_token_id is not None and bool(probe) and probe[-1] == tokenizer.eos_token_id


def with_end(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts, each with the end token behind it where it lacks one and the tokenizer does not write it."""
    end = tokenizer.eos_token
    if end is None or writes_end(tokenizer):
        return list(texts)
    return [text if text.endswith(end) else text + end for text in texts]


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids on which an answer ends: the tokenizer's end token and, where it has one, its template's end of turn.

    Raises:
        DataError: the chat template does not end its work.
    """
    ends = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            with template_time_limit(PROBE_SECONDS):
                ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
        except TemplateError:  # a template for another purpose; rows that need it are refused where they are read
            ids = []
        special = set(tokenizer.all_special_ids)
        last = next((token for token in reversed(ids) if token in special), None)
        text = tokenizer.decode(ids[ids.index(last) + 1 :]) if last is not None else "b"
        if last is not None and not text.strip():
            ends.add(last)
    return frozenset(ends)


def flatten(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """All ids in one line, and the length of each row.

    >>> flatten([[5, 6], [], [7]])
    (array([5, 6, 7], dtype=int32), array([2, 0, 1]))
    """
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths


def as_lists(flat: NDArray[np.int32] | NDArray[np.float32], lengths: NDArray[np.int64]) -> pa.LargeListArray:
    """Ids or numbers in one line as an Arrow column of lists; 25 times faster than from Python lists."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    kind = pa.float32() if flat.dtype.kind == "f" else pa.int32()
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(flat, kind))


@contextmanager
def template_time_limit(seconds: float) -> Iterator[None]:
    """End the block with an error when it takes longer; only the main thread can hear the clock.

    Raises:
        DataError: the time is over.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    said = DataError(
        f"the chat template was still at work after {seconds:g} s; set model.chat_template to one without endless loops"
    )
    rung = False

    def ring(number: int, frame: FrameType | None) -> None:
        nonlocal rung
        rung = True
        raise said

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Exception:
        if rung:  # Jinja rewrites what is raised in a template, and stumbles over an error between two lines
            raise said from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
