"""Pretrain tiny:llama and write the bundled files: weights, tokenizer and model card.

    python scripts/pretrain_tiny_llama.py [FOLDER]

It takes about two minutes on one core. Two runs on one machine give the same bytes; other machines round differently,
which is why the weights are shipped and not made where they are used.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import processors
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from peftcli.tiny.build import POSITIONS, VOCABULARY_TOKENS
from peftcli.tiny.llama import FOLDER, TOKENIZER, WEIGHTS, llama_config
from peftcli.tiny.save import isolated
from peftcli.tiny.tokenizer import CAUSAL_TOKENS, load_chats, load_documents, train_bpe, wrap_causal_tokenizer

SHIPPED_DTYPE = torch.float16
"""Half the size of float32. The weights are small numbers, which float16 rounds less than bfloat16 does."""


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


def main(folder: Path) -> None:
    """Pretrain, round to 16 bits, measure the rounded weights, and write."""
    schedule = Schedule()
    tokenizer = make_causal_tokenizer(VOCABULARY_TOKENS, POSITIONS)
    pad = int(tokenizer.pad_token_id)
    learned, held_out = split_documents(encode_documents(tokenizer), schedule.held_out_every)
    with isolated(schedule.seed):
        model = LlamaForCausalLM(llama_config(tokenizer))
        fit(model, learned, schedule, pad)
        model.eval().to(SHIPPED_DTYPE).float()
        loss = document_loss(model, held_out, pad)
    frequencies = unigram_loss(learned, held_out, len(tokenizer))
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(SHIPPED_DTYPE).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    tokenizer.backend_tokenizer.save(str(folder / TOKENIZER), pretty=False)
    (folder / "README.md").write_text(card(model, learned, schedule, loss, frequencies), encoding="utf-8", newline="\n")
    print(f"held-out loss {loss:.4f} nats per token, {frequencies:.4f} with only token frequencies; wrote {folder}")


def card(model: LlamaForCausalLM, learned: list[list[int]], schedule: Schedule, loss: float, frequencies: float) -> str:
    """The model card."""
    parameters = sum(p.numel() for p in model.parameters())
    seen = schedule.steps * schedule.rows * schedule.block_tokens
    return f"""\
---
license: apache-2.0
language: en
library_name: transformers
---

# tiny:llama

A Llama of {parameters:,} parameters for demonstrations and tests of fine-tuning. It knows nothing but the short
invented sentences about shops, kitchens, animals and school that peftcli ships, and is of no use for anything else.

| | |
|---|---|
| text | {len(learned):,} documents, {sum(map(len, learned)):,} tokens, written for peftcli |
| training | {schedule.steps} steps of {schedule.rows} x {schedule.block_tokens} tokens ({seen:,} in all) |
| optimizer | AdamW, learning rate {schedule.learning_rate:g}, cosine, seed {schedule.seed} |
| held-out loss | {loss:.4f} nats per token |
| the same with only token frequencies | {frequencies:.4f} nats per token |
| precision | trained in float32, shipped in float16, loaded as float32 |

Every document ends in `</s>`, which also ends an assistant turn of the chat template; `<s>` opens a text.
`<pad>` filled the rest of a row and was never an answer, so the model does not write it.

License: Apache-2.0, for the text, the tokenizer and the weights.
"""


def make_causal_tokenizer(vocabulary_tokens: int, max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer that prepends `<s>`, appends nothing, and decodes to exactly the same text.

    Args:
        vocabulary_tokens: vocabulary size, including the 256 bytes and the special tokens.
        max_length: maximum input length of the model, tokens.
    """
    backend = train_bpe(CAUSAL_TOKENS, vocabulary_tokens, add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", CAUSAL_TOKENS.index("<s>"))]
    )
    return wrap_causal_tokenizer(backend, max_length)


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
    """Mean loss over all tokens of the documents, each by itself, in nats per token."""
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


def fit(model: LlamaForCausalLM, documents: list[list[int]], schedule: Schedule, pad: int) -> None:
    """Train the model in place."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, schedule))
    batches = make_batches(documents, schedule, pad)
    model.train()
    for _ in range(schedule.steps):
        input_ids, labels = next(batches)
        (summed_nll(model, input_ids, labels) / (labels[:, 1:] != -100).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def warmup_cosine(step: int, schedule: Schedule) -> float:
    """The factor of the learning rate at a step: linear warm-up, then a cosine down to 2 %."""
    warmup = max(1, round(schedule.steps * schedule.warmup_ratio))
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, schedule.steps - warmup)))


def make_batches(documents: list[list[int]], schedule: Schedule, pad: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end; every pass shuffles the documents and packs them again."""
    generator = torch.Generator().manual_seed(schedule.seed)
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        input_ids, labels = pack([documents[i] for i in order], schedule.block_tokens, pad)
        rows = torch.randperm(len(input_ids), generator=generator)
        for first in range(0, len(rows), schedule.rows):
            chosen = rows[first : first + schedule.rows]
            yield input_ids[chosen], labels[chosen]


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(str(files("peftcli.assets").joinpath(FOLDER))))
