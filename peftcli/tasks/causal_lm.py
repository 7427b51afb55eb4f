"""Language modeling: text, prompts with completions, and chats."""

from peftcli.tasks.base import Task

CAUSAL_LM = Task(
    name="causal-lm",
    short="text",
    aliases=("causal_lm", "sft", "clm"),
    columns=("text", "prompt", "completion", "messages"),
    unused_keys={
        ("dataset", "labels"): "only classification and tagging have labels",
        ("evaluation", "positive_label"): "only classification has one",
        ("evaluation", "threshold"): "only classification has one",
        ("model", "class_weights"): "only classification and tagging have classes",
        ("model", "problem_type"): "it is for sequence-classification",
    },
    metrics=("loss", "perplexity", "token_accuracy", "exact_match", "chrf", "unfinished_answers"),
    model="causal language model",
    auto_class="AutoModelForCausalLM",
    peft_type="CAUSAL_LM",
    pipeline_tag=None,
    loss_title="Nats per trained token",
    agreement="predicts the same token",
    row_format="peftcli.data.formats:choose_text_format",
    arguments="trl:SFTConfig",
    trainer="peftcli.train.trainers:make_trainer",
    batches="peftcli.train.module_selection:text_batches",
)
