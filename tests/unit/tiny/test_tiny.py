"""The tiny models: deterministic, really trained where they say so, and of the real architectures."""

import hashlib
import json
import random
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pretrain_tiny_llama as pretraining
import pytest
import torch
from conftest import disturb_tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from peftcli.cache import built_once, cache_root
from peftcli.errors import MachineError, RecipeError
from peftcli.tiny.build import IMAGE_NAMES, NAMES, VOCABULARY_TOKENS, stand_in, tiny_model
from peftcli.tiny.llama import FOLDER, WEIGHTS, llama_config, llama_tokenizer
from peftcli.tiny.llama import TOKENIZER as TOKENIZER_FILE
from peftcli.tiny.save import isolated
from peftcli.tiny.shrink import FAMILIES, family_config, shrink
from peftcli.tiny.tokenizer import asset, load_chats, load_documents, make_encoder_tokenizer

TOKENIZER = llama_tokenizer()
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is the milk?"},
    {"role": "assistant", "content": "In the fridge."},
]


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_tiny_llama_is_the_shipped_weights_in_float32(tmp_path: Path) -> None:
    folder = tiny_model("tiny:llama", tmp_path)
    written, sent = load_file(folder / "model.safetensors"), load(asset(FOLDER, WEIGHTS))
    assert {tensor.dtype for tensor in sent.values()} == {torch.float16}
    assert written.keys() == sent.keys()
    assert all(torch.equal(written[name], sent[name].float()) for name in sent)


@pytest.mark.parametrize("name", ["tiny:gpt2", "tiny:qwen3"])
def test_random_causal_models_have_the_tokenizer_that_is_shipped(name: str, tmp_path: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(tiny_model(name, tmp_path))
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert loaded("Where is the milk?")["input_ids"] == TOKENIZER("Where is the milk?")["input_ids"]


def test_two_caches_hold_the_same_bytes(tmp_path: Path) -> None:
    first, second = (tiny_model("tiny:llama", tmp_path / name) for name in ("a", "b"))
    assert first.name == second.name
    assert {p.name: sha256(p) for p in first.iterdir()} == {p.name: sha256(p) for p in second.iterdir()}


def test_the_folder_of_tiny_llama_holds_a_whole_model(tmp_path: Path) -> None:
    folder = tiny_model("tiny:llama", tmp_path)
    names = {path.name for path in folder.iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert wanted <= names
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert config[key] == generation[key] == getattr(TOKENIZER, key)
    assert "license: apache-2.0" in (folder / "README.md").read_text()
    assert folder.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in tmp_path.iterdir() if ".stage-" in path.name] == []


def test_making_a_tiny_model_leaves_random_state_threads_and_modes_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate(), torch.get_num_threads(), torch.get_default_dtype()
    with torch.no_grad():
        tiny_model("tiny:llama", tmp_path)
        tiny_model("tiny:bert", tmp_path)
        assert not torch.is_grad_enabled()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), torch.get_num_threads(), torch.get_default_dtype())


def test_random_weights_do_not_depend_on_the_callers_random_state(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = tiny_model("tiny:gpt2", tmp_path / "a")
    torch.manual_seed(2)
    second = tiny_model("tiny:gpt2", tmp_path / "b")
    assert sha256(first / "model.safetensors") == sha256(second / "model.safetensors")


def test_the_shipped_files_are_small() -> None:
    assert len(asset(FOLDER, WEIGHTS)) + len(asset(FOLDER, TOKENIZER_FILE)) < 1_500_000


def test_the_script_trains_packs_and_measures() -> None:
    schedule = pretraining.Schedule(steps=4, rows=2, block_tokens=64)
    documents = pretraining.encode_documents(TOKENIZER)[:60]
    pad = TOKENIZER.pad_token_id
    losses = []
    for steps in (0, 4):
        with isolated(seed=3):
            model = LlamaForCausalLM(llama_config(TOKENIZER))
            pretraining.fit(model, documents, replace(schedule, steps=steps), pad)
            losses.append(pretraining.document_loss(model.eval(), documents, pad))
    # A uniform guess over the vocabulary costs ln(1024) = 6.93; a few steps learn which tokens are frequent.
    assert losses[0] == pytest.approx(6.93, abs=0.3)
    assert losses[1] < losses[0] - 0.3


def test_an_unknown_name_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean tiny:llama") as caught:
        tiny_model("tiny:lama", tmp_path)
    assert caught.value.exit_code == 2


def test_an_unwritable_cache_names_the_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="PEFTCLI_CACHE"):
        tiny_model("tiny:gpt2", tmp_path / "file")


