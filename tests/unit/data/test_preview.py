"""The preview of a row says of each token exactly what the trainer does with it."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain_tiny_llama import make_causal_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from peftcli.data.preview import preview_rows, token_kinds
from peftcli.data.spans import Part, shorten

IGNORED = -100
CORPUS = ["the cat sat on the mat and the dog ran", "a user asks, the model answers", "Zürich is wet today"] * 4
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def sentencepiece(template: str, extra: list[str]) -> PreTrainedTokenizerFast:
    """BPE as SentencePiece makes it: spaces as a letter of their own, unknown letters as bytes, `<s>` in front."""
    specials = ["<unk>", "<s>", "</s>", *extra]
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trained = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=trained, show_progress=False)
    )
    # The byte pieces are ordinary pieces, not special ones that a text could name.
    state = json.loads(backend.to_str())
    state["added_tokens"] = [entry for entry in state["added_tokens"] if entry["content"] in specials]
    return _fast(Tokenizer.from_str(json.dumps(state)), template, bos="<s>")


def byte_level(template: str, specials: list[str], bos: str | None, merges: int = 120) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(specials) + merges,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _fast(backend, template, bos)


def _fast(backend: Tokenizer, template: str, bos: str | None) -> PreTrainedTokenizerFast:
    if bos is not None:
        start = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=start)
    names = ["</s>", "<|im_end|>", "<end_of_turn>", "<|endoftext|>"]
    end = next(name for name in reversed(names) if backend.token_to_id(name) is not None)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=end,
        pad_token=end,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "llama": lambda: sentencepiece(LLAMA, []),
    "chatml": lambda: byte_level(CHATML, ["<|im_start|>", "<|im_end|>"], None),
    "gemma": lambda: sentencepiece(GEMMA, ["<start_of_turn>", "<end_of_turn>"]),
    "gpt2": lambda: byte_level("", ["<|endoftext|>"], None),
    "bytes": lambda: byte_level(CHATML, ["<s>", "<|im_start|>", "<|im_end|>"], "<s>", merges=0),
}


def labelled(tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], list[int]]]:
    """Rows with labels made by hand: a pair, a chat of two answers, a whole text, and an odd edge inside a letter."""
    rows = []
    for prompt, answer in (("the cat 😀 sat ->:", " on the mat é"), ("user asks", " Zürich 🇨🇭 is  wet\n")):
        start = tokenizer(prompt)["input_ids"]
        ids = tokenizer(prompt + answer + tokenizer.eos_token)["input_ids"]
        rows.append((ids, [IGNORED] * len(start) + ids[len(start) :]))
    text = tokenizer("the dog ran 👍🏽 today" + tokenizer.eos_token)["input_ids"]
    rows.append((text, list(text)))
    inside = tokenizer("a 😀 b")["input_ids"]
    rows.append((inside, [IGNORED] * (len(inside) - 3) + inside[-3:]))
    if tokenizer.chat_template:
        ids, labels = [], []
        turns = ["the cat 😀", "sat on é", "and the dog", "ran 🇨🇭"]
        chat = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(turns)]
        for at in range(4):
            whole = tokenizer.apply_chat_template(chat[: at + 1], tokenize=False)
            before = tokenizer.apply_chat_template(chat[:at], tokenize=False) if at else ""
            piece = tokenizer(whole[len(before) :], add_special_tokens=False)["input_ids"]
            ids += piece
            labels += piece if at % 2 else [IGNORED] * len(piece)
        rows.append((ids, labels))
    return rows


def padded(rows: list[tuple[list[int], list[int]]], side: str = "right", pad: int = 0) -> dict[str, torch.Tensor]:
    """The rows as a collator would lay them out."""
    width = max(len(ids) for ids, _ in rows) + 1
    filled: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for ids, labels in rows:
        for name, values, filler in (
            ("input_ids", ids, pad),
            ("labels", labels, IGNORED),
            ("attention_mask", [1] * len(ids), 0),
        ):
            filling = [filler] * (width - len(ids))
            filled[name].append(filling + values if side == "left" else values + filling)
    return {name: torch.tensor(values) for name, values in filled.items()}


def trained(parts: list[Part]) -> str:
    return "".join(part.text for part in parts if part.kind == "trained")


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class Listening(SFTTrainer):  # type: ignore[misc]  # trl ships no types
    """Keeps what the logits are made of, position by position, so that its gradient can be read.

    TRL may take the loss without ever forming the logits of untrained positions; the last hidden state is always there.
    """

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        def keep(module: torch.nn.Module, given: tuple[Any, ...], hidden: torch.Tensor) -> torch.Tensor:
            self.hidden = hidden * 1.0
            self.hidden.retain_grad()
            return self.hidden

        hook = model.model.norm.register_forward_hook(keep)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        hook.remove()
        return loss


def trainer_over(
    rows: list[tuple[list[int], list[int]]], tokenizer: PreTrainedTokenizerFast, folder: Path
) -> Listening:
    from datasets import Dataset

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(rows),
        max_length=256,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    data = Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]})
    torch.manual_seed(0)
    return Listening(model=LlamaForCausalLM(config), args=arguments, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("family", list(TOKENIZERS))
def test_a_token_is_marked_as_trained_exactly_where_the_loss_has_a_gradient(family: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[family]()
    trainer = trainer_over(labelled(tokenizer), tokenizer, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    wholes = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    moved = trainer.hidden.grad.abs().sum(-1) > 0
    assert moved.shape == batch["input_ids"].shape and bool((batch["attention_mask"] == 0).any())
    for row, kinds in enumerate(token_kinds(batch, wholes)):
        predicted = [at for at in range(1, moved.shape[1]) if moved[row, at - 1]]
        assert predicted and not moved[row, -1]
        assert predicted == [at for at, kind in enumerate(kinds) if kind == "trained"]
        assert "dropped" not in kinds


@pytest.mark.parametrize("family", list(TOKENIZERS))
def test_the_parts_add_up_to_the_decoded_row_and_the_trained_ones_are_the_answer(family: str) -> None:
    tokenizer = TOKENIZERS[family]()
    rows = labelled(tokenizer)
    found = preview_rows(padded(rows), [ids for ids, _ in rows], tokenizer)
    for (ids, _), parts in zip(rows, found, strict=True):
        assert "".join(part.text for part in parts) == decoded(tokenizer, ids)
        assert "\ufffd" not in "".join(part.text for part in parts)
        assert all(one.kind != other.kind for one, other in pairwise(parts))
    end = tokenizer.eos_token
    assert [trained(parts) for parts in found[:2]] == [f" on the mat é{end}", f" Zürich 🇨🇭 is  wet\n{end}"]
    start = tokenizer.bos_token or "the"
    assert [part.text for part in found[2] if part.kind == "prompt"] in ([start], [start[0]])
    if tokenizer.chat_template:
        answers = [part.text for part in found[4] if part.kind == "trained"]
        assert len(answers) == 2 and "sat on é" in answers[0] and "ran 🇨🇭" in answers[1]
        assert any(mark in answers[1] for mark in ("</s>", "<|im_end|>", "<end_of_turn>"))


@pytest.mark.parametrize("family", ["llama", "bytes"])
def test_a_letter_cut_by_the_edge_stands_whole_in_the_later_part(family: str) -> None:
    tokenizer = TOKENIZERS[family]()
    ids = tokenizer("a 😀 b")["input_ids"]
    edge = next(at for at in range(len(ids)) if decoded(tokenizer, ids[:at]).endswith("\ufffd")) + 1
    labels = [IGNORED] * edge + ids[edge:]
    (parts,) = preview_rows(padded([(ids, labels)]), [ids], tokenizer)
    assert [part.text for part in parts] == [decoded(tokenizer, ids)[: -len("😀 b")], "😀 b"]
    assert [part.kind for part in parts] == ["prompt", "trained"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("masked", [True, False])
def test_padding_on_either_side_is_left_out_and_what_was_cut_is_dropped(side: str, masked: bool) -> None:
    tokenizer = TOKENIZERS["gpt2"]()
    whole = tokenizer("the cat sat on the mat and the dog ran" + tokenizer.eos_token)["input_ids"]
    keep = len(whole) - 3
    rows = [(whole, [IGNORED] * 2 + whole[2:]), (whole[:keep], [IGNORED] * 2 + whole[2:keep])]
    batch = padded(rows, side, pad=tokenizer.eos_token_id)
    if not masked:
        del batch["attention_mask"]
    full, cut = preview_rows(batch, [whole, whole], tokenizer)
    assert [part.kind for part in full] == ["prompt", "trained"]
    assert [part.kind for part in cut] == ["prompt", "trained", "dropped"]
    assert cut[2].text == decoded(tokenizer, whole[keep:]) and full[0] == cut[0]


def test_a_row_that_kept_its_end_shows_its_beginning_as_dropped() -> None:
    tokenizer = TOKENIZERS["gpt2"]()
    whole = tokenizer("the cat sat on the mat")["input_ids"]
    (parts,) = preview_rows(padded([(whole[2:], whole[2:])]), [whole], tokenizer)
    assert [part.kind for part in parts] == ["dropped", "prompt", "trained"]


def test_a_row_that_is_no_part_of_its_whole_is_refused() -> None:
    tokenizer = TOKENIZERS["gpt2"]()
    ids = tokenizer("the cat sat")["input_ids"]
    with pytest.raises(ValueError, match="neither the beginning nor the end"):
        preview_rows(padded([(ids, ids)]), [list(reversed(ids))], tokenizer)


def test_the_preview_of_the_tiny_tokenizer_names_its_special_tokens() -> None:
    tokenizer = make_causal_tokenizer(400, 64)
    ids = tokenizer("one ->: two</s>")["input_ids"]
    (parts,) = preview_rows(padded([(ids, [IGNORED] * (len(ids) - 2) + ids[-2:])]), [ids], tokenizer)
    assert parts[0].text.startswith("<s>one") and parts[1].text.endswith("</s>")


def test_shortening_keeps_both_ends_of_long_parts_and_every_kind() -> None:
    parts = [Part("prompt", "p" * 5000), Part("trained", "yes"), Part("dropped", "d" * 5000)]
    short = shorten(parts, 600)
    assert [part.kind for part in short] == ["prompt", "trained", "dropped"]
    assert short[1].text == "yes"
    assert sum(len(part.text) for part in short) < 700
    assert short[0].text.startswith("ppp") and short[0].text.endswith("ppp")
    assert " ... 4,702 characters ... " in short[0].text
    assert shorten(parts[1:2], 600) == parts[1:2]


def test_a_row_of_many_parts_stays_readable_when_shortened() -> None:
    parts = [Part(("prompt", "trained")[at % 2], "x" * 200) for at in range(40)]
    assert all(60 < len(part.text) < 200 for part in shorten(parts, 600))
