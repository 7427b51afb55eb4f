"""The tokenizers of the tiny models: a byte-level BPE, shipped for causal models and trained here for encoders."""

import json
from importlib.resources import files

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CAUSAL_TOKENS = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
ENCODER_TOKENS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]

# `</s>` is inside the generation block, so the end token is trained with the answer.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('role ' + message['role'] + ' is not one of system, user, assistant') -}}
{%- endif -%}
{{- '<|' + message['role'] + '|>\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- message['content'] + '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""


def asset(*names: str) -> bytes:
    """The content of one shipped file, given its folders and name."""
    return files("peftcli.assets").joinpath(*names).read_bytes()


def load_documents() -> list[str]:
    """The shipped text, one short document each."""
    return asset("corpus.txt").decode("utf-8").splitlines()


def load_chats() -> list[list[dict[str, str]]]:
    """The shipped conversations, as lists of messages."""
    return [json.loads(line)["messages"] for line in asset("chats.jsonl").decode("utf-8").splitlines()]


def wrap_causal_tokenizer(backend: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer of transformers around a backend with the tokens of `CAUSAL_TOKENS`, with the chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=CAUSAL_TOKENS[3:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def make_encoder_tokenizer(vocabulary_tokens: int, max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer that encodes a text as `[CLS] ... [SEP]`; each word is encoded with a space before it."""
    backend = train_bpe(ENCODER_TOKENS, vocabulary_tokens, add_prefix_space=True)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, ENCODER_TOKENS.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        unk_token="[UNK]",
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def train_bpe(special_tokens: list[str], vocabulary_tokens: int, *, add_prefix_space: bool) -> Tokenizer:
    """Train a byte-level BPE on the shipped text, in under a second."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_tokens,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    turns = [message["content"] for chat in load_chats() for message in chat]
    backend.train_from_iterator(load_documents() + turns, trainer)
    return backend