def test_the_cache_is_the_argument_then_the_environment_then_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "named"))
    assert cache_root(tmp_path) == tmp_path
    assert cache_root(None) == tmp_path / "named"
    monkeypatch.delenv("PEFTCLI_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root(None) == tmp_path / ".cache" / "peftcli"


def test_two_processes_at_once_both_get_the_model(tmp_path: Path) -> None:
    asks = "import sys; from pathlib import Path; from peftcli.tiny.build import tiny_model; "
    asks += "print(tiny_model('tiny:gpt2', Path(sys.argv[1])))"
    other = subprocess.Popen([sys.executable, "-c", asks, tmp_path], stdout=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".*.lock")):  # until the other one builds, or is just about to
        assert other.poll() is None
        time.sleep(0.01)
    here = tiny_model("tiny:gpt2", tmp_path)
    assert other.communicate(timeout=120)[0] == f"{here}\n" and other.returncode == 0


def test_a_failed_build_leaves_nothing_and_a_killed_one_is_swept(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyError("half way")

    (tmp_path / ".model.stage-old").mkdir()
    with pytest.raises(KeyError):
        built_once(tmp_path, "model", fail)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False)["input_ids"]) == text or any(
        token in text for token in TOKENIZER.all_special_tokens
    )


@pytest.mark.parametrize("text", ["Crème Fraîche", "日本語 🙂", "a\t b\r\n\n", "  two  ", "\x00\x7f", "naïve -> :"])
def test_awkward_text_comes_back_from_a_saved_tokenizer(text: str, tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    ids = loaded(text)["input_ids"]
    assert ids[0] == loaded.bos_token_id
    assert loaded.eos_token_id not in ids
    assert loaded.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_are_distinct_and_opened_once() -> None:
    ids = [TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id]
    assert len(set(ids)) == 3
    rendered = TOKENIZER.apply_chat_template(MESSAGES, return_dict=True)["input_ids"]
    assert rendered.count(TOKENIZER.bos_token_id) == 1


def test_every_document_and_answer_ends_in_the_end_token() -> None:
    documents = pretraining.encode_documents(TOKENIZER)
    assert all(ids[0] == TOKENIZER.bos_token_id and ids[-1] == TOKENIZER.eos_token_id for ids in documents)
    counts = Counter(token for ids in documents for token in ids)
    for token in ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"):
        assert counts[TOKENIZER.convert_tokens_to_ids(token)] >= 50, token
    input_ids, labels = pretraining.pack(documents[:40], 256, TOKENIZER.pad_token_id)
    assert (input_ids == TOKENIZER.pad_token_id).any()
    assert (labels[input_ids == TOKENIZER.pad_token_id] == -100).all()
    assert int((labels != -100).sum()) == sum(min(256, len(ids)) for ids in documents[:40])


def test_the_generation_mask_covers_the_answer_and_its_end() -> None:
    rendered = TOKENIZER.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    answer = [i for i, m in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if m]
    assert TOKENIZER.decode(answer) == "In the fridge.</s>"
    asked = TOKENIZER.apply_chat_template(MESSAGES[:2], tokenize=False, add_generation_prompt=True)
    assert TOKENIZER.apply_chat_template(MESSAGES, tokenize=False).startswith(asked)


def test_the_chat_template_names_the_roles_it_knows() -> None:
    with pytest.raises(Exception, match="is not one of system, user, assistant"):
        TOKENIZER.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_the_text_knows_nothing_of_the_quickstart_task() -> None:
    text = "\n".join(load_documents()) + str(load_chats())
    assert "->" not in text
    assert "department" not in text.lower()
    assert len(text.encode()) < 400_000


def test_the_disturbed_weights_of_the_portability_runs_are_one_bit_off(tmp_path: Path) -> None:
    disturb_tiny_llama(tmp_path / "exact", tmp_path / "disturbed")
    exact = load_file(tiny_model("tiny:llama", tmp_path / "exact") / "model.safetensors")
    found = load_file(tiny_model("tiny:llama", tmp_path / "disturbed") / "model.safetensors")
    for name, tensor in exact.items():
        bits = (found[name].view(torch.int32) - tensor.view(torch.int32)).abs()
        assert (bits == 1).float().mean() > 0.999, name  # a weight of zero has no neighbour of the same sign
        assert not torch.equal(found[name], tensor) and torch.allclose(found[name], tensor, rtol=2e-7, atol=1e-30)


def test_the_held_out_loss_is_far_below_the_unigram_loss(llama: torch.nn.Module) -> None:
    documents = pretraining.encode_documents(TOKENIZER)
    learned, held_out = pretraining.split_documents(documents, pretraining.Schedule().held_out_every)
    loss = pretraining.document_loss(llama, held_out, TOKENIZER.pad_token_id)
    assert loss < 0.3 * pretraining.unigram_loss(learned, held_out, len(TOKENIZER))
    card = asset(FOLDER, "README.md").decode("utf-8")
    stated = float(re.search(r"held-out loss \| ([0-9.]+)", card)[1])
    assert loss == pytest.approx(stated, abs=1e-3)  # the card has four digits; float32 sums differ by 1e-6


def test_the_end_token_was_trained(tiny_llama: Path) -> None:
    weights = load_file(tiny_llama / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        norms = weights[name].norm(dim=1)
        assert norms[TOKENIZER.eos_token_id] > norms.quantile(0.1), name


def test_most_stories_end_by_themselves(llama: torch.nn.Module) -> None:
    prompts = torch.full((16, 1), TOKENIZER.bos_token_id)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        mask = torch.ones_like(prompts)
        stories = llama.generate(prompts, attention_mask=mask, do_sample=True, max_new_tokens=220)
    assert int((stories == TOKENIZER.eos_token_id).any(dim=1).sum()) >= 13


def test_a_chat_is_answered_and_ended(llama: torch.nn.Module) -> None:
    asked = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "Where do you keep cheese?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        ids = llama.generate(**asked, do_sample=False, max_new_tokens=40)[0].tolist()
    answer = ids[asked["input_ids"].shape[1] :]
    assert TOKENIZER.eos_token_id in answer
    assert len(TOKENIZER.decode(answer).split()) >= 3


def test_the_card_of_the_pretrained_model_states_its_losses(tiny_llama: Path) -> None:
    card = (tiny_llama / "README.md").read_text()
    for words in ("held-out loss", "knows nothing but", "license: apache-2.0"):
        assert words in card


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("tiny:llama", *IMAGE_NAMES)])
def test_a_random_model_says_so_and_answers(name: str, tmp_path: Path) -> None:
    folder = tiny_model(name, tmp_path)
    assert "random weights" in (folder / "README.md").read_text()
    assert _loss_of(folder) == pytest.approx(6.9, abs=0.5)
    keys = " ".join(load_file(folder / "model.safetensors"))
    assert {"tiny:gpt2": "c_attn", "tiny:qwen3": "q_norm", "tiny:bert": "word_embeddings"}[name] in keys
    again = tiny_model(name, tmp_path / "b")
    assert sha256(folder / "model.safetensors") == sha256(again / "model.safetensors")


