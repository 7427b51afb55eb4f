"""Tagging of words, and entities that are marked by tags with B- and I-."""

from peftcli.tasks.base import CLASS_METRICS, ENTITY_METRICS, Task
from peftcli.tasks.labels import UNUSED_BY_LABELED_TEXT

TOKEN_CLASSIFICATION = Task(
    name="token-classification",
    short="tags",
    aliases=("token_cls", "token-cls", "token_classification", "ner", "tagging"),
    columns=("tokens", "tags"),
    unused_keys={
        **UNUSED_BY_LABELED_TEXT,
        ("evaluation", "threshold"): "a word has exactly one tag",
        ("model", "problem_type"): "it is for sequence-classification",
    },
    metrics=("loss", *CLASS_METRICS, *ENTITY_METRICS),
    label_of="token",
    model="model for token-classification",
    auto_class="AutoModelForTokenClassification",
    peft_type="TOKEN_CLS",
    pipeline_tag="token-classification",
    loss_title="Loss, nats per tagged word",
    agreement="gives the same label",
    baseline="the share of O",
    row_format="peftcli.data.label_formats:choose_tagging",
    arguments="transformers:TrainingArguments",
    trainer="peftcli.train.trainers:make_label_trainer",
    batches="peftcli.train.module_selection:label_batches",
    predict="peftcli.model.predict_labels:tag_texts",
)
