"""Checks of the tokenizer, the chat template and the embeddings that catch runs which learn nothing or never stop."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from peftcli.data.chat_template import render, training_template
from peftcli.data.encode import stop_ids
from peftcli.data.formats import LABELLED
from peftcli.data.shown_answers import AnswerFinder, Chat
from peftcli.errors import DataError

Floats = NDArray[np.floating[Any]]

PROBE = "Name 2 fruits, e.g. Äpfel."
ANSWER = "Apples & pears."
COPIES, COPY_DISTANCE, MEAN_DISTANCE = 2, 0.1, 0.3
"""Near copies of an untrained embedding row: their number, and their distance relative to its norm; and the distance of
an untrained row from the mean, relative to the median distance."""


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: what was checked, in a few words.
        result: `ok`, `warn` (continue, but the user should know), `fail` (stop) or `skip` (does not apply).
        said: one sentence; for `warn` and `fail` with the fix.
    """

    name: str
    result: str
    said: str


@dataclass(frozen=True)
class EmbeddingRows:
    """Rows of the output embedding, which is often tied to the input embedding.

    Attributes:
        ids: the end tokens, and the added tokens that the rows or the template use.
        rows: (n, h), float32 or float64; one for each of `ids`.
        sample: (m, h); evenly spaced rows of other ids, about 1000 or all.
    """

    ids: list[int]
    rows: Floats
    sample: Floats


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, kind: str, *, sample_chats: Sequence[Chat], assistant_only: bool
) -> list[Check]:
    """Check the tokenizer and its chat template.

    Args:
        tokenizer: with the chat template of the run.
        kind: format of the data: `messages`, `prompt_completion`, `text`, or one with labels, which generates no text.
        sample_chats: some chats of the data; used if `kind` is `messages`.
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
        fix = "set model.chat_template to a Jinja file, or use the chat version of the model"
        return [*checks, Check("chat template", "fail", f"The tokenizer has none, but the data are messages; {fix}.")]
    probe = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": ANSWER}]
    taken, refusals = _rendered([probe, *sample_chats], tokenizer)
    if not taken or taken[0][0] is not probe or (sample_chats and len(taken) == 1):
        fix = "set model.chat_template to one that supports them, or fix the rows"
        return [*checks, Check("chat template", "fail", f"It rejects chats ({refusals[0]}); {fix}.")]
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
    """Check whether the base model has trained embeddings of the end tokens and the added tokens in the rows.

    Args:
        found: their rows, and a sample of other rows.
        tokenizer: for the names of the tokens.
        embeddings_trained: the run trains the embeddings, or these rows of them.
        ends: ids that end an answer.
    """
    untrained = [id_ for id_, bad in zip(found.ids, untrained_rows(found.rows, found.sample), strict=True) if bad]
    end_ids = [id_ for id_ in found.ids if id_ in ends]
    return [
        _learned("end token learned", end_ids, untrained, tokenizer, embeddings_trained),
        _learned(
            "added tokens learned",
            [id_ for id_ in found.ids if id_ not in ends],
            untrained,
            tokenizer,
            embeddings_trained,
        ),
    ]


def untrained_rows(rows: Floats, sample: Floats) -> list[bool]:
    """Which rows of an embedding were hardly trained.

    There are two criteria. Output rows of tokens that never occurred all get the same gradient, so each has near
    copies: two or more other rows within a tenth of its norm. Rows that still have their initial value - zero, small
    noise, or the mean of the others - are much closer to the mean than usual. A row that was initialized with noise as
    large as trained rows is not detected.

    Args:
        rows: (n, h); the rows to check.
        sample: (m, h); evenly spaced other rows of the same matrix; with m = 0 only `rows` are compared.

    Source: after Land and Bartolo 2024, arXiv:2405.05417, who find such tokens with the same two distances.

    >>> noise = np.random.default_rng(0).normal(size=(200, 16))
    >>> copies = np.ones((3, 16))
    >>> untrained_rows(np.concatenate([noise[:2], np.zeros((1, 16)), copies]), noise[2:])
    [False, False, True, True, True, True]
    """
    rows, sample = rows.astype(np.float64), sample.astype(np.float64)
    others = np.concatenate([rows, sample])
    norms = np.linalg.norm(rows, axis=1)
    copies = [
        int((np.linalg.norm(others - row, axis=1) <= COPY_DISTANCE * norm).sum()) - 1
        for row, norm in zip(rows, norms, strict=True)
    ]
    mean = (sample if len(sample) else rows).mean(axis=0)
    usual = np.median(np.linalg.norm((sample if len(sample) else rows) - mean, axis=1))
    near = np.linalg.norm(rows - mean, axis=1) <= MEAN_DISTANCE * usual
    return [bool(close or count >= COPIES or norm == 0) for close, count, norm in zip(near, copies, norms, strict=True)]


def _learned(
    name: str, ids: list[int], untrained: list[int], tokenizer: PreTrainedTokenizerBase, embeddings_trained: bool
) -> Check:
    bad = [id_ for id_ in ids if id_ in untrained]
    if not ids:
        return Check(name, "skip", "There are none.")
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
    return Check(name, "warn", f"{seen} and the embeddings are frozen, so turns are hard to distinguish; {fix}.")


def _names(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, most: int = 6) -> str:
    names = [f"{tokenizer.convert_ids_to_tokens(id_)} (id {id_})" for id_ in ids[:most]]
    return ", ".join(names) + (f" and {len(ids) - most} more" if len(ids) > most else "")


def _end_token(tokenizer: PreTrainedTokenizerBase) -> Check:
    if tokenizer.eos_token_id is None:
        said = "The tokenizer has none, so the model does not learn to stop; set model.eos_token to an end token."
        return Check("end token", "fail", said)
    return Check("end token", "ok", f"{_names([tokenizer.eos_token_id], tokenizer)} ends a row.")


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> Check:
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None:
        used = "the end token" if end is not None else "another token"
        return Check("pad token", "ok", f"The tokenizer has none; {used} is used for padding, masked and not trained.")
    if pad == end:
        said = "It is the end token; padding is masked by position and not by id, so end tokens are still trained."
        return Check("pad token", "ok", said)
    return Check("pad token", "ok", f"{_names([pad], tokenizer)} is used for padding and is not trained.")


def _pad_of_labelled(tokenizer: PreTrainedTokenizerBase) -> Check:
    pad = tokenizer.pad_token_id
    name = "Another token" if pad is None else _names([pad], tokenizer)
    return Check("pad token", "ok", f"{name} is used for padding and is masked.")


def _rendered(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase) -> tuple[list[tuple[Chat, str]], list[str]]:
    """The chats that the template renders, with their texts, and the reasons why it rejects the others."""
    taken, refusals = [], []
    for chat in chats:
        try:
            taken.append((chat, render(chat, None, tokenizer)))
        except (TemplateError, ValueError, TypeError) as problem:
            refusals.append(" ".join(str(problem).split())[:100])
    return taken, refusals


def _template(chats: int, refusals: Sequence[str]) -> Check:
    if refusals:
        fix = "set model.chat_template to one that supports them, or fix the rows"
        said = f"It rejects {len(refusals)} of {chats} sampled chats ({refusals[0]}); {fix}."
        return Check("chat template", "warn", said)
    return Check("chat template", "ok", f"It renders a test chat and all sampled chats ({chats}).")


def _single_start(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Check:
    start = tokenizer.bos_token_id
    if start is None:
        return Check("start token", "skip", "The tokenizer has none.")
    if list(ids[:2]) == [start, start]:
        name = tokenizer.bos_token
        fix = f"remove one {name} from the chat template or the templates of the recipe"
        return Check("start token", "warn", f"Rows start with {name} twice, unlike in pretraining; {fix}.")
    position = "at the start of a row" if start in ids[:1] else "not used"
    return Check("start token", "ok", f"{tokenizer.bos_token} is {position}.")


def _round_trip(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Check:
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if "".join(back.split()) != "".join(text.split()):
            first, second = _difference(" ".join(text.split()), " ".join(back.split()))
            said = (
                f"The tokenizer changes text ({first!r} decodes to {second!r}), so answers are learned in this form; "
                "clean the rows, or use a lossless tokenizer."
            )
            return Check("round trip", "warn", said)
    return Check("round trip", "ok", "Decoded text equals the original, except for white space.")


def _difference(text: str, back: str, around: int = 12) -> tuple[str, str]:
    pairs = zip(text, back, strict=False)
    position = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(text), len(back)))
    start = max(0, position - around // 2)
    return text[start : start + around], back[start : start + around]


def _turns(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, *, assistant_only: bool) -> Check:
    name = "assistant's turns"
    if not assistant_only:
        return Check(name, "skip", "All turns are trained, as set in the recipe.")
    if training_template(tokenizer) is not None:
        return Check(name, "ok", "The template has generation markers, or TRL has a training template for it.")
    try:
        finder = AnswerFinder(tokenizer, assistant_only=True)
        for chat in chats:
            finder.find(chat, None)
    except DataError as problem:
        text = str(problem)
        return Check(name, "fail", f"{text[0].upper()}{text[1:]}.")
    return Check(name, "ok", "The template has no generation markers; the mask is found by rendering prefixes.")


def _turn_end(rendered: str, tokenizer: PreTrainedTokenizerBase) -> Check:
    if ANSWER not in rendered:
        said = "The template omits the text of answers; set model.chat_template to one that renders it."
        return Check("end of a turn", "fail", said)
    after = rendered[rendered.rfind(ANSWER) + len(ANSWER) :].strip()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    ends = stop_ids(tokenizer)
    if ids and ids[0] in ends:
        return Check(
            "end of a turn", "ok", f"An answer ends with {_names(ids[:1], tokenizer)}, where generation stops."
        )
    ending = f"{after[:20]!r}" if after else "nothing"
    fix = "set model.chat_template to one that ends assistant turns with the end token, or set model.eos_token"
    said = f"The chat template ends assistant turns with {ending} instead of an end token; {fix}."
    return Check("end of a turn", "warn", said)


def _system_role(probe: Chat, chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase) -> Check:
    used = any(turn.get("role") == "system" for chat in chats for turn in chat)
    taken, _ = _rendered([[{"role": "system", "content": "Xyzzy."}, *probe]], tokenizer)
    kept = bool(taken) and "Xyzzy." in taken[0][1]
    if kept:
        return Check("system turns", "ok", "The template renders them.")
    if used:
        fix = "set dataset.system: fold to put their text into the first user turn"
        return Check("system turns", "warn", f"The template omits them, but the data have some; {fix}.")
    return Check("system turns", "ok", "The template does not support them, and the sampled chats have none.")


def _generation_prompt(user: Chat, tokenizer: PreTrainedTokenizerBase) -> Check:
    name = "start of an answer"
    if render(user, None, tokenizer, prompt=True) != render(user, None, tokenizer):
        return Check(name, "ok", "The template supports add_generation_prompt.")
    said = (
        "The template ignores add_generation_prompt, so the model may generate the user's next turn; set "
        "model.chat_template to one that supports it."
    )
    return Check(name, "warn", said)