def _loss_of(folder: Path) -> float:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    auto = AutoModelForMaskedLM if tokenizer.mask_token else AutoModelForCausalLM
    model = auto.from_pretrained(folder).eval()
    batch = tokenizer(["The milk is cold.", "Two nails <|endoftext|>"], padding=True, return_tensors="pt")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = model(**batch, labels=batch["input_ids"]).loss
    return float(loss)


@pytest.mark.parametrize("family", sorted({family for _, family in FAMILIES}))
def test_a_stand_in_of_every_family_forwards(family: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(family)
    folder = stand_in(config, tmp_path)
    small = AutoConfig.from_pretrained(folder)
    assert small.model_type == family
    assert bool(small.tie_word_embeddings) == bool(config.tie_word_embeddings)
    assert 0 < _loss_of(folder) < 20
    assert (folder / "model.safetensors").stat().st_size < 4_000_000
    assert "random weights" in (folder / "README.md").read_text()


def test_a_real_config_with_scaled_rope_windows_and_quantization_is_made_plain(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "phi3",
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 48,
            "long_factor": [2.0] * 48,
            "original_max_position_embeddings": 4096,
        },
        max_position_embeddings=131072,
        sliding_window=262144,
        architectures=["Phi3ForCausalLM"],
    )
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    small = AutoConfig.from_pretrained(stand_in(config, tmp_path))
    assert small.rope_parameters["rope_type"] == "default"
    assert small.max_position_embeddings == 2048
    assert not hasattr(small, "quantization_config")
    assert config.quantization_config is not None
    assert config.max_position_embeddings == 131072


