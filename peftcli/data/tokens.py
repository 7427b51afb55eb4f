"""Examples to token ids and labels, in one pass over batches.

Ids and labels are those that TRL's SFTTrainer would make (tests compare them); made here, they are known, counted and
shown before a model is loaded.
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import pyarrow as pa
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import common_prefix_length

from peftcli.data.examples import BATCH_ROWS, Examples
from peftcli.errors import DataError
from peftcli.plan.plan import LabelRule

IGNORED = -100
"""Label of a token that is not trained (`ignore_index` of torch's cross entropy)."""

Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class TokenFacts:
    """Counts over the rows of one side of the split; `lengths` are tokens per row before any cut."""

    rows: int
    tokens: int
    trained: int
    truncated: int
    dropped: int
    eos_trained: int
    merged_boundaries: int
    lengths: list[int]


def tokenize(examples: Examples, tokenizer: PreTrainedTokenizerBase, rule: LabelRule) -> tuple[pa.Table, TokenFacts]:
    """Tokenize, label, truncate, and drop the rows that truncation left without a trained token.

    Returns:
        table: `input_ids` and `labels` (lists of equal length), `prompt_ids` (what generation starts from; equal to
            the training context), `prompt` and `reference` (text).
        facts: what was counted.

    Raises:
        DataError: the chat template is missing or does not tell the assistant's turns apart.
    """
    encode = {"prompt_completion": _encode_pairs, "messages": _encode_messages, "text": _encode_texts}[examples.format]
    ends = stop_ids(tokenizer)
    kept: list[Row] = []
    count = {"truncated": 0, "dropped": 0, "eos_trained": 0, "merged_boundaries": 0}
    lengths: list[int] = []
    for batch in examples.table.to_batches(BATCH_ROWS):
        for row in encode(batch.to_pydict(), tokenizer, rule):
            lengths.append(len(row["input_ids"]))
            count["merged_boundaries"] += row.pop("merged_boundary", False)
            if len(row["input_ids"]) > rule.max_length:
                row["input_ids"] = row["input_ids"][: rule.max_length]
                row["labels"] = row["labels"][: rule.max_length]
                if all(label == IGNORED for label in row["labels"]):
                    count["dropped"] += 1
                    continue
                count["truncated"] += 1
            count["eos_trained"] += row["labels"][-1] in ends or _last_trained(row["labels"]) in ends
            kept.append(row)
    lists = pa.large_list(pa.int32())
    columns = {name: pa.array([row[name] for row in kept], lists) for name in ("input_ids", "labels", "prompt_ids")}
    for name in ("prompt", "reference"):
        columns[name] = pa.array([row[name] for row in kept], pa.large_string())
    tokens = sum(len(row["input_ids"]) for row in kept)
    trained = sum(label != IGNORED for row in kept for label in row["labels"][1:])
    return pa.table(columns), TokenFacts(rows=len(kept), tokens=tokens, trained=trained, lengths=lengths, **count)


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids on which an answer ends: the tokenizer's end token and, where it has one, its template's end of turn."""
    ends = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
        except TemplateError:  # a template for another purpose; rows that need it are refused where they are read
            ids = []
        special = set(tokenizer.all_special_ids)
        last = next((token for token in reversed(ids) if token in special), None)
        text = tokenizer.decode(ids[ids.index(last) + 1 :]) if last is not None else "b"
        if last is not None and not text.strip():
            ends.add(last)
    return frozenset(ends)


def _last_trained(labels: list[int]) -> int:
    return next((label for label in reversed(labels) if label != IGNORED), IGNORED)


def encode_prompts(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids that an answer goes on from: without the end token that some tokenizers write by themselves."""
    encoded: list[list[int]] = tokenizer(prompts)["input_ids"]
    return [ids[:-1] for ids in encoded] if _writes_end(tokenizer) else encoded


def _writes_end(tokenizer: PreTrainedTokenizerBase) -> bool:
    probe = tokenizer("a")["input_ids"]
    return tokenizer.eos_token_id is not None and bool(probe) and probe[-1] == tokenizer.eos_token_id


def _with_end(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    end = tokenizer.eos_token
    if end is None or _writes_end(tokenizer):
        return texts
    return [text if text.endswith(end) else text + end for text in texts]


def _encode_pairs(batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, rule: LabelRule) -> list[Row]:
    completions = _with_end(batch["completion"], tokenizer)
    prompts = encode_prompts(batch["prompt"], tokenizer)
    wholes = tokenizer([a + b for a, b in zip(batch["prompt"], completions, strict=True)])["input_ids"]
    rows = []
    for prompt, whole, text, reference in zip(prompts, wholes, batch["prompt"], batch["completion"], strict=True):
        start = common_prefix_length(prompt, whole)
        masked = start if rule.completion_only else 0
        rows.append(
            {
                "input_ids": whole,
                "labels": [IGNORED] * masked + whole[masked:],
                "prompt_ids": prompt,
                "prompt": text,
                "reference": reference,
                "merged_boundary": start < len(prompt),
            }
        )
    return rows


def _encode_texts(batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, rule: LabelRule) -> list[Row]:
    rows = []
    for ids in tokenizer(_with_end(batch["text"], tokenizer))["input_ids"]:
        # A text has no prompt of its own; its first quarter serves to show how the model goes on.
        start = max(1, min(len(ids) // 4, 64))
        rows.append(
            {
                "input_ids": ids,
                "labels": list(ids),
                "prompt_ids": ids[:start],
                "prompt": tokenizer.decode(ids[:start], skip_special_tokens=True),
                "reference": tokenizer.decode(ids[start:], skip_special_tokens=True),
            }
        )
    return rows


def _encode_messages(batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, rule: LabelRule) -> list[Row]:
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template, and the data are messages; set model.chat_template to a Jinja file"
        )
    chats = [json.loads(text) for text in batch["messages"]]
    for chat in chats:
        _check_renders(chat, tokenizer)
    template = training_template(tokenizer) if rule.assistant_only else None
    if rule.assistant_only and template is None:
        encoded = [_mark_turns(chat, tokenizer) for chat in chats]
    else:
        encoded = _mark_by_template(chats, tokenizer, template, rule.assistant_only)
    rows = []
    for chat, (ids, labels) in zip(chats, encoded, strict=True):
        last = max(number for number, turn in enumerate(chat) if turn["role"] == "assistant")
        prompt = tokenizer.apply_chat_template(chat[:last], tokenize=False, add_generation_prompt=True)
        rows.append(
            {
                "input_ids": ids,
                "labels": labels,
                "prompt_ids": tokenizer(prompt, add_special_tokens=False)["input_ids"],
                "prompt": prompt,
                "reference": chat[last]["content"],
            }
        )
    return rows


def _check_renders(chat: list[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        tokenizer.apply_chat_template(chat, tokenize=False)
    except TemplateError as problem:
        roles = ", ".join(turn["role"] for turn in chat[:6])
        first = chat[0]["content"][:60]
        raise DataError(
            f"the chat template refuses a row ({problem}): its turns are {roles}, and it begins {first!r}; mend the "
            "row or set model.chat_template"
        ) from problem


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A template that marks the assistant's turns: the tokenizer's own, TRL's for a known family, or None."""
    if has_generation_markers(tokenizer.chat_template):
        return str(tokenizer.chat_template)
    try:
        return str(get_training_chat_template(tokenizer))
    except ValueError:  # TRL's way to say that it does not know this family
        return None


def _mark_by_template(
    chats: list[list[Row]], tokenizer: PreTrainedTokenizerBase, template: str | None, assistant_only: bool
) -> list[tuple[list[int], list[int]]]:
    encoded = tokenizer.apply_chat_template(
        chats, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=assistant_only
    )
    if not assistant_only:
        return [(ids, list(ids)) for ids in encoded["input_ids"]]
    rows = []
    for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        if not any(mask):
            raise DataError(
                "the chat template marks no token of the assistant; its {% generation %} block is empty for some row"
            )
        rows.append((ids, [token if bit else IGNORED for token, bit in zip(ids, mask, strict=True)]))
    return rows


def _mark_turns(chat: list[Row], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Find the assistant's turns of a template without marks by rendering the chat up to each of them.

    Raises:
        DataError: a shorter chat does not render as the beginning of the longer one, so the turns cannot be told.
    """
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    spans = []
    for number, turn in enumerate(chat):
        if turn["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(chat[:number], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(chat[: number + 1], tokenize=False)
        if not (whole.startswith(after) and after.startswith(before)):
            raise DataError(
                "the chat template renders earlier turns differently in a longer chat, so the assistant's turns cannot "
                "be told apart with certainty; give model.chat_template a template with {% generation %} marks, or set "
                "trainer.assistant_only_loss: false"
            )
        spans.append((len(before), len(after)))
    return _label_spans(whole, spans, tokenizer)


def _label_spans(
    text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Ids of a text, and labels that train the characters of the spans and no other.

    A token that reaches over the edge of a span would train a part of the prompt, or leave out a part of the answer.
    Then the pieces are encoded apart, which is also what generation sees: a prompt that ends at that edge.

    Raises:
        DataError: the pieces do not add up to the text.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    offsets = encoded["offset_mapping"]
    edges = {edge for span in spans for edge in span}
    if not any(left < edge < right for left, right in offsets for edge in edges):
        inside = [any(start <= left and right <= end for start, end in spans) for left, right in offsets]
        trained = [bit and right > left for bit, (left, right) in zip(inside, offsets, strict=True)]
        return ids, [token if bit else IGNORED for token, bit in zip(ids, trained, strict=True)]
    cuts = [0, *sorted(edges - {0, len(text)}), len(text)]
    pieces: list[int] = []
    labels: list[int] = []
    for start, end in pairwise(cuts):
        piece = tokenizer(text[start:end], add_special_tokens=False)["input_ids"]
        pieces += piece
        labels += piece if (start, end) in spans else [IGNORED] * len(piece)
    if tokenizer.decode(pieces) != tokenizer.decode(ids):
        raise DataError(
            "a token reaches over the edge of an assistant's turn and the tokenizer cannot encode the turns apart; end "
            "the generation prompt of the chat template on a special token or a line break"
        )
    return pieces, labels
