"""The checks of tokenizer, template and embeddings: each fault is found, and no sound model is suspected."""

from pathlib import Path

import numpy as np
import pytest
from pretrain_tiny_llama import make_causal_tokenizer
from safetensors import safe_open
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peftcli.data.checks import Check, EmbeddingRows, check_embeddings, check_tokenizer, untrained_rows
from peftcli.data.encode import stop_ids

MODELS = Path(__file__).parents[4] / "shared" / "models"
CHAT = [{"role": "user", "content": "Hi, you."}, {"role": "assistant", "content": "Hello!"}]
WITH_SYSTEM = [{"role": "system", "content": "Be kind."}, *CHAT]
TURNS = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
START = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    made = make_causal_tokenizer(400, 64)
    if template is not None:
        made.chat_template = template
    return made


def answers(
    made: PreTrainedTokenizerFast, kind: str = "messages", *, assistant_only: bool = True, chats: object = None
) -> dict[str, Check]:
    found = check_tokenizer(made, kind, sample_chats=chats or [CHAT], assistant_only=assistant_only)
    names = [check.name for check in found]
    assert len(names) == len(set(names))
    for check in found:
        assert check.result in ("ok", "warn", "fail", "skip")
        assert check.said.endswith(".") and "\n" not in check.said
    return {check.name: check for check in found}


def test_a_sound_chat_tokenizer_passes_every_check() -> None:
    found = answers(tokenizer(), chats=[CHAT, WITH_SYSTEM])
    assert {check.result for check in found.values()} == {"ok"}
    assert len(found) == 9


@pytest.mark.parametrize("kind", ["text", "prompt_completion"])
def test_a_tokenizer_without_a_template_is_enough_for_texts(kind: str) -> None:
    made = tokenizer()
    made.chat_template = None
    assert {name: check.result for name, check in answers(made, kind).items()} == {
        "end token": "ok",
        "pad token": "ok",
        "start token": "ok",
        "round trip": "ok",
    }


def test_messages_without_a_template_fail_with_the_mend() -> None:
    made = tokenizer()
    made.chat_template = None
    check = answers(made)["chat template"]
    assert check.result == "fail" and "model.chat_template" in check.said


def test_a_missing_end_token_fails() -> None:
    made = tokenizer()
    made.eos_token = None
    check = answers(made, "text")["end token"]
    assert check.result == "fail" and "model.eos_token" in check.said


def test_a_pad_token_that_is_the_end_token_is_said_to_be_harmless() -> None:
    made = tokenizer()
    made.pad_token = made.eos_token
    check = answers(made, "text")["pad token"]
    assert check.result == "ok" and "end tokens are still trained" in check.said


@pytest.mark.parametrize(
    ("template", "name", "result", "word"),
    [
        ("{{ raise_exception('no tools here') }}", "chat template", "fail", "no tools here"),
        ("{{ bos_token }}{{ bos_token }}" + TURNS + "</s>{% endfor %}" + START, "start token", "warn", "twice"),
        (TURNS + "\n{% endfor %}" + START, "end of a turn", "warn", "instead of an end token"),
        (TURNS + " Bye.</s>{% endfor %}" + START, "end of a turn", "warn", "'Bye.</s>'"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}" + START, "end of a turn", "fail", "omits the text"),
        (TURNS + "</s>{% endfor %}", "start of an answer", "warn", "add_generation_prompt"),
        (
            "{{ messages | length }}" + TURNS + "</s>{% endfor %}" + START,
            "assistant's turns",
            "fail",
            "assistant_only_loss: false",
        ),
        (
            "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>\n{{ m.content }}</s>{% endfor %}" + START,
            "system turns",
            "warn",
            "omits them",
        ),
    ],
)
def test_a_fault_of_a_template_is_found(template: str, name: str, result: str, word: str) -> None:
    chats = [WITH_SYSTEM] if name == "system turns" else [CHAT]
    check = answers(tokenizer(template), chats=chats)[name]
    assert check.result == result and word in check.said


def test_a_template_without_marks_whose_chats_render_in_steps_is_ok() -> None:
    found = answers(tokenizer(TURNS + "</s>{% endfor %}" + START))
    assert {check.result for check in found.values()} == {"ok"}
    assert "rendering prefixes" in found["assistant's turns"].said


def test_turns_need_not_be_told_apart_where_all_are_trained() -> None:
    made = tokenizer("{{ messages | length }}" + TURNS + "</s>{% endfor %}" + START)
    assert answers(made, assistant_only=False)["assistant's turns"].result == "skip"


def test_a_template_that_refuses_system_turns_is_fine_for_chats_without_any() -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    made = tokenizer(refuses + TURNS + "</s>{% endfor %}" + START)
    assert answers(made)["system turns"].result == "ok"
    assert answers(made, chats=[WITH_SYSTEM])["chat template"].result == "fail"
    some = answers(made, chats=[CHAT, WITH_SYSTEM])
    assert some["chat template"].result == "warn" and "1 of 2 sampled chats" in some["chat template"].said
    assert some["system turns"].result == "warn"


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_a_tokenizer_that_changes_letters_is_named_with_an_example(kind: str) -> None:
    made = tokenizer()
    made.backend_tokenizer.normalizer = normalizers.Lowercase()
    check = answers(made, kind)["round trip"]
    assert check.result == "warn" and "Name 2" in check.said and "name 2" in check.said


