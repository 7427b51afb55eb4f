"""Where a merged model is loaded, from the memory that is free."""

import pytest
import torch

from peftcli.errors import MemoryExhausted
from peftcli.merge.placement import (
    FEW_ROWS,
    FreeMemory,
    check_memory,
    choose_placements,
    measure_free_memory,
    placement_note,
)

GIB = 2**30
T4 = int(14.74 * GIB)
LLAMA_8B = 16_060_522_496
"""Bytes of Llama-3.1-8B in 16 bits."""
KAGGLE_RAM, COLAB_RAM = 29 * GIB, 11 * GIB


@pytest.mark.parametrize(
    ("weights", "gpus", "ram", "expected"),
    [
        (13_476_839_424, (T4,), COLAB_RAM, "the GPU"),  # a 7B
        (LLAMA_8B, (T4, T4), KAGGLE_RAM, "2 GPUs"),
        (LLAMA_8B, (T4,), COLAB_RAM, "the GPU and RAM"),
        (LLAMA_8B, (int(0.1 * GIB),), KAGGLE_RAM, "the GPU and RAM"),
        (LLAMA_8B, (), KAGGLE_RAM, "the CPU"),
        (2 * LLAMA_8B, (T4,), COLAB_RAM, None),
    ],
)
def test_the_fastest_place_with_room_is_taken(
    weights: int, gpus: tuple[int, ...], ram: int, expected: str | None
) -> None:
    found = choose_placements(weights, FreeMemory(gpus, ram))
    assert (found[0].name if found else None) == expected
    for place in found:
        assert place.max_memory is None or sum(place.max_memory.values()) >= weights
        assert (place.rows == FEW_ROWS) == ("RAM" in place.name or (place.name == "the CPU" and bool(gpus)))


def test_two_gpus_are_filled_before_ram_and_the_cpu_comes_last() -> None:
    found = choose_placements(LLAMA_8B, FreeMemory((T4, T4), KAGGLE_RAM))
    assert [place.name for place in found] == ["2 GPUs", "2 GPUs and RAM", "the CPU"]
    assert found[0].max_memory is not None and set(found[0].max_memory) == {0, 1}
    assert [place.offloads for place in found] == [False, True, False]


def test_what_will_happen_is_said_before_the_model_is_loaded() -> None:
    free = FreeMemory((T4,), COLAB_RAM)
    note = placement_note(choose_placements(LLAMA_8B, free)[0], LLAMA_8B, free)
    assert note == (
        "the merged model takes 15.0 GiB, and 14.7 GiB on the GPU and 11.0 GiB of RAM are free: it is compared on the "
        "GPU and RAM, on the outputs for at most 32 rows and without generated answers; the first rows show how long "
        "that takes"
    )
    whole = FreeMemory((2 * T4,), COLAB_RAM)
    assert placement_note(choose_placements(LLAMA_8B, whole)[0], LLAMA_8B, whole) is None


def test_a_merge_without_room_is_refused_before_it_writes() -> None:
    with pytest.raises(MemoryExhausted, match=r"takes 29.9 GiB, more than the 14.7 GiB on the GPU and 11.0 GiB of RAM"):
        check_memory(2 * LLAMA_8B, GIB, FreeMemory((T4,), COLAB_RAM))
    with pytest.raises(MemoryExhausted, match=r"folding .* takes 3.0 GiB of RAM, and 2.0 GiB are free"):
        check_memory(GIB, 3 * GIB, FreeMemory((T4,), 2 * GIB))
    check_memory(LLAMA_8B, 3 * GIB, FreeMemory((T4,), COLAB_RAM))


def test_memory_is_asked_of_every_visible_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {0: 3 * GIB, 1: 14 * GIB}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free[gpu], T4))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: GIB)
    assert measure_free_memory(on_gpu=True).gpus == (3 * GIB, 14 * GIB)
    assert measure_free_memory(on_gpu=True, with_own=True).gpus == (4 * GIB, 15 * GIB)
    assert measure_free_memory(on_gpu=False).gpus == () and measure_free_memory(on_gpu=False).ram > 0
