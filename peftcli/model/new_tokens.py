"""Tokens that a recipe adds to the vocabulary: their ids, their embedding rows, and what trains these rows."""

import copy
from collections.abc import Sequence

import torch
from peft.utils.other import TrainableTokensWrapper
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from peftcli.errors import RecipeError
from peftcli.methods.registry import METHODS
from peftcli.plan.machine import ModelFacts
from peftcli.plan.targets import matches
from peftcli.recipe.schema import AdapterSection

ROWS_SEED = 0
"""Seed of the new rows, so that every command starts from the same base."""


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Add tokens to the tokenizer of a base model.

    Raises:
        RecipeError: it has one of them already.
    """
    known = tokenizer.get_vocab()
    present = [token for token in tokens if token in known]
    if present:
        raise RecipeError(
            f"model.add_tokens {', '.join(present)}: the tokenizer already has them; remove them there (their rows can "
            "be trained with adapter.trainable_token_indices)"
        )
    tokenizer.add_tokens(list(tokens))


def ids_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """The ids of added tokens, ascending."""
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary[token] for token in tokens)


def extend_config(config: PreTrainedConfig, ids: Sequence[int]) -> PreTrainedConfig:
    """The configuration with a row for each id; bases often have spare rows."""
    extended = copy.deepcopy(config)
    text = extended.get_text_config()
    text.vocab_size = max(text.vocab_size, max(ids) + 1)
    return extended


def extend_embeddings(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Give a base a row for each id, initialized as transformers does: near the mean of the other rows.

    Rows that the base already has stay as they are. The random part is the same in every command on a device.
    """
    if model.get_input_embeddings().weight.shape[0] > max(ids):
        return
    gpus = [torch.cuda.current_device()] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(ROWS_SEED)
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=True)


def expose_output_bias(model: PreTrainedModel) -> None:
    """Let TRL's loss read the bias of an output layer whose rows are trained; PEFT's wrapper only has its weight."""
    output = model.get_output_embeddings()
    if isinstance(output, TrainableTokensWrapper):
        # Not as a module attribute, which would add the bias of the base to the tensors of the adapter.
        output.__dict__["bias"] = output.original_module.bias


def train_rows(adapter: AdapterSection, ids: Sequence[int], facts: ModelFacts, *, tied: bool) -> AdapterSection:
    """The adapter that also trains the rows of new tokens, in the output layer too if it has its own.

    Args:
        tied: the output layer shares the weights of the embedding.

    Raises:
        RecipeError: `trainable_token_indices` is a mapping, to which the new rows cannot be added.
    """
    whole = any(matches(name, one) for name in facts.embeddings for one in adapter.modules_to_save or ())
    if METHODS[adapter.method].trains_all or whole:
        return adapter
    given = adapter.arguments.get("trainable_token_indices") or []
    if not isinstance(given, list):
        raise RecipeError(
            "adapter.trainable_token_indices: with model.add_tokens it must be a list of ids; the new tokens are added"
        )
    rows = sorted({*given, *ids})
    separate = facts.output_layer is not None and not tied
    wanted = {name: rows for name in (*facts.embeddings[:1], facts.output_layer) if name} if separate else rows
    return adapter.model_copy(update={"arguments": {**adapter.arguments, "trainable_token_indices": wanted}})
