"""Generates answers to prompts: batched, sorted by length, greedy by default, until the end token."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from peftcli.model.distributed import is_fsdp, without_gradients
from peftcli.model.expected_time import ExpectedTime
from peftcli.model.oom import ShrinkingBatches, free_bytes
from peftcli.progress import Progress

CACHE_RATIO = 0.6
"""Share of a GPU's free memory for keys and values: growing by a token makes a copy of one layer's, and the prompts'
own pass through a layer needs about as much as they keep in all."""
SAID_SECONDS = 60.0
"""Answers that take longer are announced with the time that they will take."""


@dataclass(frozen=True)
class Decoding:
    """Sampling settings.

    Attributes:
        max_new_tokens: longer answers are truncated and count as unfinished.
        temperature: 0 for greedy decoding.
        top_p: nucleus sampling threshold, used with a temperature.
        seed: random seed for sampling.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """One answer; `finished` means that the model generated a stop token."""

    text: str
    finished: bool


@without_gradients
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: frozenset[int],
    decoding: Decoding,
    batch_rows: int,
    progress: Progress,
    what: str,
    timed: bool = True,
) -> list[Answer]:
    """Answer every prompt, in the given order.

    Args:
        model: causal language model; its mode is restored.
        tokenizer: for decoding and the pad token.
        prompts: token ids.
        stop_ids: ids that end an answer; they are not included in its text.
        decoding: sampling settings; the global random state is restored.
        batch_rows: prompts per batch.
        what: name of the task for `progress`.
        timed: say after the first batch how long all answers will take, if it is long.
    """
    answers: list[Answer | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)
    device = next(model.parameters()).device
    config = _generation_config(tokenizer, stop_ids, decoding)
    was_training = model.training
    model.eval()
    progress.start(what, len(prompts))
    cards = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cards):
        torch.manual_seed(decoding.seed)
        done = 0
        expected = ExpectedTime(what, len(order), progress, least_seconds=SAID_SECONDS)
        fitting = ShrinkingBatches(batch_rows, what, progress, in_step=is_fsdp(model))
        while done < len(order):
            longest = len(prompts[order[done]]) + decoding.max_new_tokens
            batch = order[done : done + rows_with_room(fitting.rows, longest, model, device, in_step=is_fsdp(model))]
            inputs, mask = _pad_left([prompts[row] for row in batch], tokenizer.pad_token_id or 0)
            answer_these = partial(
                model.generate,
                input_ids=inputs.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
            )
            made = fitting.attempt(len(batch), device, answer_these)
            if made is None:
                expected.restart()
                continue
            for row, ids in zip(batch, made[:, inputs.shape[1] :].tolist(), strict=True):
                answers[row] = _decode(ids, tokenizer, stop_ids)
            done += len(batch)
            if timed:
                expected.after(done, done / len(order))
            progress.advance(done)
    progress.end()
    model.train(was_training)
    return [one for one in answers if one is not None]


def rows_with_room(rows: int, longest: int, model: Any, device: torch.device, *, in_step: bool = False) -> int:
    """Rows that are answered at once: as many as the free memory of a GPU holds keys and values for.

    A guess that is too high costs a failed attempt, since a batch that runs out of memory is halved.

    Args:
        rows: at most.
        longest: tokens of the longest prompt with its answer.
        in_step: other processes take as many, so that the number may depend on no machine.

    Returns:
        At least one.
    """
    if device.type != "cuda" or in_step:
        return rows
    kept = cache_bytes(model.config.get_text_config(), model.dtype.itemsize)
    if kept is None:
        return rows
    return max(1, min(rows, int(CACHE_RATIO * free_bytes(device) / (longest * kept))))


def cache_bytes(config: Any, width: int) -> int | None:
    """Bytes of the keys and values of one token; None where the configuration does not tell.

    Args:
        config: of a language model.
        width: bytes of a number.
    """
    heads = getattr(config, "num_attention_heads", None)
    layers, hidden = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not heads or not layers or not hidden:
        return None
    keys = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or hidden // heads
    return int(2 * layers * keys * head * width)


def _generation_config(
    tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], decoding: Decoding
) -> GenerationConfig:
    sampling: dict[str, Any] = {"do_sample": False}
    if decoding.temperature > 0:
        sampling = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=tokenizer.pad_token_id or 0,
        use_cache=True,
        **sampling,
    )


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int]) -> Answer:
    end = next((place for place, token in enumerate(ids) if token in stop_ids), None)
    kept = ids if end is None else ids[:end]
    return Answer(tokenizer.decode(kept, skip_special_tokens=True), finished=end is not None)


def _pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(row) for row in rows)
    inputs = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for number, row in enumerate(rows):
        inputs[number, longest - len(row) :] = torch.tensor(list(row), dtype=torch.int64)
        mask[number, longest - len(row) :] = 1
    return inputs, mask
