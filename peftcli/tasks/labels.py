"""What the tasks with a new head share: keys of a recipe that belong to language models."""

from peftcli.tasks.base import Keys

_ONE_BY_ONE = "each row has its own label, and is padded to the longest of its micro-batch"
_LOSS = "the loss is on the labels of the rows, not on tokens of their text"
_OF_LANGUAGE_MODELS = "it belongs to the trainer of language models"
_NOTHING_WRITTEN = "no text is generated"
_TEXT_WITH_LABEL = "a row is a text with its label"

UNUSED_BY_LABELS: Keys = {
    **{("trainer", name): _ONE_BY_ONE for name in ("packing", "packing_strategy", "eval_packing", "padding_free")},
    **{("trainer", name): _LOSS for name in ("completion_only_loss", "assistant_only_loss", "loss_type")},
    ("trainer", "router_aux_loss_coef"): _LOSS,
    ("trainer", "activation_offloading"): f"{_OF_LANGUAGE_MODELS}; use activation_checkpointing",
    **{
        ("trainer", name): _OF_LANGUAGE_MODELS for name in ("pad_to_multiple_of", "shuffle_dataset", "use_liger_kernel")
    },
    **{("evaluation", name): _NOTHING_WRITTEN for name in ("max_new_tokens", "temperature", "top_p", "rows")},
}
"""Keys that no task with labels uses."""
UNUSED_BY_LABELED_TEXT: Keys = {
    **UNUSED_BY_LABELS,
    ("model", "chat_template"): "a text is labeled as it is; name its column or write dataset.text",
    ("model", "eos_token"): "no text is generated that could end on it",
    **{("dataset", name): _TEXT_WITH_LABEL for name in ("prompt", "completion")},
    **{("dataset", "columns", name): _TEXT_WITH_LABEL for name in ("prompt", "completion", "messages")},
}
"""The same for tasks whose rows are texts."""
