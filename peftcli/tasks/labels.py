"""Keys of a recipe that are for language models only, and have no effect for tasks with a new head."""

from peftcli.tasks.base import Keys

OUTSIDE = "O"
"""The tag of a word that is not part of an entity."""

_PADDED = "classification uses padded batches"
_LOSS = "the loss is on the labels, not on tokens"
_OF_LANGUAGE_MODELS = "it is for language models only"
_NO_TEXT = "no text is generated"
_TEXT_WITH_LABEL = "a row is a text with a label"

UNUSED_BY_LABELS: Keys = {
    **{("trainer", name): _PADDED for name in ("packing", "packing_strategy", "eval_packing", "padding_free")},
    **{("trainer", name): _LOSS for name in ("completion_only_loss", "assistant_only_loss", "loss_type")},
    ("trainer", "router_aux_loss_coef"): _LOSS,
    ("trainer", "activation_offloading"): f"{_OF_LANGUAGE_MODELS}; use activation_checkpointing",
    **{
        ("trainer", name): _OF_LANGUAGE_MODELS for name in ("pad_to_multiple_of", "shuffle_dataset", "use_liger_kernel")
    },
    **{("evaluation", name): _NO_TEXT for name in ("max_new_tokens", "temperature", "top_p", "rows")},
}
"""Keys that have no effect for any task with labels."""
UNUSED_BY_LABELED_TEXT: Keys = {
    **UNUSED_BY_LABELS,
    ("model", "chat_template"): "texts are classified without a template; name their column or set dataset.text",
    ("model", "eos_token"): _NO_TEXT,
    ("model", "template"): "texts are classified without a template",
    **{("dataset", name): "texts are classified without a template" for name in ("thinking", "system")},
    **{("dataset", name): _TEXT_WITH_LABEL for name in ("prompt", "completion")},
    **{("dataset", "columns", name): _TEXT_WITH_LABEL for name in ("prompt", "completion", "messages")},
}
"""Keys that have no effect for tasks with labeled texts."""
