"""Questions to a tokenizer and its embeddings whose wrong answers let a run learn nothing, or never stop."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from peftcli.data.chat_template import Chat, assistant_mask_by_prefix, render, training_template
from peftcli.data.encode import stop_ids
from peftcli.data.formats import LABELLED
from peftcli.errors import DataError

Floats = NDArray[np.floating[Any]]

PROBE = "Name 2 fruits, e.g. Äpfel."
ANSWER = "Apples & pears."
TWINS, TWIN_DISTANCE, MEAN_DISTANCE = 2, 0.1, 0.3
"""Rows nearly equal to one that was never trained; how near, of its norm; and how near the mean, of the usual way."""


@dataclass(frozen=True)
class Check:
    """The answer to one question.

    Attributes:
        name: the question, in a few words.
        result: `ok`, `warn` (go on, knowing this), `fail` (stop here) or `skip` (does not apply).
        said: one sentence; of `warn` and `fail` also the mend.
    """

    name: str
    result: str
    said: str


@dataclass(frozen=True)
class EmbeddingRows:
    """Rows of the matrix that writes tokens: the output embedding, which often is the input embedding too.

    Attributes:
        ids: the end ids, and the added tokens that the rows or the template use.
        rows: (n, h), float32 or float64; one for each of `ids`.
        sample: (m, h); rows of other ids, drawn evenly, about 1000 or all there are.
    """

    ids: list[int]
    rows: Floats
    sample: Floats


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, kind: str, *, sample_chats: Sequence[Chat], assistant_only: bool
) -> list[Check]:
    """Ask a tokenizer what a run relies on.

    Args:
        tokenizer: with the chat template that is used.
        kind: format of the data: `messages`, `prompt_completion`, `text`, or one with labels, which writes nothing.
        sample_chats: some chats of the data; used where `kind` is `messages`.
        assistant_only: only the assistant's turns are trained.
    """
    if kind == "images":
        return []
    if kind in LABELLED:
        return [_pad_of_labelled(tokenizer), _single_start(tokenizer(PROBE)["input_ids"], tokenizer)]
    checks = [_end_token(tokenizer), _pad_token(tokenizer)]
    if kind != "messages":
        return [*checks, _single_start(tokenizer(PROBE)["input_ids"], tokenizer), _round_trip([PROBE], tokenizer)]
    if not tokenizer.chat_template:
        fix = "set model.chat_template to a Jinja file, or take the tokenizer of the chat model"
        return [*checks, Check("chat template", "fail", f"The tokenizer has none, and the data are messages; {fix}.")]
    probe = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": ANSWER}]
    taken, refusals = _rendered([probe, *sample_chats], tokenizer)
    if not taken or taken[0][0] is not probe or (sample_chats and len(taken) == 1):
        said = f"It refuses chats ({refusals[0]}); set model.chat_template to one that takes them, or mend the rows."
        return [*checks, Check("chat template", "fail", said)]
    texts = [text for _, text in taken]
    return [
        *checks,
        _template(len(sample_chats), refusals),
        _single_start(tokenizer(texts[0], add_special_tokens=False)["input_ids"], tokenizer),
        _round_trip(texts, tokenizer),
        _turns([chat for chat, _ in taken], tokenizer, assistant_only=assistant_only),
        _turn_end(texts[0], tokenizer),
        _system_role(probe, sample_chats, tokenizer),
        _generation_prompt(probe[:1], tokenizer),
    ]


def check_embeddings(
    found: EmbeddingRows, tokenizer: PreTrainedTokenizerBase, *, embeddings_trained: bool, ends: Collection[int]
) -> list[Check]:
    """Ask whether the base model ever learned the end tokens and the added tokens that the rows use.

    Args:
        found: their rows, and a sample of other rows.
        tokenizer: for the names of the tokens.
        embeddings_trained: the run trains the embeddings, or these rows of them.
        ends: ids on which an answer ends.
    """
    flat = [id_ for id_, bad in zip(found.ids, untrained_rows(found.rows, found.sample), strict=True) if bad]
    return [
        _learned("end token learned", [id_ for id_ in found.ids if id_ in ends], flat, tokenizer, embeddings_trained),
        _learned(
            "added tokens learned",
            [id_ for id_ in found.ids if id_ not in ends],
            flat,
            tokenizer,
            embeddings_trained,
        ),
    ]


def untrained_rows(rows: Floats, sample: Floats) -> list[bool]:
    """Tell which rows of an embedding were hardly ever trained.

    Two traces are looked for. Output rows of tokens that never occurred are all pushed the same way, so each has
    near copies: two or more other rows within a tenth of its norm. Rows that are still as they were set up - zero,
    small noise, or the mean of the others, as vocabularies are grown - lie much nearer to the mean than rows
    usually do. A token that was set up with noise as wide as trained rows leaves no trace and is not found.

    Args:
        rows: (n, h); the rows in question.
        sample: (m, h); other rows of the same matrix, drawn evenly; with m = 0 only `rows` are compared.

    Source: after Land and Bartolo 2024, arXiv:2405.05417, who find such tokens by the same two kinds of distance.

    >>> noise = np.random.default_rng(0).normal(size=(200, 16))
    >>> copies = np.ones((3, 16))
    >>> untrained_rows(np.concatenate([noise[:2], np.zeros((1, 16)), copies]), noise[2:])
    [False, False, True, True, True, True]
    """
    rows, sample = rows.astype(np.float64), sample.astype(np.float64)
    others = np.concatenate([rows, sample])
    norms = np.linalg.norm(rows, axis=1)
    copies = [
        int((np.linalg.norm(others - row, axis=1) <= TWIN_DISTANCE * norm).sum()) - 1
        for row, norm in zip(rows, norms, strict=True)
    ]
    mean = (sample if len(sample) else rows).mean(axis=0)
    usual = np.median(np.linalg.norm((sample if len(sample) else rows) - mean, axis=1))
    near = np.linalg.norm(rows - mean, axis=1) <= MEAN_DISTANCE * usual
    return [bool(close or twins >= TWINS or norm == 0) for close, twins, norm in zip(near, copies, norms, strict=True)]


def _learned(
    name: str, ids: list[int], flat: list[int], tokenizer: PreTrainedTokenizerBase, embeddings_trained: bool
) -> Check:
    bad = [id_ for id_ in ids if id_ in flat]
    if not ids:
        return Check(name, "skip", "There is none to look at.")
    if not bad:
        return Check(name, "ok", f"The base model has learned {_names(ids, tokenizer)}.")
    seen = f"The base model has never learned {_names(bad, tokenizer)}"
    if embeddings_trained:
        return Check(name, "ok", f"{seen}, but this run trains the embeddings.")
    train = "train the embeddings with adapter.modules_to_save: [embed_tokens, lm_head]"
    if name.startswith("end"):
        fix = f"set model.eos_token to an end token that it knows, or {train}"
        return Check(name, "warn", f"{seen} and the embeddings are frozen, so answers may never stop; {fix}.")
    fix = f"{train}, or set model.chat_template to one without them"
    return Check(name, "warn", f"{seen} and the embeddings are frozen, so turns are hard to tell apart; {fix}.")


def _names(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, most: int = 6) -> str:
    names = [f"{tokenizer.convert_ids_to_tokens(id_)} (id {id_})" for id_ in ids[:most]]
    return ", ".join(names) + (f" and {len(ids) - most} more" if len(ids) > most else "")


def _end_token(tokenizer: PreTrainedTokenizerBase) -> Check:
    if tokenizer.eos_token_id is None:
        said = "The tokenizer has none, so no answer learns to stop; set model.eos_token to a token that ends a text."
        return Check("end token", "fail", said)
    return Check("end token", "ok", f"{_names([tokenizer.eos_token_id], tokenizer)} ends a row.")


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> Check:
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None:
        known = "the end token fills short rows" if end is not None else "one of the vocabulary fills short rows"
        return Check("pad token", "ok", f"The tokenizer has none; {known}, where it is masked and not trained.")
    if pad == end:
        said = "It is the end token; labels are masked by position and not by id, so end tokens are still trained."
        return Check("pad token", "ok", said)
    return Check("pad token", "ok", f"{_names([pad], tokenizer)} fills short rows and is not trained.")


def _pad_of_labelled(tokenizer: PreTrainedTokenizerBase) -> Check:
    pad = tokenizer.pad_token_id
    name = "A token of the vocabulary" if pad is None else _names([pad], tokenizer)
    return Check("pad token", "ok", f"{name} fills short rows and is masked.")


def _rendered(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase) -> tuple[list[tuple[Chat, str]], list[str]]:
    """The chats that the template takes, with their texts, and the reasons why it refuses the others."""
    taken, refusals = [], []
    for chat in chats:
        try:
            taken.append((chat, render(chat, None, tokenizer)))
        except (TemplateError, ValueError, TypeError) as problem:
            refusals.append(" ".join(str(problem).split())[:100])
    return taken, refusals


def _template(chats: int, refusals: Sequence[str]) -> Check:
    if refusals:
        fix = "set model.chat_template to one that takes them, or mend the rows"
        said = f"It refuses {len(refusals)} of {chats} chats looked at ({refusals[0]}); {fix}."
        return Check("chat template", "warn", said)
    return Check("chat template", "ok", f"It renders a probe and all chats looked at ({chats}).")


def _single_start(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Check:
    start = tokenizer.bos_token_id
    if start is None:
        return Check("start token", "skip", "The tokenizer has none.")
    if list(ids[:2]) == [start, start]:
        name = tokenizer.bos_token
        fix = f"take one {name} out of the chat template or the templates of the recipe"
        return Check("start token", "warn", f"Rows begin with {name} twice, which no model has seen; {fix}.")
    times = "once" if start in ids[:1] else "not"
    return Check("start token", "ok", f"{tokenizer.bos_token} is written {times}.")


def _round_trip(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Check:
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if "".join(back.split()) != "".join(text.split()):
            first, second = _difference(" ".join(text.split()), " ".join(back.split()))
            said = (
                f"The tokenizer changes text ({first!r} comes back as {second!r}), so answers are learned in that "
                "form; clean the rows, or take a tokenizer that keeps every letter."
            )
            return Check("text kept", "warn", said)
    return Check("text kept", "ok", "Encoded and decoded text is the same, white space aside.")


def _difference(text: str, back: str, around: int = 12) -> tuple[str, str]:
    pairs = zip(text, back, strict=False)
    place = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(text), len(back)))
    start = max(0, place - around // 2)
    return text[start : start + around], back[start : start + around]


def _turns(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, *, assistant_only: bool) -> Check:
    name = "assistant's turns"
    if not assistant_only:
        return Check(name, "skip", "All turns are trained, as the recipe says.")
    if training_template(tokenizer) is not None:
        return Check(name, "ok", "The template marks them, or is that of a family whose marks are known.")
    try:
        for chat in chats:
            assistant_mask_by_prefix(chat, None, tokenizer)
    except DataError as problem:
        said = str(problem)
        return Check(name, "fail", f"{said[0].upper()}{said[1:]}.")
    return Check(name, "ok", "The template has no marks; they are told apart by rendering each chat in steps.")


def _turn_end(rendered: str, tokenizer: PreTrainedTokenizerBase) -> Check:
    if ANSWER not in rendered:
        said = "The template leaves the text of an answer out; set model.chat_template to one that writes it."
        return Check("end of a turn", "fail", said)
    behind = rendered[rendered.rfind(ANSWER) + len(ANSWER) :].strip()
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if behind else []
    ends = stop_ids(tokenizer)
    if ids and ids[0] in ends:
        return Check("end of a turn", "ok", f"An answer ends on {_names(ids[:1], tokenizer)}, where generation stops.")
    wrote = f"{behind[:20]!r}" if behind else "nothing"
    fix = "give model.chat_template one that ends the assistant's turn with the end token, or set model.eos_token"
    return Check("end of a turn", "warn", f"The template writes {wrote} behind an answer, no end token; {fix}.")


def _system_role(probe: Chat, chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase) -> Check:
    used = any(turn.get("role") == "system" for chat in chats for turn in chat)
    taken, _ = _rendered([[{"role": "system", "content": "Xyzzy."}, *probe]], tokenizer)
    kept = bool(taken) and "Xyzzy." in taken[0][1]
    if kept:
        return Check("system turns", "ok", "The template writes them.")
    if used:
        fix = "set model.chat_template to one that writes them, or put their text into the first user turn"
        return Check("system turns", "warn", f"The template leaves them out, and the data hold some; {fix}.")
    return Check("system turns", "ok", "The template has none, and the chats looked at hold none.")


def _generation_prompt(user: Chat, tokenizer: PreTrainedTokenizerBase) -> Check:
    name = "start of an answer"
    if render(user, None, tokenizer, prompt=True) != render(user, None, tokenizer):
        return Check(name, "ok", "The template begins the assistant's turn when it is asked to.")
    said = (
        "The template ignores add_generation_prompt, so the model may write the user's next turn; add the "
        "assistant's opening to model.chat_template."
    )
    return Check(name, "warn", said)
