"""Classification of texts and pairs of texts: one class, several classes, or a number."""

from peftcli.tasks.base import CLASS_METRICS, NUMBER_METRICS, Task
from peftcli.tasks.labels import UNUSED_BY_LABELED_TEXT

SEQUENCE_CLASSIFICATION = Task(
    name="sequence-classification",
    short="classes",
    aliases=(
        *("seq_cls", "seq-cls", "sequence_classification", "text-classification", "text_classification"),
        *("classification", "sentiment-analysis"),
    ),
    columns=("text", "text_pair", "label"),
    unused_keys=UNUSED_BY_LABELED_TEXT,
    metrics=("loss", *CLASS_METRICS, *NUMBER_METRICS),
    label_of="row",
    model="model for sequence-classification",
    auto_class="AutoModelForSequenceClassification",
    peft_type="SEQ_CLS",
    pipeline_tag="text-classification",
    loss_title="Loss per row",
    agreement="gives the same label",
    baseline="the share of the commonest class",
    row_format="peftcli.data.label_formats:choose_classification",
    arguments="transformers:TrainingArguments",
    trainer="peftcli.train.trainers:make_label_trainer",
    batches="peftcli.train.module_selection:label_batches",
    predict="peftcli.model.predict_labels:label_texts",
)
