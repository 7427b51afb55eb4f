"""How many prompts are answered at once, and what is said of the time that they take."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peftcli.errors import MemoryExhausted
from peftcli.model import expected_time, generation
from peftcli.model.expected_time import ExpectedTime
from peftcli.model.generation import Decoding, cache_bytes, generate_answers, rows_with_room
from peftcli.model.oom import ShrinkingBatches
from peftcli.progress import Silent

LLAMA_8B = SimpleNamespace(
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, hidden_size=4096, head_dim=128
)
GPU = torch.device("cuda", 0)


class Heard(Silent):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def model_of(config: Any) -> Any:
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config), dtype=torch.float16)


def test_a_gpu_answers_as_many_rows_as_it_has_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_bytes(LLAMA_8B, 2) == 131_072
    free = 8 * 2**30
    monkeypatch.setattr(generation, "free_bytes", lambda device: free)
    whole = model_of(LLAMA_8B)
    # 0.6 of 8 GiB hold 39,321 tokens of 128 KiB.
    assert rows_with_room(64, 512, whole, GPU) == 64
    assert rows_with_room(64, 1024, whole, GPU) == 38
    assert rows_with_room(64, 100_000, whole, GPU) == 1
    assert rows_with_room(64, 1024, whole, GPU, in_step=True) == 64
    assert rows_with_room(64, 1024, model_of(SimpleNamespace()), GPU) == 64
    free = 2**30
    assert rows_with_room(64, 512, whole, GPU) == 9
    assert rows_with_room(64, 512, whole, torch.device("cpu")) == 64


def test_the_prompts_of_a_batch_are_bounded_by_the_room_for_them(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    asked, sizes = [], []

    def room(rows: int, longest: int, *more: Any, **given: Any) -> int:
        asked.append((rows, longest))
        return 2

    whole = model.generate
    model.generate = lambda **given: sizes.append(len(given["input_ids"])) or whole(**given)
    monkeypatch.setattr(generation, "rows_with_room", room)
    prompts = [[5] * length for length in (3, 7, 4, 6, 5)]
    made = generate_answers(
        model,
        tokenizer,
        prompts,
        stop_ids=frozenset(),
        decoding=Decoding(2),
        batch_rows=64,
        progress=Silent(),
        what="answers",
    )
    assert len(made) == 5 and sizes == [2, 2, 1]
    assert asked == [(64, 9), (64, 7), (64, 5)]


def test_64_rows_are_halved_down_to_one() -> None:
    fitting = ShrinkingBatches(64, "answers", Silent())

    def work() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for left in (32, 16, 8, 4, 2, 1):
        assert fitting.attempt(fitting.rows, torch.device("cpu"), work) is None and fitting.rows == left
    with pytest.raises(MemoryExhausted, match="answers: 1 rows at once do not fit"):
        fitting.attempt(1, torch.device("cpu"), work)


def test_the_first_batch_tells_how_long_all_take(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((100.0, 130.0))
    monkeypatch.setattr(expected_time.time, "monotonic", lambda: next(clock))
    heard = Heard()
    expected = ExpectedTime("base: answers", 500, heard, least_seconds=60.0)
    expected.after(64, 64 / 500)
    expected.after(128, 128 / 500)
    assert heard.notes == ["  base: answers: the first 64 of 500 rows took 30s, so all take at most about 3m 54s"]
    clock = iter((0.0, 5.0))
    ExpectedTime("base: answers", 500, heard, least_seconds=60.0).after(64, 64 / 500)
    assert len(heard.notes) == 1