def test_a_second_start_token_of_the_tokenizer_itself_is_found() -> None:
    made = tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 1)])
    assert answers(made, "text")["start token"].result == "warn"


def embedding(folder: Path) -> np.ndarray:
    names = ("model.embed_tokens.weight", "embeddings.word_embeddings.weight")
    with safe_open(folder / "model.safetensors", "np") as file:
        (name,) = [name for name in file.keys() if name in names]  # noqa: SIM118  # no dict
        return file.get_tensor(name).astype(np.float32)


def rows_of(matrix: np.ndarray, ids: list[int], sampled: int = 1000) -> EmbeddingRows:
    others = np.setdiff1d(np.arange(len(matrix)), ids)
    drawn = np.random.default_rng(0).permutation(others)[:sampled]
    return EmbeddingRows(ids, matrix[ids], matrix[drawn])


@pytest.fixture(scope="session")
def stories() -> Path:
    folder = MODELS / "stories260k-llama"
    if not folder.is_dir():
        pytest.skip("needs shared/models")
    return folder


@pytest.mark.parametrize("sampled", [50, 1000])
def test_the_end_token_that_stories260k_never_saw_is_warned_of_and_the_one_it_knows_is_not(
    stories: Path, sampled: int
) -> None:
    made = AutoTokenizer.from_pretrained(stories)
    matrix = embedding(stories)
    for end, result in ((1, "ok"), (2, "warn")):
        found = rows_of(matrix, [end], sampled)
        check, added = check_embeddings(found, made, embeddings_trained=False, ends=[end])
        assert check.result == result, check.said
        assert added.result == "skip"
    assert "</s> (id 2)" in check.said and "model.eos_token" in check.said and "modules_to_save" in check.said
    assert check_embeddings(found, made, embeddings_trained=True, ends=[2])[0].result == "ok"


def test_no_letter_or_word_that_stories260k_learned_is_suspected(stories: Path) -> None:
    made = AutoTokenizer.from_pretrained(stories)
    matrix = embedding(stories)
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park, and she said!"
    used = sorted(set(made(text)["input_ids"]))
    assert len(used) > 25
    assert not any(untrained_rows(matrix[used], rows_of(matrix, used).sample))


def test_ordinary_tokens_of_an_encoder_are_not_suspected() -> None:
    folder = MODELS / "minilm-l3-v8k"
    if not folder.is_dir():
        pytest.skip("needs shared/models")
    matrix = embedding(folder)
    made = AutoTokenizer.from_pretrained(folder)
    used = [id_ for id_ in range(len(matrix)) if id_ != made.mask_token_id]
    drawn = np.random.default_rng(1).permutation(used)[:400].tolist()
    picked = [*drawn, made.sep_token_id, made.cls_token_id]
    assert not any(untrained_rows(matrix[picked], rows_of(matrix, picked).sample))


def test_the_tiny_model_has_learned_its_end_token_and_the_words_of_its_text(tiny_llama: Path) -> None:
    made = AutoTokenizer.from_pretrained(tiny_llama)
    matrix = embedding(tiny_llama)
    ends = sorted(stop_ids(made))
    words = made("Hugo and Lucy were happy to see you.")["input_ids"]
    ids = list(dict.fromkeys([*ends, *words]))
    checks = check_embeddings(rows_of(matrix, ids), made, embeddings_trained=False, ends=ends)
    assert [check.result for check in checks] == ["ok", "ok"]
    assert untrained_rows(matrix[[made.pad_token_id]], rows_of(matrix, ids).sample) == [True]


def test_rows_as_a_grown_vocabulary_gets_them_are_suspected() -> None:
    random = np.random.default_rng(0)
    trained = random.normal(0.3, 1.0, size=(500, 64))
    mean = trained.mean(axis=0)
    grown = np.stack([mean + random.normal(0, 1e-3, 64), np.zeros(64), random.normal(0, 0.02, 64)])
    assert untrained_rows(grown, trained - 0.0)[:1] == [True]
    centred = trained - mean
    assert untrained_rows(np.stack([np.zeros(64), random.normal(0, 0.02, 64)]), centred) == [True, True]
    assert not any(untrained_rows(trained[:50], trained[50:]))


def test_one_twin_is_no_proof_since_a_new_token_may_begin_as_a_copy() -> None:
    random = np.random.default_rng(0)
    trained = random.normal(size=(300, 32))
    pair = np.stack([trained[0], trained[0] * 1.01])
    assert untrained_rows(pair, trained[1:]) == [False, False]
    assert untrained_rows(np.stack([*pair, trained[0] * 0.99]), trained[1:]) == [True, True, True]


def test_an_added_token_that_was_never_learned_is_warned_of_apart_from_the_end() -> None:
    made = tokenizer()
    random = np.random.default_rng(0)
    sample = random.normal(size=(300, 32))
    ids = [made.eos_token_id, *made.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])]
    rows = np.stack([random.normal(size=32), np.zeros(32), random.normal(size=32)])
    end, added = check_embeddings(
        EmbeddingRows(ids, rows, sample), made, embeddings_trained=False, ends=[made.eos_token_id]
    )
    assert (end.result, added.result) == ("ok", "warn")
    assert "<|user|>" in added.said and "<|assistant|>" not in added.said
