"""Pretraining of tiny:llama: a plain loop over the shipped text, the same bits on every run."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peftcli.tiny.tokenizer import load_chats, load_documents

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast tiny:llama is trained."""

    steps: int = 360
    rows: int = 8
    block_tokens: int = 256
    learning_rate: float = 6e-3
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
    nll, tokens = 0.0, 0
    for first in range(0, len(documents), 32):
        batch = [torch.tensor(ids) for ids in documents[first : first + 32]]
        input_ids = pad_sequence(batch, batch_first=True, padding_value=pad)
        labels = pad_sequence(batch, batch_first=True, padding_value=-100)
        nll += summed_nll(model, input_ids, labels).item()
        tokens += int((labels[:, 1:] != -100).sum())
    return nll / tokens


def summed_nll(model: LlamaForCausalLM, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Sum of the negative log-likelihood over the labels that are not -100, in nats.

    Args:
        input_ids: (B, T), int64.
        labels: (B, T), int64; position t predicts the label at t + 1.
    """
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


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
    with isolated(schedule.seed):
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
def isolated(seed: int) -> Iterator[None]:
    """Seeded random numbers on one CPU thread, float32 and gradients inside; outside nothing has changed."""
    before_threads, before_dtype = torch.get_num_threads(), torch.get_default_dtype()
    modes = torch.inference_mode(False), torch.enable_grad(), torch.device("cpu")
    with torch.random.fork_rng(devices=[]), modes[0], modes[1], modes[2]:
        # `torch.manual_seed` would seed the GPUs too, whose state is not put back.
        torch.default_generator.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            torch.set_num_threads(1)
            yield
        finally:
            torch.set_num_threads(before_threads)
            torch.set_default_dtype(before_dtype)


def _fit(
    model: LlamaForCausalLM,
    documents: list[list[int]],
    schedule: Schedule,
    pad: int,
    progress: Progress | None,
) -> None:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, schedule))
    batches = _batches(documents, schedule, pad)
    twins = [model.train(), _twin(model)]
    with ThreadPoolExecutor(len(twins), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for step in range(schedule.steps):
            _backward(pool, twins, *next(batches))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if progress is not None:
                progress(step + 1, schedule.steps)


def _twin(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A model with the same weights in memory and gradients of its own."""
    twin = deepcopy(model)
    for mine, other in zip(twin.parameters(), model.parameters(), strict=True):
        mine.data = other.data
    return twin


def _backward(pool: ThreadPoolExecutor, twins: list[LlamaForCausalLM], input_ids: Tensor, labels: Tensor) -> None:
    """Leave the gradient of the mean loss in the first twin; each works out its half on a thread of its own.

    A thread per half, not torch's threads within each operation: those wait in a busy loop, which takes ten
    times as long on a machine that does other work too, and their sums depend on how many there are.
    """
    tokens = (labels[:, 1:] != -100).sum()

    def half(twin: LlamaForCausalLM, ids: Tensor, wanted: Tensor) -> None:
        torch.autograd.backward(summed_nll(twin, ids, wanted) / tokens)

    list(pool.map(half, twins, input_ids.chunk(len(twins)), labels.chunk(len(twins))))
    for first, second in zip(*(twin.parameters() for twin in twins), strict=True):
        if first.grad is not None and second.grad is not None:
            first.grad.add_(second.grad)
        second.grad = None


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
        for first in range(0, len(rows), schedule.rows):
            chosen = rows[first : first + schedule.rows]
            yield input_ids[chosen], labels[chosen]