def test_a_nested_text_config_gives_the_text_model(tmp_path: Path) -> None:
    folder = stand_in(AutoConfig.for_model("gemma3"), tmp_path)
    small = AutoConfig.from_pretrained(folder)
    assert small.model_type == "gemma3_text"
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert _loss_of(folder) > 0


def test_grouped_and_single_key_value_heads_stay_so() -> None:
    def heads(**given: int) -> int:
        return int(shrink(AutoConfig.for_model("llama", **given), TOKENIZER).num_key_value_heads)

    assert heads(num_attention_heads=32, num_key_value_heads=32) == 4
    assert heads(num_attention_heads=32, num_key_value_heads=8) == 2
    assert heads(num_attention_heads=32, num_key_value_heads=1) == 1


def test_a_model_type_without_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="no stand-in"):
        stand_in(AutoConfig.for_model("vit"), tmp_path)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("TinyPixel/Llama-2-7B-bf16-sharded", "llama"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "llama"),
        ("mistralai/Mistral-7B-v0.3", "mistral"),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2"),
        ("Qwen/Qwen3-0.6B", "qwen3"),
        ("Qwen/Qwen3-30B-A3B", "qwen3_moe"),
        ("google/gemma-2-2b-it", "gemma2"),
        ("google/gemma-2b", "gemma"),
        ("google/gemma-3-1b-it", "gemma3_text"),
        ("microsoft/Phi-3-mini-4k-instruct", "phi3"),
        ("microsoft/phi-4", "phi3"),
        ("microsoft/phi-2", "phi"),
        ("openai-community/gpt2", "gpt2"),
        ("distilbert/distilgpt2", "gpt2"),
        ("EleutherAI/pythia-70m", "gpt_neox"),
        ("facebook/opt-125m", "opt"),
        ("tiiuae/falcon-7b", "falcon"),
        ("google-bert/bert-base-uncased", "bert"),
        ("distilbert/distilbert-base-uncased", "distilbert"),
        ("FacebookAI/roberta-base", "roberta"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "qwen2"),
        ("acme/unheard-of", "llama"),
    ],
)
def test_the_family_is_guessed_from_the_name(name: str, family: str) -> None:
    config, guessed_from = family_config(name)
    assert config.model_type == family
    assert name in guessed_from


def test_an_encoder_takes_words_that_are_split_already() -> None:
    tokenizer = make_encoder_tokenizer(VOCABULARY_TOKENS, 512)
    split = tokenizer(["Fresh", "milk"], is_split_into_words=True)
    assert split["input_ids"] == tokenizer("Fresh milk")["input_ids"]
    assert split.word_ids() == [None, *sorted(i for i in split.word_ids() if i is not None), None]
