"""Classification of images: one class, several classes, or a number."""

from peftcli.tasks.base import CLASS_METRICS, NUMBER_METRICS, Task
from peftcli.tasks.labels import UNUSED_BY_LABELS

_NO_TOKENS = "an image has no tokens"
_FILES = "a row is an image file with a label"

IMAGE_CLASSIFICATION = Task(
    name="image-classification",
    short="images",
    aliases=("image_classification", "vision"),
    columns=("image", "label"),
    unused_keys={
        **UNUSED_BY_LABELS,
        **{("model", name): _NO_TOKENS for name in ("chat_template", "eos_token", "template")},
        **{("dataset", name): _NO_TOKENS for name in ("max_length", "too_long", "thinking", "system")},
        **{("dataset", name): _FILES for name in ("text", "prompt", "completion", "name", "url", "url_env")},
        **{("dataset", "columns", name): _FILES for name in ("prompt", "completion", "messages")},
        ("performance", "tokens_per_micro_batch"): _NO_TOKENS,
    },
    metrics=("loss", *CLASS_METRICS, *NUMBER_METRICS),
    label_of="row",
    images=True,
    model="model for image-classification",
    auto_class="AutoModelForImageClassification",
    peft_type=None,  # PEFT has no such type, and the plain PeftModel passes all inputs on
    pipeline_tag="image-classification",
    loss_title="Loss per image",
    agreement="gives the same label",
    baseline="the share of the commonest class",
    row_format="peftcli.data.image_rows:choose_images",
    arguments="transformers:TrainingArguments",
    trainer="peftcli.train.trainers:make_label_trainer",
    batches="peftcli.train.module_selection:label_batches",
    predict="peftcli.model.predict_labels:label_images",
)
