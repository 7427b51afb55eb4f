"""Pretraining of tiny:llama: a plain loop over the shipped text, the same bits on every run of one machine."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peftcli.tiny.tokenizer import load_chats, load_documents

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast tiny:llama is trained."""

    steps: int = 300
    rows: int = 8
    block_tokens: int = 256
    learning_rate: float = 4e-3
    warmup_ratio: float = 0.05
    weight_decay: float = 0.1
    held_out_every: int = 20
    seed: int = 11


@dataclass(frozen=True)
class Pretrained:
    """A trained model with its losses, in nats per token."""

    model: LlamaForCausalLM
    documents: int
    train_tokens: int
    held_out_loss: float
    unigram_loss: float


def encode_documents(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Every shipped document as `<s> ... </s>`, and every conversation as its template renders it."""
    texts = tokenizer(load_documents())["input_ids"]
    chats = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in load_chats()]
    turns = tokenizer([chat.rstrip("\n") for chat in chats], add_special_tokens=False)["input_ids"]
    return [[*ids, tokenizer.eos_token_id] for ids in texts] + list(turns)


def split_documents(documents: list[list[int]], every: int) -> tuple[list[list[int]], list[list[int]]]:
    """The documents to learn and the held-out ones: each `every`-th."""
    held_out = documents[every - 1 :: every]
    return [ids for i, ids in enumerate(documents, start=1) if i % every], held_out


def pack(documents: list[list[int]], block_tokens: int, pad: int) -> tuple[Tensor, Tensor]:
    """Whole documents side by side in rows, in the order given; a row's rest is padding without loss.

    Returns:
        input_ids: (rows, block_tokens), int64.
        labels: (rows, block_tokens), int64, -100 on the padding.
    """
    rows: list[list[int]] = []
    for document in documents:
        ids = document[:block_tokens]
        # Only the last few rows are tried: enough to leave little padding, and linear in time.
        fit = next((row for row in rows[-8:] if len(row) + len(ids) <= block_tokens), None)
        if fit is None:
            rows.append(list(ids))
        else:
            fit.extend(ids)
    input_ids = torch.full((len(rows), block_tokens), pad)
    labels = torch.full((len(rows), block_tokens), -100)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row)
        labels[i, : len(row)] = torch.tensor(row)
    return input_ids, labels


def unigram_loss(learned: list[list[int]], held_out: list[list[int]], vocabulary_tokens: int) -> float:
    """Nats per held-out token of a model that knows the token frequencies only (add-one smoothing)."""
    counts = Counter(token for ids in learned for token in ids)
    total = sum(counts.values()) + vocabulary_tokens
    tokens = [token for ids in held_out for token in ids[1:]]
    return -sum(math.log((counts[token] + 1) / total) for token in tokens) / len(tokens)


@torch.no_grad()
def document_loss(model: LlamaForCausalLM, documents: list[list[int]], pad: int) -> float:
    """Mean loss over all tokens of the documents, each seen alone, in nats per token."""
    longest = max(len(ids) for ids in documents)
    input_ids, labels = pack_alone(documents, longest, pad)
    nll, tokens = 0.0, 0
    for ids, wanted in zip(input_ids.split(32), labels.split(32), strict=True):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        nll += torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted[:, 1:], reduction="sum").item()
        tokens += int((wanted[:, 1:] != -100).sum())
    return nll / tokens


def pack_alone(documents: list[list[int]], block_tokens: int, pad: int) -> tuple[Tensor, Tensor]:
    """One document per row, padded on the right; shapes and labels as in `pack`."""
    kept = [torch.tensor(ids[:block_tokens]) for ids in documents]
    input_ids = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True, padding_value=pad)
    return input_ids, torch.nn.utils.rnn.pad_sequence(kept, batch_first=True, padding_value=-100)


def pretrain(
    config: LlamaConfig,
    tokenizer: PreTrainedTokenizerFast,
    schedule: Schedule,
    progress: Progress | None = None,
) -> Pretrained:
    """Train a Llama from random weights; the caller's random state and thread count are left as they were.

    Args:
        progress: called with the steps done and the steps in all, after every step.
    """
    learned, held_out = split_documents(encode_documents(tokenizer), schedule.held_out_every)
    pad = int(tokenizer.pad_token_id)
    with isolated(schedule.seed, threads=2):
        model = LlamaForCausalLM(config)
        _fit(model, learned, schedule, pad, progress)
        model.eval()
        loss = document_loss(model, held_out, pad)
    return Pretrained(
        model=model,
        documents=len(learned),
        train_tokens=sum(map(len, learned)),
        held_out_loss=loss,
        unigram_loss=unigram_loss(learned, held_out, len(tokenizer)),
    )


@contextmanager
def isolated(seed: int, threads: int | None = None) -> Iterator[None]:
    """Seeded random numbers on the CPU, float32 and gradients inside; outside nothing has changed."""
    before_threads, before_dtype = torch.get_num_threads(), torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        # `torch.manual_seed` would seed the GPUs too, whose state is not put back.
        torch.default_generator.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            yield
        finally:
            torch.set_num_threads(before_threads)
            torch.set_default_dtype(before_dtype)


def _fit(
    model: LlamaForCausalLM, documents: list[list[int]], schedule: Schedule, pad: int, progress: Progress | None
) -> None:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, schedule))
    model.train()
    for step, (input_ids, labels) in zip(range(schedule.steps), _batches(documents, schedule, pad), strict=False):
        model(input_ids=input_ids, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(step + 1, schedule.steps)


def _warmup_cosine(step: int, schedule: Schedule) -> float:
    warmup = max(1, round(schedule.steps * schedule.warmup_ratio))
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, schedule.steps - warmup)))


def _batches(documents: list[list[int]], schedule: Schedule, pad: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end; every pass shuffles the documents and packs them again."""
    generator = torch.Generator().manual_seed(schedule.seed)
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        input_ids, labels = pack([documents[i] for i in order], schedule.block_tokens, pad)
        rows = torch.randperm(len(input_ids), generator=generator)
        for chosen in rows.split(schedule.rows):
            yield input_ids[chosen], labels[chosen]
