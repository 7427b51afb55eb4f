"""The test rows as the evaluation takes them: with the prompt to answer and the reference to compare with."""

import json
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from peftcli.data.encode import as_lists, encode, encode_prompts, flatten
from peftcli.data.facts import Side
from peftcli.data.labels import label_said
from peftcli.data.readings import LABELLED
from peftcli.data.rows import BATCH_ROWS
from peftcli.data.turns import last_answer, read_chats, render

LONGEST_OPENING = 64
"""Tokens of a text that the model goes on from, to show what it has learned."""


def held_out_table(side: Side, kind: str, tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    """`input_ids`, `labels`, `prompt_ids` (what generation starts from), `prompt` and `reference` of the test rows.

    Of rows with labels, `prompt_ids` are the whole text and `reference` is the label as text; tagged rows also have
    `words`, images their path in `image`.
    """
    whole = side.store.examples.take(pa.array(side.rows, pa.int64()))
    batches = whole.to_batches(max_chunksize=BATCH_ROWS)
    problem = str(side.store.facts.get("problem"))
    parts = [
        _labelled(part, kind, problem) if kind in LABELLED else _prompts(part, kind, tokenizer) for part in batches
    ]
    prompts = pa.concat_tables(parts)
    table = whole.select(["input_ids", "labels"])
    for name in prompts.column_names:
        table = table.append_column(name, prompts.column(name))
    return table


def _prompts(part: pa.RecordBatch, kind: str, tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    make = {"prompt_completion": _of_pairs, "messages": _of_chats, "text": _of_texts}[kind]
    ids, prompts, references = make(part.to_pydict(), tokenizer)
    return pa.table(
        {
            "prompt_ids": as_lists(*flatten(ids)),
            "prompt": pa.array(prompts, pa.large_string()),
            "reference": pa.array(references, pa.large_string()),
        }
    )


def _labelled(part: pa.RecordBatch, kind: str, problem: str) -> pa.Table:
    columns = {"prompt_ids": part.column("input_ids")}
    rows = part.to_pydict()
    if kind == "tagging":
        words, tags = ([json.loads(text) for text in rows[name]] for name in ("tokens", "tags"))
        columns["words"] = pa.array(words, pa.large_list(pa.large_string()))
        prompts, references = list(map(" ".join, words)), list(map(" ".join, tags))
    elif kind == "images":
        columns["image"] = part.column("image")
        prompts, references = rows["name"], [label_said(label, problem) for label in rows["label"]]
    else:
        texts = zip(rows["text"], rows["text_pair"], strict=True)
        prompts = [f"{text}\n{pair}" if pair else text for text, pair in texts]
        references = [label_said(label, problem) for label in rows["label"]]
    columns |= {"prompt": pa.array(prompts, pa.large_string()), "reference": pa.array(references, pa.large_string())}
    return pa.table(columns)


def _of_pairs(
    columns: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[str], list[str]]:
    return encode_prompts(columns["prompt"], tokenizer), columns["prompt"], columns["completion"]


def _of_chats(
    columns: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[str], list[str]]:
    prompts, references = [], []
    for chat, tools in zip(*read_chats(columns), strict=True):
        last = last_answer(chat)
        prompts.append(render(chat[:last], tools, tokenizer, prompt=True))
        references.append(str(chat[last]["content"]))
    return encode(prompts, tokenizer, special=False), prompts, references


def _of_texts(
    columns: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[str], list[str]]:
    openings, rests = [], []
    for ids in columns["input_ids"]:
        start = max(1, min(len(ids) // 4, LONGEST_OPENING))
        openings.append(ids[:start])
        rests.append(ids[start:])
    return (
        openings,
        tokenizer.batch_decode(openings, skip_special_tokens=True),
        tokenizer.batch_decode(rests, skip_special_tokens=True),
    )
